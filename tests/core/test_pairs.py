"""Every two algorithms together in one run: they work, or the recipe is refused in plain words."""

import copy
import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mosaic_core import ConflictError, Recipe, Run, plugins
from mosaic_core.loop import train_steps
from mosaic_core.testing._network import examples, network

STEPS, SAVED_AT = 4, 2

EXAMPLES = {name: cls.example() for name, cls in sorted(plugins.algorithms().items())}
PAIRS = [
    pair
    for pair in itertools.permutations(EXAMPLES, 2)
    # Between places the recipe has one order, within one the user's.
    if pair[0] < pair[1] or EXAMPLES[pair[0]].place == EXAMPLES[pair[1]].place
]
REFUSED = [
    *({"EMA", "LAWA"}, {"EMA", "SWA"}, {"LAWA", "SWA"}),  # one average is evaluated
    *({"SAM", "Backdrop"}, {"SAM", "StochasticDepth"}),  # draws that a second pass can't repeat
]


def start(algorithms):
    model = network()
    model.relu2 = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(2))  # images of any size
    run = Run(algorithms, model=model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    run.start([optimizer], total_steps=STEPS, steps_per_epoch=2)
    model.train()
    return run


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def train(run, until=STEPS):
    while run.progress.step < until:
        train_steps(run, [examples(run.progress.step)], loss)
        if run.progress.step % 2 == 0:
            run.end_epoch()


def saved_and_loaded(run):
    file = io.BytesIO()
    torch.save([run.model.state_dict(), run.optimizers[0].state_dict(), run.state_dict()], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def state_of(run):
    return copy.deepcopy(run.model.state_dict())


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def assert_works(algorithms):
    """It trains, evaluation gives the weights back, and a resumed run is the same to the bit."""
    run = start(algorithms)
    train(run, SAVED_AT)
    model, optimizer, state = saved_and_loaded(run)
    train(run)
    trained = state_of(run)
    assert all(torch.isfinite(tensor).all() for tensor in trained.values())
    with run.evaluation():
        evaluated = dict(copy.deepcopy(run.model).named_parameters())
    assert_equal(state_of(run), trained)

    resumed = start(algorithms)
    resumed.model.load_state_dict(model)
    resumed.optimizers[0].load_state_dict(optimizer)
    resumed.load_state_dict(state)
    train(resumed)
    assert_equal(state_of(resumed), trained)
    with resumed.evaluation():
        assert_equal(dict(resumed.model.named_parameters()), evaluated)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_two_together(pair):
    algorithms = [EXAMPLES[name] for name in pair]
    if set(pair) in REFUSED:
        with pytest.raises(ConflictError, match=r"(keep|remove) one$") as error:
            Recipe(algorithms)
        assert all(name in str(error.value) for name in pair)
    else:
        assert_works(algorithms)


def test_all_together():
    """But for those that are refused beside another."""
    refused = set().union(*REFUSED)
    assert_works([example for name, example in EXAMPLES.items() if name not in refused])
