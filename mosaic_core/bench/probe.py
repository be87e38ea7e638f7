"""What is measured of a recipe beside its runs, in short trainings that also warm it up."""

import warnings
from dataclasses import dataclass
from pathlib import Path

from mosaic_core.bench.memory import peak_memory
from mosaic_core.bench.phases import measure
from mosaic_core.recipe import Recipe
from mosaic_core.training import Train
from mosaic_core.workloads import Workload

__all__ = ["Probe", "probe"]

_STEPS = 20  # of the training that shows the memory, unless it has more epochs


@dataclass(frozen=True)
class Probe:
    """What short trainings of a recipe show.

    Attributes:
        memory: Bytes that the tensors take at most.
        phases: Median time of each phase of a step, in milliseconds.
    """

    memory: int
    phases: dict[str, float]


def probe(
    train: Train,
    workload: Workload,
    recipe: Recipe,
    *,
    epochs: int,
    data_dir: Path | None = None,
) -> Probe:
    """Train a workload twice, for as many epochs as its runs have, of few steps each.

    So an algorithm acts in it that acts in a part of the run, or at the end of an epoch. One that
    is refused in so few steps, as it acts every so many, gets more of them.

    Args:
        train: Trains it with some trainer.
        workload: What is trained.
        recipe: The algorithms.
        epochs: Length of the runs.
        data_dir: Folder to look for the data first.

    Raises:
        ValueError: If the recipe is refused in a whole run too.
    """
    whole = epochs * (len(workload.load(data_dir).train_inputs) // workload.batch_size)
    steps = _STEPS
    while True:
        try:
            return _trained(train, workload, recipe, epochs, steps, data_dir)
        except ValueError:
            if steps >= whole:
                raise
            steps = min(4 * steps, whole)


def _trained(
    train: Train, workload: Workload, recipe: Recipe, epochs: int, steps: int, data_dir: Path | None
) -> Probe:
    short = workload.shortened(max(1, steps // epochs), data_dir)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of how short these trainings are
        memory = peak_memory(lambda: train(short, recipe, epochs=epochs))
        phases = measure(train, workload, recipe, epochs=epochs, steps=steps, data_dir=data_dir)
    return Probe(memory, phases)
