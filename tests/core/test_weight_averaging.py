"""What averaging algorithms share: statistics across a checkpoint, and batches that are kept."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mosaic_core import Run, batchnorm
from mosaic_core.algorithms import EMA, LAWA, SWA
from mosaic_core.loop import train_steps

KEPT = 3
ALGORITHMS = [
    EMA("4ba", recompute_batchnorm=KEPT),
    LAWA(2, "1ba", recompute_batchnorm=KEPT),
    SWA("1ba", "1dur", "1ba", recompute_batchnorm=KEPT),
]


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        )


def batch(step):
    g = torch.Generator().manual_seed(step)
    return torch.randn(8, 1, 6, 6, generator=g), torch.randint(3, (8,), generator=g)


def start(algorithm, model=None):
    model = network() if model is None else model
    run = Run([algorithm], model=model)
    run.start([torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)], total_steps=20)
    return run


def train(run, steps):
    for _ in range(steps):
        train_steps(
            run,
            [batch(run.progress.step)],
            lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        )


def evaluated(run):
    with run.evaluation():
        return {name: value.clone() for name, value in run.model.state_dict().items()}


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
def test_statistics_that_are_frozen_in_training_stay(algorithm):
    """As in fine-tuning with batch norms in evaluation mode: the weights learnt with those."""
    model = nn.Sequential(nn.BatchNorm2d(1), *network())
    nn.init.constant_(model[0].running_mean, 5)
    run = start(algorithm, model.train())
    model[0].eval()
    train(run, 4)
    training = model[2].running_mean.clone()
    model.eval()
    state = evaluated(run)
    assert state["0.running_mean"].item() == 5
    assert state["0.num_batches_tracked"].item() == 0
    assert not torch.allclose(state["2.running_mean"], training)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def resumed(run, algorithm):
    """Return another run that goes on from this one's checkpoint."""
    file = io.BytesIO()
    with run.evaluation():  # as every adapter saves
        torch.save([run.model.state_dict(), run.state_dict()], file)
    file.seek(0)
    model, state = torch.load(file, weights_only=True)
    other = start(algorithm)
    train(other, 5)  # whatever it held before must not matter
    other.model.load_state_dict(model)
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
class TestResume:
    def test_an_evaluation_at_once_has_the_same_statistics(self, algorithm):
        run = start(algorithm)
        train(run, 6)
        expected = evaluated(run)
        training = {n: b.clone() for n, b in run.model.named_buffers()}
        other = resumed(run, algorithm)
        assert_equal(dict(other.model.named_buffers()), training)
        for _ in range(2):
            assert_equal(evaluated(other), expected)
        assert_equal(dict(other.model.named_buffers()), training)
        again = resumed(other, algorithm)  # and once more, without training in between
        assert_equal(evaluated(again), expected)

    def test_on_the_batches_since_when_training_has_gone_on(self, algorithm):
        """As a checkpoint holds none; the weights are the same."""
        run = start(algorithm)
        train(run, 6)
        other = resumed(run, algorithm)
        for r in (run, other):
            r.optimizers[0].state.clear()
            train(r, 1)
        ours = evaluated(other)
        model = network()
        model.load_state_dict(ours)
        batchnorm.recompute(model, [batch(6)[0]])
        assert_equal(ours, model.state_dict())
        assert torch.equal(ours["0.weight"], evaluated(run)["0.weight"])
        assert not torch.equal(ours["1.running_mean"], evaluated(run)["1.running_mean"])

    def test_the_same_again_after_as_many_batches_as_are_kept(self, algorithm):
        run = start(algorithm)
        train(run, 6)
        other = resumed(run, algorithm)
        for r in (run, other):
            r.optimizers[0].state.clear()
            train(r, KEPT)
        assert_equal(evaluated(other), evaluated(run))


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
def test_statistics_are_saved_only_where_they_are_in_the_model(algorithm):
    run = start(algorithm)
    train(run, 4)
    assert run.state_dict()["states"][algorithm.name]["statistics"] == {}
    with run.evaluation():
        saved = run.state_dict()["states"][algorithm.name]["statistics"]
        inside = {n: b.clone() for n, b in run.model.named_buffers()}
    assert_equal(saved, inside)  # a copy: the model has its own again


@pytest.mark.parametrize(
    ("model", "kept"),
    [
        (network(), KEPT),
        (nn.BatchNorm1d(3), KEPT),
        (nn.Sequential(nn.SyncBatchNorm(3)), KEPT),
        (nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)), 0),
        (nn.BatchNorm1d(3, track_running_stats=False), 0),
    ],
    ids=["convolutional", "root", "synchronised", "layer norm", "without statistics"],
)
def test_batches_are_kept_for_models_with_batch_norms(model, kept):
    run = start(ALGORITHMS[0], model)
    for i in range(5):
        run.on_batch(torch.full((2, 3), float(i)), torch.zeros(2))
    assert [int(x[0, 0]) for x, _ in run.recent] == list(range(5 - kept, 5))


def test_names_of_statistics_are_those_of_the_buffers():
    for model in (network(), nn.BatchNorm1d(3), nn.Sequential(network(), network())):
        found, buffers = batchnorm.statistics(model), dict(model.named_buffers())
        assert found.keys() == buffers.keys()
        assert all(found[name] is buffers[name] for name in found)
