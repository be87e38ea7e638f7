"""Negative controls: comparisons of which the answer is known, so that they test the tool.

- A recipe against itself: 1 must lie in the interval, but for one time in twenty.
- An algorithm that waits for 5 % of each step: it must be found slower.
- Half the learning rate, which mosaic takes no part in: it must not be found faster than the rate
  that tuning found. An untuned baseline may well be slower than half its rate, and the tool right.

This module is a plugin, which the processes of the runs load.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from mosaic_core.algorithm import Algorithm, Card, Place
from mosaic_core.batch import Batch
from mosaic_core.bench.comparison import compare
from mosaic_core.bench.plan import BASELINE, Arm, Plan
from mosaic_core.bench.runs import Record, Runner, Store, complete, environment
from mosaic_core.bench.tuning import Trial, tune
from mosaic_core.plugins import hookimpl
from mosaic_core.recipe import Recipe
from mosaic_core.workloads import Workload

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = [
    "Control",
    "Result",
    "Sleep",
    "controls",
    "mosaic_algorithms",
    "run",
    "runs_of",
    "seeds_of",
    "to_json",
]

_FEWEST, _MOST = 6, 12  # seeds of one comparison
_TRIALS, _TUNING_SEEDS = 8, 8  # accuracies differ less between rates than between seeds


@dataclass
class _State:
    began: float | None = None


@dataclass(frozen=True)
class Sleep(Algorithm):
    """Do nothing for a share of the time that a step takes from its first batch to its end.

    Args:
        share: Of the step, at least 0.
    """

    share: float = 0.05

    place = Place.MEASURING
    card = Card(
        category="any",
        summary="Waits for a share of each step.",
        effect="Makes a step longer, and nothing else.",
        use_when="As a control: a comparison must find it slower.",
        interactions="None.",
        reference="-",
        url="",
    )

    def __post_init__(self) -> None:
        """Check the share."""
        if not self.share >= 0:
            raise ValueError(f"Sleep: share must be at least 0, got {self.share}")

    def init_state(self, run: "Run") -> _State:
        """Return a clock."""
        return _State()

    def on_batch(self, batch: Batch, run: "Run") -> Batch:
        """Note when the step begins."""
        state: _State = run.state(self)
        if state.began is None:
            state.began = time.perf_counter()
        return batch

    def on_step_end(self, run: "Run") -> None:
        """Wait; in a loop, as the clock of sleep() is too coarse for a step of milliseconds."""
        state: _State = run.state(self)
        if state.began is None:
            return
        now = time.perf_counter()
        end, state.began = now + self.share * (now - state.began), None
        while time.perf_counter() < end:
            pass


@hookimpl
def mosaic_algorithms() -> Sequence[type[Algorithm]]:
    """Return the algorithm that only controls use."""
    return [Sleep]


@dataclass(frozen=True)
class Control:
    """What a comparison with the baseline must show.

    Attributes:
        arm: Its arm.
        seeds: Seeds of one comparison.
        answers: The findings that are right.
        least: Share of the comparisons that must give one of them.
    """

    arm: Arm
    seeds: int
    answers: frozenset[str]
    least: float


@dataclass(frozen=True)
class Result:
    """What a control showed.

    Attributes:
        seeds: Seeds of one comparison.
        findings: How many comparisons found what.
        right: Share of the comparisons with a right finding.
        least: What it must be at least.
        speedups: That of each comparison, in seconds.
    """

    seeds: int
    findings: Mapping[str, int]
    right: float
    least: float
    speedups: Sequence[float]

    @property
    def passed(self) -> bool:
        """Whether the tool gave the right answers often enough."""
        return self.right >= self.least


def controls(baseline: Arm, learning_rate: float) -> dict[str, Control]:
    """Return the controls by name.

    Args:
        baseline: What each is compared with, tuned.
        learning_rate: Its learning rate.
    """
    half = {**baseline.settings, "learning_rate": learning_rate / 2}
    sleeper = replace(baseline, recipe=Recipe([Sleep()]))
    return {
        "itself": Control(baseline, _FEWEST, frozenset({"cannot tell"}), 0.9),
        "sleeper": Control(sleeper, _MOST, frozenset({"slower"}), 0.8),
        "half the learning rate": Control(
            replace(baseline, settings=half),
            _MOST,
            frozenset({"cannot tell", "less accurate", "slower"}),
            0.9,
        ),
    }


def run(
    workload: Workload,
    trainer: str,
    runner: Runner,
    store: Store,
    *,
    comparisons: int,
    epochs: int,
    done: Callable[[Record], None] | None = None,
) -> tuple[dict[str, Result], list[Trial]]:
    """Tune the baseline and make each control's comparisons, no two of which share a seed.

    Args:
        workload: What is trained.
        trainer: Name of the adapter, or ``torch``.
        runner: Does the runs.
        store: Where they are.
        comparisons: Number of comparisons of the control that has the fewest seeds in each; the
            others make as many as these seeds are enough for, at least one.
        epochs: Length of a run.
        done: Called with every record.

    Returns:
        What each control showed, and what tuning tried.
    """
    untuned = Arm(Recipe(), epochs)
    plan = Plan(workload, trainer, {BASELINE: untuned, "itself": untuned}, range(1))
    plan, trials = tune(plan, _TRIALS, runner, store, seeds=_TUNING_SEEDS, shared=True, done=done)
    baseline = plan.arms[BASELINE]
    known = controls(baseline, baseline.settings.get("learning_rate", workload.learning_rate))
    every = {BASELINE: baseline, **{name: control.arm for name, control in known.items()}}
    seeds = range(seeds_of(comparisons))
    for seed in seeds:  # all arms together, so that they take turns
        complete(
            list(Plan(workload, trainer, every, seeds).jobs(seed).values()), runner, store, done
        )
    results = {}
    for name, control in known.items():
        verdicts = []
        for first in range(0, len(seeds) - control.seeds + 1, control.seeds):
            arms = {BASELINE: baseline, name: control.arm}
            plan = Plan(workload, trainer, arms, seeds[first : first + control.seeds])
            verdicts.append(compare(plan, runner, store).verdicts[name])
        found = Counter(str(verdict.finding) for verdict in verdicts)
        right = sum(found[answer] for answer in control.answers) / len(verdicts)
        speedups = [verdict.seconds.ratio.estimate for verdict in verdicts]
        results[name] = Result(control.seeds, dict(found), right, control.least, speedups)
    return results, trials[BASELINE]


def seeds_of(comparisons: int) -> int:
    """Return how many seeds the comparisons of :func:`run` take."""
    return max(_FEWEST * comparisons, _MOST)


def runs_of(comparisons: int) -> int:
    """Return how many runs :func:`run` takes: of tuning, and four on each seed."""
    return (_TRIALS + 1) * _TUNING_SEEDS + 4 * seeds_of(comparisons)


def to_json(
    results: Mapping[str, Result],
    trials: Sequence[Trial],
    workload: Workload,
    trainer: str,
    epochs: int,
) -> str:
    """Return what the controls showed, and where."""
    data = {
        "workload": workload.name,
        "trainer": trainer,
        "epochs": epochs,
        "environment": environment(),
        "trials": [asdict(trial) for trial in trials],
        "controls": {name: asdict(result) for name, result in results.items()},
    }
    return json.dumps(data, indent=1) + "\n"
