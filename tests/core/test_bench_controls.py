"""Negative controls: the tool gives the answers that are known."""

import itertools
import json
import math

import pytest
import torch
from torch import nn

from mosaic_core import Recipe, Run, plugins
from mosaic_core.bench import controls
from mosaic_core.bench.comparison import compare
from mosaic_core.bench.controls import Sleep
from mosaic_core.bench.plan import BASELINE, Arm, Plan
from mosaic_core.bench.runs import Record, Store
from mosaic_core.bench.turns import Turns
from mosaic_core.plain import train
from mosaic_core.training import Evaluation, History
from mosaic_core.workloads import WORKLOADS

DIGITS = next(w for w in WORKLOADS if w.name == "digits")
BEST = DIGITS.learning_rate / 2


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Load the controls as the command does, for as long as these tests run."""
    plugins.load(controls.__name__)
    yield
    plugins.manager().unregister(controls)


def test_they_are_no_part_of_the_catalogue():
    from mosaic_core import algorithms

    assert not hasattr(algorithms, "Sleep")
    plugins.load(controls.__name__)  # twice is once
    assert plugins.algorithms()["Sleep"] is Sleep


def test_sleep_waits_for_a_share_of_the_step(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(controls.time, "perf_counter", lambda: float(next(ticks)))
    model = nn.Linear(2, 2)
    run = Run([Sleep(0.5)], model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    spent = []
    for micro_batches in (1, 7):
        before = next(ticks)
        for _ in range(micro_batches):
            run.on_batch(torch.ones(3, 2), torch.zeros(3, dtype=torch.int64))
            for _ in range(9):
                next(ticks)  # what the step does
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        run.step()
        spent.append(next(ticks) - before)
    # From the first batch to the end: 10 ticks, and half of that; then 64, and half of that.
    assert [math.floor(ticks) for ticks in spent] == pytest.approx([17, 98], abs=3)


def test_a_negative_share_is_refused():
    with pytest.raises(ValueError, match=r"Sleep: share must be at least 0, got -0.1"):
        Sleep(-0.1)


class Simulated:
    """Runs whose times have a spread of 1 %, drawn anew for every run.

    Half the workload's own rate is the better one, a quarter is worse.
    """

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, jobs):
        for job in jobs:
            cost = 1.05 if "Sleep" in job.recipe else 1.0
            speed = 1 / (1 + abs(math.log(job.settings["learning_rate"] / BEST)))
            noise = torch.randn((), generator=self.generator, dtype=torch.float64)
            step = 0.01 * cost * math.exp(0.01 * float(noise))
            seed = 1 + 0.02 * math.sin(99.0 * job.seed)
            points = tuple(
                Evaluation(15 * e, e, 15 * e * step, 0.9 * (1 - math.exp(-speed * seed * e)))
                for e in range(1, job.epochs + 1)
            )
            yield Record.of(job, History(points, 1e3 * step, {}))


def test_the_tool_passes_them_in_simulation(tmp_path):
    results, trials = controls.run(
        DIGITS, "torch", Simulated(), Store(tmp_path), comparisons=60, epochs=4
    )
    assert {name: sum(r.findings.values()) for name, r in results.items()} == {
        "itself": 60,
        "sleeper": 30,
        "half the learning rate": 30,
    }
    assert all(result.passed for result in results.values())
    assert results["itself"].right >= 0.9
    assert results["sleeper"].speedups == pytest.approx([1 / 1.05] * 30, rel=0.02)
    best = max(trials, key=lambda trial: trial.accuracy).settings["learning_rate"]
    assert best != DIGITS.learning_rate
    data = json.loads(controls.to_json(results, trials, DIGITS, "torch", 4))
    assert data["controls"]["sleeper"]["findings"] == results["sleeper"].findings


def test_a_tool_that_is_wrong_does_not_pass(tmp_path):
    class Biased(Simulated):
        """The second of two runs that are alike is the faster one."""

        def __call__(self, jobs):
            for record in super().__call__(jobs):
                if not record.job.replica:
                    yield record
                    continue
                points = (
                    Evaluation(e.step, e.epoch, 0.9 * e.seconds, e.accuracy)
                    for e in record.evaluations
                )
                yield Record.of(record.job, History(tuple(points), record.ms_per_step, {}))

    results, _ = controls.run(DIGITS, "torch", Biased(), Store(tmp_path), comparisons=10, epochs=4)
    assert not results["itself"].passed


def test_on_real_runs_in_small(tmp_path):
    arms = {
        BASELINE: Arm(Recipe(), 3),
        "itself": Arm(Recipe(), 3),
        "sleeper": Arm(Recipe([Sleep(1.0)]), 3),
        "half": Arm(Recipe(), 3, {"learning_rate": DIGITS.learning_rate / 2}),
    }
    plan = Plan(DIGITS, "torch", arms, range(4), target=0.6)
    with Turns(DIGITS, train, turn=5, plugins=(controls.__name__,)) as turns:
        result = compare(plan, turns, Store(tmp_path))
    itself, sleeper = result.verdicts["itself"], result.verdicts["sleeper"]
    for verdict in (itself, sleeper):  # what they do to the weights: nothing
        assert verdict.steps.ratio.estimate == 1
        assert verdict.accuracy.gain.estimate == 0
    assert 0.8 < itself.seconds.ratio.estimate < 1.25
    assert sleeper.finding == "slower"
    assert 0.4 < sleeper.per_step < 0.7
    assert result.verdicts["half"].finding != "faster"
