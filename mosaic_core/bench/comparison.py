"""Recipes against a baseline on the same seeds: which runs it takes, and what they show.

The same seed gives all arms the same initial weights, data order and evaluation points. The target
is fixed by the baseline alone, before a recipe is trained.
"""

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mosaic_core.bench.censoring import Outcome, auto_target, time_to_target
from mosaic_core.bench.runs import SCHEMA, Job, Record, Store, execute
from mosaic_core.bench.verdict import Verdict, judge_all
from mosaic_core.recipe import Recipe
from mosaic_core.training import Train, Update
from mosaic_core.workloads import Workload

__all__ = ["BASELINE", "Comparison", "Plan", "compare"]

BASELINE = "baseline"


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        workload: What is trained.
        trainer: Name of the adapter, or ``torch``.
        recipes: The arms by name, the first of which is the baseline.
        seeds: Seeds, the same for all arms.
        epochs: Length of every run; the schedule decays over all of it.
        target: Accuracy to reach, in [0, 1]; None for the median of the baseline's final ones.
        delta: Loss of the final accuracy that does not matter.
    """

    workload: Workload
    trainer: str
    recipes: Mapping[str, Recipe]
    seeds: Sequence[int]
    epochs: int
    target: float | None = None
    delta: float = 0.005

    def __post_init__(self) -> None:
        """Check that there is something to compare."""
        if len(self.recipes) < 2:
            raise ValueError("Plan: recipes must be a baseline and at least one more, got less")
        if not len(self.seeds):
            raise ValueError("Plan: seeds must hold at least one, got none")
        if self.target is not None and not 0 < self.target <= 1:
            raise ValueError(f"Plan: target must be in (0, 1], got {self.target}")

    def job(self, arm: str, seed: int) -> Job:
        """Return one run."""
        recipe, rate = self.recipes[arm].to_yaml(), self.workload.learning_rate
        return Job(self.workload.name, self.trainer, recipe, seed, self.epochs, rate)

    def order(self) -> list[tuple[str, int]]:
        """Return arm and seed of all runs in their order.

        Arms alternate back and forth, so that a drift of the machine favours none of them.
        """
        arms = list(self.recipes)
        turns = itertools.cycle([arms, arms[::-1]])
        return [(arm, seed) for seed, turn in zip(self.seeds, turns, strict=False) for arm in turn]


@dataclass(frozen=True)
class Comparison:
    """What the runs show.

    Attributes:
        plan: What was compared.
        records: Runs by arm, in the order of the seeds.
        target: Accuracy to reach.
        verdicts: By arm, without the baseline; those of several are corrected for that.
    """

    plan: Plan
    records: Mapping[str, Sequence[Record]]
    target: float
    verdicts: Mapping[str, Verdict]

    def final(self, arm: str) -> list[float]:
        """Return the final accuracies of an arm."""
        return [record.final_accuracy for record in self.records[arm]]

    def ms_per_step(self, arm: str) -> float:
        """Return the median time of a step, in milliseconds."""
        return statistics.median(record.ms_per_step for record in self.records[arm])

    def to_json(self) -> str:
        """Return all figures and the names of the files they come from; infinity is null."""
        arms = {
            arm: {
                "recipe": self.plan.recipes[arm].to_yaml(),
                "final_accuracy": self.final(arm),
                "ms_per_step": self.ms_per_step(arm),
                "runs": [record.job.file for record in self.records[arm]],
                **({"verdict": self._verdict(arm)} if arm in self.verdicts else {}),
            }
            for arm in self.plan.recipes
        }
        data = {
            "schema": SCHEMA,
            "workload": self.plan.workload.name,
            "trainer": self.plan.trainer,
            "epochs": self.plan.epochs,
            "seeds": list(self.plan.seeds),
            "target": self.target,
            "delta": self.plan.delta,
            "environment": dict(self.records[next(iter(self.records))][0].environment),
            "arms": arms,
        }
        return json.dumps(_finite(data), indent=1, allow_nan=False) + "\n"

    def _verdict(self, arm: str) -> dict[str, Any]:
        return {"text": str(self.verdicts[arm]), **asdict(self.verdicts[arm])}

    def to_markdown(self) -> str:
        """Return a table of the arms, and a line for what each recipe shows."""
        seeds = len(self.plan.seeds)
        lines = [
            f"# {self.plan.workload.name} with {self.plan.trainer}",
            "",
            f"Target {self.target:.1%}, {self.plan.epochs} epochs, {seeds} seeds.",
            "",
            "| Arm | Final accuracy | ms/step |",
            "| --- | --- | --- |",
        ]
        for arm in self.plan.recipes:
            spread = f" ± {statistics.stdev(self.final(arm)):.1%}" if seeds > 1 else ""
            final = f"{statistics.mean(self.final(arm)):.1%}{spread}"
            lines.append(f"| {arm} | {final} | {self.ms_per_step(arm):.1f} |")
        lines += ["", *(f"- {arm}: {verdict}" for arm, verdict in self.verdicts.items())]
        return "\n".join(lines) + "\n"


def compare(
    plan: Plan,
    train: Train,
    folder: Path,
    *,
    data_dir: Path | None = None,
    report: Callable[[str, Job, Update], None] | None = None,
) -> Comparison:
    """Do the runs of a plan that are not done yet, judge them and write the summary.

    Args:
        plan: What is compared.
        train: Trains the workload with the plan's trainer.
        folder: Where the runs are, and where ``summary.json`` and ``summary.md`` are written.
        data_dir: Folder to look for the data first.
        report: Called with the arm after every step and evaluation of a run that is done now.
    """
    records: dict[str, list[Record]] = {arm: [] for arm in plan.recipes}
    for arm, record in _records(plan, train, Store(folder / "runs"), data_dir, report):
        records[arm].append(record)
    baseline = next(iter(plan.recipes))
    target = plan.target
    if target is None:
        target = auto_target([record.final_accuracy for record in records[baseline]])
    outcomes = {arm: [_outcome(record, target) for record in records[arm]] for arm in records}
    verdicts = judge_all(outcomes.pop(baseline), outcomes, target=f"{target:.1%}", delta=plan.delta)
    comparison = Comparison(plan, records, target, verdicts)
    (folder / "summary.json").write_text(comparison.to_json(), encoding="utf-8")
    (folder / "summary.md").write_text(comparison.to_markdown(), encoding="utf-8")
    return comparison


def _records(
    plan: Plan,
    train: Train,
    store: Store,
    data_dir: Path | None,
    report: Callable[[str, Job, Update], None] | None,
) -> Iterator[tuple[str, Record]]:
    order = plan.order()
    arms = {plan.job(arm, seed): arm for arm, seed in order}
    runs = execute(
        [plan.job(arm, seed) for arm, seed in order],
        train,
        plan.workload,
        store,
        data_dir=data_dir,
        report=None if report is None else lambda job, update: report(arms[job], job, update),
    )
    for (arm, _), record in zip(order, runs, strict=True):
        yield arm, record


def _outcome(record: Record, target: float) -> Outcome:
    points = record.evaluations
    return time_to_target(
        [point.seconds for point in points],
        [point.step for point in points],
        [point.accuracy for point in points],
        target,
    )


def _finite(value: Any) -> Any:
    """Return a copy in which what JSON has no number for is None."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
