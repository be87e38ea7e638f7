"""What is measured of a recipe beside its runs, in short trainings that also warm it up."""

import functools
import warnings
from dataclasses import dataclass
from pathlib import Path

from mosaic_core.bench.memory import peak_memory, shortened
from mosaic_core.bench.phases import measure
from mosaic_core.recipe import Recipe
from mosaic_core.training import Train
from mosaic_core.workloads import Workload

__all__ = ["Probe", "probe"]


@dataclass(frozen=True)
class Probe:
    """What short trainings of a recipe show.

    Attributes:
        memory: Bytes that the tensors take at most, in a training of three steps.
        phases: Median time of each phase of a step, in milliseconds.
    """

    memory: int
    phases: dict[str, float]


def probe(
    train: Train, workload: Workload, recipe: Recipe, *, data_dir: Path | None = None
) -> Probe:
    """Train a workload for some steps, twice.

    Args:
        train: Trains it with some trainer.
        workload: What is trained.
        recipe: The algorithms.
        data_dir: Folder to look for the data first.
    """
    short = shortened(workload, data_dir, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of how short these trainings are
        memory = peak_memory(functools.partial(train, short, recipe, epochs=1))
        return Probe(memory, measure(train, workload, recipe, data_dir=data_dir))
