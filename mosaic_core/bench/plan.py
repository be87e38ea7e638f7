"""What a comparison compares: arms, seeds and the target."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mosaic_core.bench.runs import Job
from mosaic_core.recipe import Recipe
from mosaic_core.workloads import Workload

__all__ = ["BASELINE", "Arm", "Plan", "ablation"]

BASELINE = "baseline"


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        recipe: Its algorithms.
        epochs: Length of its runs; the schedule decays over all of it.
        settings: What its runs change of the workload's settings, such as a tuned learning rate.
    """

    recipe: Recipe
    epochs: int
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        workload: What is trained.
        trainer: Name of the adapter, or ``torch``.
        arms: By name; the first is the baseline.
        seeds: Seeds, the same for all arms.
        target: Accuracy to reach, in (0, 1]; None for the median of the baseline's final ones.
        delta: Loss of the final accuracy that does not matter.
    """

    workload: Workload
    trainer: str
    arms: Mapping[str, Arm]
    seeds: Sequence[int]
    target: float | None = None
    delta: float = 0.005

    def __post_init__(self) -> None:
        """Check that there is something to compare."""
        if len(self.arms) < 2:
            raise ValueError("Plan: arms must be a baseline and at least one more, got less")
        if not len(self.seeds):
            raise ValueError("Plan: seeds must hold at least one, got none")
        if self.target is not None and not 0 < self.target <= 1:
            raise ValueError(f"Plan: target must be in (0, 1], got {self.target}")

    @property
    def baseline(self) -> str:
        """Name of the first arm."""
        return next(iter(self.arms))

    def jobs(self, seed: int) -> dict[str, Job]:
        """Return the runs of all arms on one seed; arms that are alike are replicas."""
        jobs: dict[str, Job] = {}
        for name, arm in self.arms.items():
            job = Job(
                workload=self.workload.name,
                trainer=self.trainer,
                recipe=arm.recipe.to_yaml(),
                seed=seed,
                epochs=arm.epochs,
                settings={**self.workload.settings, **arm.settings},
            )
            alike = sum(dataclasses.replace(other, replica=0) == job for other in jobs.values())
            jobs[name] = dataclasses.replace(job, replica=alike)
        return jobs


def ablation(recipe: Recipe) -> dict[str, Recipe]:
    """Return each algorithm of a recipe alone, as ``"+MixUp"``, and all but it, as ``"-MixUp"``.

    Of two algorithms each would stand twice, so there only the first half is returned.

    Raises:
        ValueError: If the recipe has less than two algorithms.
    """
    if len(recipe) < 2:
        raise ValueError(f"ablation: recipe must have at least two algorithms, got {len(recipe)}")
    alone = {f"+{algorithm.name}": Recipe([algorithm]) for algorithm in recipe}
    if len(recipe) == 2:
        return alone
    without = {
        f"-{algorithm.name}": Recipe([other for other in recipe if other is not algorithm])
        for algorithm in recipe
    }
    return alone | without
