"""One recipe, one seed, all trainers: how far the weights they end with lie apart.

Each trainer works in a process of its own, as the global state of one (process groups, seeds,
loggers) is none of the others' business.
"""

import itertools
import math
import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor

from mosaic_core.plain import PLAIN
from mosaic_core.recipe import Recipe
from mosaic_core.training import History, Update

if TYPE_CHECKING:
    from mosaic_core.adapter import Adapter
    from mosaic_core.workloads import Workload

__all__ = ["ARMS", "Agreement", "distance", "show", "train_all"]

ARMS = ("baseline", "recipe")


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Return the largest difference of one tensor between two models: ``|a - b| / |b|``, by norm.

    It is infinite where one of them is not a number.

    Raises:
        ValueError: If their names differ.
    """
    if a.keys() != b.keys():
        raise ValueError(f"distance: a and b must have the same names, got {a.keys() ^ b.keys()}")
    pairs = ((a[name].double(), b[name].double()) for name in b)
    apart = [float((x - y).norm() / y.norm().clamp_min(1e-12)) for x, y in pairs]
    return math.inf if any(map(math.isnan, apart)) else max(apart, default=0.0)


@dataclass(frozen=True)
class Agreement:
    """What every trainer made of the same task.

    Attributes:
        histories: By title of the trainer, then ``"baseline"`` and ``"recipe"``.
    """

    histories: dict[str, dict[str, History]]

    def apart(self, arm: str) -> tuple[float, str, str]:
        """Return the largest distance between two trainers in an arm, and who they are."""
        return max(
            (distance(self.histories[a][arm].weights, self.histories[b][arm].weights), a, b)
            for a, b in itertools.combinations(self.histories, 2)
        )


def train_all(
    adapters: Sequence["Adapter"],
    workload: "Workload",
    recipe: Recipe,
    *,
    seed: int,
    epochs: int,
    data_dir: Path | None,
    console: Console,
) -> Agreement:
    """Train a workload without and with a recipe in every trainer, showing progress.

    Args:
        adapters: The trainers; the plain loop is added as the one to compare with.
        workload: A registered workload.
        recipe: A recipe of registered algorithms.
        seed: Seed of weights, data order and algorithms.
        epochs: Length of each run.
        data_dir: Folder to look for the data first.
        console: Where to draw; bars in a terminal, a line for each trainer elsewhere.

    Raises:
        RuntimeError: If a trainer fails; its own message is in it.
    """
    workload.load(data_dir)  # so that missing data is told once, before anything is trained
    context = multiprocessing.get_context("spawn")
    histories: dict[str, dict[str, History]] = {}
    with Progress(
        TextColumn("{task.description:20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        console=console,
        disable=not console.is_terminal,
    ) as bars:
        for adapter in (PLAIN, *adapters):
            task = bars.add_task(adapter.title, total=None)
            ours, theirs = context.Pipe(duplex=False)
            arguments = (theirs, adapter, workload.name, recipe.to_yaml(), seed, epochs, data_dir)
            process = context.Process(target=_child, args=arguments, daemon=True)
            process.start()
            theirs.close()
            found: dict[str, History] = {}
            while len(found) < len(ARMS):
                try:
                    arm, value = ours.recv()
                except EOFError:
                    raise RuntimeError(f"mosaic: {adapter.title} ended without a result") from None
                if isinstance(value, Update):
                    done = (arm == ARMS[1]) * value.total_steps + value.step
                    bars.update(task, completed=done, total=len(ARMS) * value.total_steps)
                elif isinstance(value, History):
                    found[arm] = value
                else:
                    raise RuntimeError(f"mosaic: {adapter.title} failed: {value}")
            process.join()
            histories[adapter.title] = found
            if not console.is_terminal:
                accuracy = 100 * found["recipe"].final_accuracy
                console.print(f"{adapter.title}: {accuracy:.1f} %", highlight=False)
    return Agreement(histories)


def _child(
    parent: Connection,
    adapter: "Adapter",
    workload: str,
    recipe: str,
    seed: int,
    epochs: int,
    data_dir: Path | None,
) -> None:
    """Train both arms with one trainer and send what happens."""
    from mosaic_core import plugins

    task = plugins.workload(workload)
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        for arm, composed in zip(ARMS, (Recipe(), Recipe.from_yaml(recipe)), strict=True):
            history = adapter.load("trainer")(
                task,
                composed,
                seed=seed,
                epochs=epochs,
                data_dir=data_dir,
                report=lambda update, arm=arm: parent.send((arm, update)),
            )
            parent.send((arm, history))
    except Exception as error:
        parent.send(("", f"{type(error).__name__}: {error}"))
        raise


def show(agreement: Agreement, console: Console) -> None:
    """Print a row for each trainer, and the largest distance between any two of them."""
    table = Table("", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in (
        "baseline\naccuracy %",
        "recipe\naccuracy %",
        "baseline\nms/step",
        "recipe\nms/step",
        "weights from\nplain PyTorch's",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    plain = agreement.histories[PLAIN.title]
    for title, arms in agreement.histories.items():
        apart = max(distance(arms[arm].weights, plain[arm].weights) for arm in ARMS)
        table.add_row(
            title,
            *(f"{100 * arms[arm].final_accuracy:.1f}" for arm in ARMS),
            *(f"{arms[arm].ms_per_step:.1f}" for arm in ARMS),
            "-" if title == PLAIN.title else _scientific(apart),
        )
    console.print(table)
    console.print("Largest relative difference of a weight tensor between any two trainers:")
    for arm in ARMS:
        apart, a, b = agreement.apart(arm)
        who = f" ({a} and {b})" if apart else ""
        console.print(f"  {arm}: {_scientific(apart)}{who}", highlight=False)


def _scientific(value: float) -> str:
    return f"{value:.1e}" if value else "0"
