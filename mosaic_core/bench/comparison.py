"""Recipes against a baseline on the same seeds: the runs, and what they show.

The same seed gives all arms the same initial weights, data order and evaluation points. The target
depends on the baseline alone.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from mosaic_core.bench.censoring import Outcome, auto_target, time_to_target
from mosaic_core.bench.plan import Plan
from mosaic_core.bench.runs import Record, Runner, Store, complete
from mosaic_core.bench.tuning import SEEDS, Trial, tune
from mosaic_core.bench.verdict import Verdict, judge_all

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    """What the runs show.

    Attributes:
        plan: What was compared, with the settings that tuning found.
        records: Runs by arm, in the order of the seeds.
        target: Accuracy to reach.
        verdicts: By arm, without the baseline; those of several are corrected for that.
        trials: What tuning tried, by arm; empty without tuning.
    """

    plan: Plan
    records: Mapping[str, Sequence[Record]]
    target: float
    verdicts: Mapping[str, Verdict]
    trials: Mapping[str, Sequence[Trial]] = field(default_factory=dict)

    def final(self, arm: str) -> list[float]:
        """Return the final accuracies of an arm."""
        return [record.final_accuracy for record in self.records[arm]]

    def ms_per_step(self, arm: str) -> float:
        """Return the median time of a step, in milliseconds."""
        return statistics.median(record.ms_per_step for record in self.records[arm])

    def outcomes(self, arm: str) -> list[Outcome]:
        """Return the time to target of each run of an arm."""
        return [_outcome(record, self.target) for record in self.records[arm]]

    def in_turns(self, arm: str) -> int:
        """Return how many runs took turns with the baseline's run on the same seed."""
        pairs = zip(self.records[self.plan.baseline], self.records[arm], strict=True)
        return sum(theirs.job.file in ours.turns for theirs, ours in pairs)


def compare(
    plan: Plan,
    runner: Runner,
    store: Store,
    *,
    trials: int = 0,
    tuning_seeds: int = SEEDS,
    shared: bool = False,
    done: Callable[[Record], None] | None = None,
) -> Comparison:
    """Tune, do the runs of a plan that are not done yet, and judge them.

    Args:
        plan: What is compared.
        runner: Does the runs of all arms on one seed.
        store: Where the runs are.
        trials: Points that every arm is tuned with first; 0 for no tuning.
        tuning_seeds: Runs of each of them.
        shared: Whether only the baseline is tuned, and its settings go to all arms.
        done: Called with every record, of a run that was done before as of one done now.
    """
    tried: dict[str, list[Trial]] = {}
    if trials:
        plan, tried = tune(
            plan, trials, runner, store, seeds=tuning_seeds, shared=shared, done=done
        )
    records: dict[str, list[Record]] = {arm: [] for arm in plan.arms}
    for seed in plan.seeds:
        jobs = plan.jobs(seed)
        found = complete(list(jobs.values()), runner, store, done)
        for arm, record in zip(jobs, found, strict=True):
            records[arm].append(record)
    target = plan.target
    if target is None:
        target = auto_target([record.final_accuracy for record in records[plan.baseline]])
    outcomes = {arm: [_outcome(record, target) for record in records[arm]] for arm in records}
    verdicts = judge_all(
        outcomes.pop(plan.baseline), outcomes, target=f"{target:.1%}", delta=plan.delta
    )
    return Comparison(plan, records, target, verdicts, tried)


def _outcome(record: Record, target: float) -> Outcome:
    points = record.evaluations
    return time_to_target(
        [point.seconds for point in points],
        [point.step for point in points],
        [point.accuracy for point in points],
        target,
    )
