"""What is measured of a recipe beside its runs, in short trainings that also warm it up."""

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path

from mosaic_core.bench.memory import peak_memory
from mosaic_core.bench.phases import measure
from mosaic_core.datasets import Data
from mosaic_core.recipe import Recipe
from mosaic_core.training import Train
from mosaic_core.workloads import Workload

__all__ = ["Probe", "probe", "shortened"]

_STEPS = 20  # of a short training, unless it has more epochs


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

    So an algorithm acts in it that acts in a part of the run, or at the end of an epoch.

    Args:
        train: Trains it with some trainer.
        workload: What is trained.
        recipe: The algorithms.
        epochs: Length of the runs.
        data_dir: Folder to look for the data first.
    """
    short = shortened(workload, data_dir, max(1, _STEPS // epochs))

    def run() -> None:
        train(short, recipe, epochs=epochs)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of how short these trainings are
        return Probe(peak_memory(run), measure(run))


def shortened(workload: Workload, data_dir: Path | None, steps: int) -> Workload:
    """Return the workload with data for some steps an epoch.

    Args:
        workload: What is trained.
        data_dir: Folder to look for the data first.
        steps: Optimizer steps of an epoch; if the data has fewer, these.
    """
    data = workload.load(data_dir)
    train, evaluation = steps * workload.batch_size, workload.batch_size
    few = Data(
        data.train_inputs[:train],
        data.train_labels[:train],
        data.eval_inputs[:evaluation],
        data.eval_labels[:evaluation],
    )
    return dataclasses.replace(workload, load=lambda data_dir: few, evaluations=1)
