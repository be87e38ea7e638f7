"""A workload whose work takes the time it says, on a clock that nothing else moves."""

from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from torch import nn

from mosaic_core import Algorithm, Place, Recipe
from mosaic_core.algorithms import EMA, SAM
from mosaic_core.bench import phases
from mosaic_core.datasets import Data
from mosaic_core.workloads import Workload

# Each piece of work has a digit of its own, so a sum tells what is in it.
DATA, FORWARD, LOSS, BACKWARD, OPTIMIZER = 1, 10, 100, 1000, 10_000
ON_BATCH, ON_GRADIENTS, ON_STEP_END = 100_000, 200_000, 400_000
EVALUATION = 10**9


class Clock:
    """Stands in for ``time.perf_counter``; work is in milliseconds."""

    def __init__(self):
        self.now = 0

    def __call__(self):
        return self.now / 1e3

    def work(self, time):
        self.now += time


CLOCK = Clock()


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        CLOCK.work(BACKWARD)
        return grad


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        CLOCK.work(FORWARD if self.training else EVALUATION)
        return SlowBackward.apply(self.layer(x))


class SGD(torch.optim.SGD):
    def step(self, closure=None):
        loss = super().step(closure)
        CLOCK.work(OPTIMIZER)
        return loss


class Timed(Workload):
    """A workload in which all takes its time."""

    def loaders(self, data, seed):
        train, evaluation = super().loaders(data, seed)
        collate = train.collate_fn

        def slow(examples):
            CLOCK.work(DATA)
            return collate(examples)

        train.collate_fn = slow
        return train, evaluation

    def optimizer(self, model, total_steps):
        optimizer = SGD(model.parameters(), lr=0.01)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    def loss(self, logits, labels):
        CLOCK.work(LOSS)
        return super().loss(logits, labels)


def data(data_dir=None):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 4, generator=generator)
    labels = torch.randint(2, (64,), generator=generator)
    return Data(inputs, labels, inputs, labels)


WORKLOAD = Timed("timed", "", data, Net, batch_size=8, epochs=1, seeds=1, learning_rate=0.01)


@dataclass(frozen=True)
class Busy(Algorithm):
    """Takes its time at every point."""

    place = Place.AUGMENTATION

    def on_batch(self, batch, run):
        CLOCK.work(ON_BATCH)
        return batch

    def on_gradients(self, run):
        CLOCK.work(ON_GRADIENTS)

    def on_step_end(self, run):
        CLOCK.work(ON_STEP_END)


RECIPES = {"empty": Recipe(), "busy": Recipe([Busy()]), "full": Recipe([Busy(), SAM(), EMA("2ba")])}
ALGORITHM = {
    "empty": 0,
    "busy": ON_BATCH + ON_GRADIENTS + ON_STEP_END,
    "full": ON_BATCH + ON_GRADIENTS + ON_STEP_END + FORWARD + LOSS + BACKWARD,
}


def expected(name, *, loss_in="backward"):
    """Return the phases of a recipe, where the loss is computed in one of them."""
    found = {
        "data": DATA,
        "forward": FORWARD,
        "backward": BACKWARD,
        "algorithm": ALGORITHM[name],
        "optimizer": OPTIMIZER,
    }
    found[loss_in] += LOSS
    return found


def measure(train, name):
    with mock.patch.object(phases, "perf_counter", CLOCK):
        return phases.measure(train, WORKLOAD, RECIPES[name], steps=4)


def check_trainer(train, **where):
    """Check that a trainer's work is counted once and where it belongs, and that all takes time."""
    for recipe in RECIPES:
        assert measure(train, recipe) == pytest.approx(expected(recipe, **where), abs=1e-6), recipe
    found = phases.measure(train, WORKLOAD, RECIPES["full"], steps=4)
    assert list(found) == list(phases.PHASES)
    assert all(time > 0 for time in found.values()), found
