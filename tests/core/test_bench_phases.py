"""Where the time of a step goes: every interval is booked once, and to the right phase."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import optimizer as optimizers

from mosaic_core import Algorithm, Run
from mosaic_core.algorithms import EMA, SAM, NoOp
from mosaic_core.algorithms._noop import NoOp as Base
from mosaic_core.bench import phases
from mosaic_core.bench.phases import PHASES, measure, watched
from mosaic_core.loop import train_steps
from mosaic_core.training import train
from mosaic_core.workloads import WORKLOADS

DIGITS = next(w for w in WORKLOADS if w.name == "digits")


class Clock:
    now = 0.0


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(phases.time, "perf_counter", lambda: clock.now)
    return clock


class Backward(torch.autograd.Function):
    """The identity, whose backward takes 5."""

    @staticmethod
    def forward(ctx, x, clock):
        ctx.clock = clock
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.clock.now += 5
        return gradient, None


class Net(nn.Module):
    """Its forward takes 3, and its backward 5."""

    def __init__(self, clock):
        super().__init__()
        self.layer, self.clock = nn.Linear(2, 2), clock

    def forward(self, x):
        self.clock.now += 3
        return Backward.apply(self.layer(x), self.clock)


class Slow(torch.optim.SGD):
    """A step takes 7."""

    def __init__(self, parameters, clock):
        super().__init__(parameters, lr=0.1)
        self.clock = clock

    def step(self, closure=None):
        self.clock.now += 7
        return super().step(closure)


def algorithm(clock) -> Algorithm:
    @dataclass(frozen=True)
    class Takes(Base):
        def on_batch(self, batch, run):
            clock.now += 11
            return batch

        def on_gradients(self, run):
            clock.now += 17

        def on_step_end(self, run):
            clock.now += 19

    return Takes()


def steps(clock, recipe, accumulate=1, clip=0.0):
    model = Net(clock)
    run = Run(recipe, model=model)

    def batches():
        for _ in range(3 * accumulate):
            clock.now += 13
            yield torch.ones(4, 2), torch.zeros(4, dtype=torch.int64)

    def loss(model, batch):
        clock.now += 1
        value = F.cross_entropy(model(batch[0]), batch[1])
        clock.now += 2
        return value

    with watched() as seen:
        run.start([Slow(model.parameters(), clock)], total_steps=3)
        began = clock.now
        train_steps(run, batches(), loss, accumulate=accumulate)
        elapsed = clock.now - began
        with torch.no_grad():
            model.eval()
            model(torch.ones(4, 2))  # an evaluation is booked nowhere
    assert sum(sum(step.values()) for step in seen) == elapsed
    return seen


def test_every_interval_is_booked_to_its_phase(clock):
    for step in steps(clock, [algorithm(clock)]):
        assert step == {
            "data": 13 + 1,
            "forward": 3,
            "backward": 2 + 5,
            "algorithm": 11 + 17 + 19,
            "optimizer": 7,
        }


def test_without_an_algorithm_it_takes_no_time(clock):
    assert {step["algorithm"] for step in steps(clock, [])} == {0}


def test_a_second_pass_is_the_algorithms(clock):
    for step in steps(clock, [SAM(), algorithm(clock)]):
        assert step["algorithm"] == (11 + 17 + 19) + (1 + 3 + 2 + 5)
        assert step["forward"] == 3


def test_micro_batches_add_up(clock):
    for step in steps(clock, [algorithm(clock)], accumulate=2):
        assert step["forward"] == 6
        assert step["algorithm"] == 2 * 11 + 17 + 19
        assert step["optimizer"] == 7


def test_nothing_is_left_behind(clock):
    before = {name: vars(Run)[name] for name in ("start", *phases._NEXT)}
    model = nn.Linear(2, 2)

    def fails():
        with watched():
            Run([], model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1))
            raise RuntimeError("of the user")

    with pytest.raises(RuntimeError, match="of the user"):
        fails()
    assert {name: vars(Run)[name] for name in before} == before
    assert not optimizers._global_optimizer_pre_hooks
    assert not optimizers._global_optimizer_post_hooks
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_training_tells_them_in_milliseconds():
    found = measure(lambda: train(DIGITS, [NoOp(), EMA("0.1dur")], epochs=1))
    assert tuple(found) == PHASES
    assert all(0 < value < 1e4 for value in found.values())
