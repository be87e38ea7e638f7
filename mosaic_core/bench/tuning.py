"""Tuning: the same number of trials for every arm, on seeds that no comparison uses."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.quasirandom import SobolEngine

from mosaic_core.bench.plan import Plan
from mosaic_core.bench.runs import Record, Runner, Store, complete

__all__ = ["SEEDS", "TUNING_SEED", "Trial", "points", "tune"]

TUNING_SEED = 1_000_000
"""First seed of all trials; comparisons count theirs from 0."""

SEEDS = 3
"""Seeds of a trial, unless told otherwise: of one alone, the luckiest point would win."""


@dataclass(frozen=True)
class Trial:
    """What one point gave an arm.

    Attributes:
        settings: The point.
        accuracy: Mean of the final accuracies.
        seeds: How many runs that is the mean of.
    """

    settings: Mapping[str, Any]
    accuracy: float
    seeds: int


def points(space: Mapping[str, tuple[float, float]], count: int) -> list[dict[str, float]]:
    """Return quasi-random points, uniform on a logarithmic scale: a scrambled Sobol sequence.

    A longer sequence begins with a shorter one.

    Args:
        space: Lowest and highest value of each setting, both positive.
        count: Number of points.

    Returns:
        Settings by name, rounded to three digits.

    Raises:
        ValueError: If a range is empty or not positive.

    References:
        Owen, `Randomly permuted (t,m,s)-nets and (t,s)-sequences
        <https://doi.org/10.1007/978-1-4612-2552-2_19>`_, 1995.
    """
    for name, (low, high) in space.items():
        if not 0 < low < high < math.inf:
            raise ValueError(f"points: {name} must range from above 0 upwards, got {low} to {high}")
    unit = SobolEngine(len(space), scramble=True, seed=0).draw(count).tolist()
    return [
        {
            name: float(f"{low * (high / low) ** u:.3g}")
            for (name, (low, high)), u in zip(space.items(), row, strict=True)
        }
        for row in unit
    ]


def tune(
    plan: Plan,
    count: int,
    runner: Runner,
    store: Store,
    *,
    seeds: int = SEEDS,
    shared: bool = False,
    done: Callable[[Record], None] | None = None,
) -> tuple[Plan, dict[str, list[Trial]]]:
    """Give every arm the settings that were best for it in the same trials.

    Args:
        plan: What is compared.
        count: Trials beside the workload's own settings, at points of its search space.
        runner: Does the runs.
        store: Where they are.
        seeds: Runs of each trial, at least 1.
        shared: Whether only the baseline has trials, and its settings go to all arms: one that
            needs others is then at a disadvantage.
        done: Called with every record.

    Returns:
        The plan with tuned settings, and the trials of each arm; the best is the one of the
        highest mean accuracy, the first of several.

    Raises:
        ValueError: If ``count`` is below 5, which tell too little, or ``seeds`` below 1.
    """
    if count < 5:
        raise ValueError(f"tune: count must be at least 5, got {count}")
    if seeds < 1:
        raise ValueError(f"tune: seeds must be at least 1, got {seeds}")
    names = [plan.baseline] if shared else list(plan.arms)
    trials: dict[str, list[Trial]] = {name: [] for name in names}
    settings: list[dict[str, float]] = [{}, *points(plan.workload.search_space, count)]
    for point in settings:
        arms = {
            name: dataclasses.replace(arm, settings={**arm.settings, **point})
            for name, arm in plan.arms.items()
        }
        finals: dict[str, list[float]] = {name: [] for name in names}
        for seed in range(TUNING_SEED, TUNING_SEED + seeds):
            jobs = dataclasses.replace(plan, arms=arms).jobs(seed)
            records = complete([jobs[name] for name in names], runner, store, done)
            for name, record in zip(names, records, strict=True):
                finals[name].append(record.final_accuracy)
        for name, of in finals.items():
            trials[name].append(Trial(point, statistics.fmean(of), seeds))
    best = {name: max(of, key=lambda trial: trial.accuracy).settings for name, of in trials.items()}
    arms = {
        name: dataclasses.replace(
            arm, settings={**arm.settings, **best[plan.baseline if shared else name]}
        )
        for name, arm in plan.arms.items()
    }
    return dataclasses.replace(plan, arms=arms), trials
