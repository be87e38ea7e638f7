"""NoOp: the control of a comparison must be exactly the baseline."""

import torch
import torch.nn.functional as F
from torch import nn

from mosaic_core import Need, Run
from mosaic_core.algorithms import NoOp


def train(recipe):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    run = Run(recipe, model=model, optimizer=optimizer)
    for _ in range(5):
        x, y = run.on_batch(torch.randn(8, 4), torch.randint(3, (8,)))
        F.cross_entropy(model(x), y).backward()
        run.step()
        optimizer.zero_grad()
    return run


def test_training_is_bit_equal_to_none():
    """Dropout and data come from torch's global stream: a single draw would show."""
    with torch.random.fork_rng(devices=[]):
        one, other = train([NoOp()]), train([])
    for a, b in zip(
        one.model.state_dict().values(), other.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


def test_it_acts_at_the_points_of_a_step():
    assert NoOp.needs() == {Need.BATCH, Need.GRADIENTS, Need.WEIGHTS}


def test_batch_and_evaluation_weights_are_the_users():
    run = train([NoOp()])
    batch = (torch.zeros(2, 4), torch.tensor([0, 1]))
    for given, got in zip(batch, run.on_batch(batch), strict=True):
        assert got is given
    weight = run.model[0].weight.detach().clone()
    with run.evaluation():
        assert torch.equal(run.model[0].weight, weight)
    assert run.state_dict()["states"] == {"NoOp": {}}
