"""The demo: a workload trained with and without a recipe, on the same seeds, side by side."""

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from mosaic_core.bench.memory import peak_memory
from mosaic_core.datasets import MissingError
from mosaic_core.recipe import Recipe
from mosaic_core.training import Evaluation, History, Train, Update, mean_curve
from mosaic_core.workloads import Workload

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Arm", "Comparison", "check_output", "compare", "notes", "plot", "show"]


@dataclass(frozen=True)
class Arm:
    """What one side of the comparison gave.

    Attributes:
        histories: One for each seed.
        memory: Bytes that the tensors of a run take at most, in a short training.
    """

    histories: tuple[History, ...]
    memory: int

    @property
    def mean(self) -> list[Evaluation]:
        """The evaluations, averaged over the seeds."""
        return mean_curve(history.evaluations for history in self.histories)

    @property
    def ms_per_step(self) -> float:
        """Median over the seeds."""
        return statistics.median(h.ms_per_step for h in self.histories)

    def reached(self, accuracy: float) -> Evaluation | None:
        """Return the first evaluation at which the mean over the seeds is at least this."""
        return next((e for e in self.mean if e.accuracy >= accuracy), None)


@dataclass(frozen=True)
class Comparison:
    """Both sides of the comparison."""

    baseline: Arm
    recipe: Arm

    @property
    def target(self) -> float:
        """The baseline's accuracy: of its final weights, averaged over the seeds."""
        return self.baseline.mean[-1].accuracy

    @property
    def gains(self) -> list[float]:
        """What the recipe adds to the final accuracy, for each seed."""
        pairs = zip(self.recipe.histories, self.baseline.histories, strict=True)
        return [ours.final_accuracy - theirs.final_accuracy for ours, theirs in pairs]


def compare(
    train: Train,
    workload: Workload,
    recipe: Recipe,
    *,
    seeds: Sequence[int],
    epochs: int,
    data_dir: Path | None,
    console: Console,
) -> Comparison:
    """Train the workload with and without the recipe, showing progress.

    Args:
        train: Trains it with some trainer.
        workload: What to train.
        recipe: What to compare with no recipe.
        seeds: Seeds of weights, data order and algorithms, the same for both sides.
        epochs: Length of each run.
        data_dir: Folder to look for the data first.
        console: Where to draw; bars in a terminal, a line for each run elsewhere.
    """
    if workload.threads is not None:
        torch.set_num_threads(workload.threads)
    recipes = {"baseline": Recipe(), "recipe": recipe}
    histories: dict[str, list[History]] = {name: [] for name in recipes}
    # A step of each epoch first: they count the memory, and pay for what only a first run pays.
    with console.status("warming up"):
        short = workload.shortened(1, data_dir)
        memory = {
            name: peak_memory(functools.partial(train, short, r, epochs=epochs))
            for name, r in recipes.items()
        }
    with Progress(
        TextColumn("{task.description:9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TextColumn("{task.fields[accuracy]}"),
        console=console,
        disable=not console.is_terminal,
    ) as bars:
        tasks = {name: bars.add_task(name, start=False, accuracy="") for name in recipes}

        def report(task: TaskID, runs_before: int, update: Update) -> None:
            total, before = len(seeds) * update.total_steps, runs_before * update.total_steps
            bars.update(task, completed=before + update.step, total=total)
            if update.evaluation is not None:
                bars.update(task, accuracy=f"accuracy {_percent(update.evaluation.accuracy)}")

        for n, seed in enumerate(seeds):
            # Back and forth, so that a drift of the machine does not favour one side.
            for name in recipes if n % 2 == 0 else reversed(recipes):
                task = tasks[name]
                bars.start_task(task)
                history = train(
                    workload,
                    recipes[name],
                    seed=seed,
                    epochs=epochs,
                    data_dir=data_dir,
                    report=functools.partial(report, task, n),
                )
                histories[name].append(history)
                if not console.is_terminal:
                    accuracy = _percent(history.final_accuracy)
                    seconds = history.evaluations[-1].seconds
                    console.print(f"{name}, seed {seed}: {accuracy} after {seconds:.1f} s")
    arms = {name: Arm(tuple(histories[name]), memory[name]) for name in recipes}
    return Comparison(**arms)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def show(comparison: Comparison, console: Console) -> None:
    """Print the table of what was measured, and what it says."""
    table = Table("", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in (
        "final\naccuracy %",
        "best\naccuracy %",
        "steps to\nbaseline's",
        "seconds to\nbaseline's",
        "\nms/step",
        "memory\nMiB",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for name, arm in (("baseline", comparison.baseline), ("recipe", comparison.recipe)):
        reached = arm.reached(comparison.target)
        table.add_row(
            name,
            _mean([h.final_accuracy for h in arm.histories]),
            _mean([h.best_accuracy for h in arm.histories]),
            str(reached.step) if reached else "not reached",
            f"{reached.seconds:.1f}" if reached else "-",
            f"{arm.ms_per_step:.1f}",
            f"{arm.memory / 2**20:.1f}",
        )
    console.print(table)
    for line in notes(comparison):
        console.print(line, highlight=False)


def _mean(shares: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(shares):.1f}"
    return f"{mean} ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else mean


def notes(comparison: Comparison) -> list[str]:
    """Return what a reader of the table must know, and the difference seed by seed."""
    runs, steps = len(comparison.gains), [e.step for e in comparison.baseline.mean]
    over = f"Means and standard deviations over {runs} seeds" if runs > 1 else "One seed"
    gains = ", ".join(f"{100 * gain:+.1f}" for gain in comparison.gains)
    return [
        f"{over}, {steps[-1]} steps each, evaluated every {steps[0]}.",
        f"to baseline's: until the mean accuracy is at least its final"
        f" {_percent(comparison.target)}.",
        "seconds, ms/step: of training alone. memory: of tensors, at the peak.",
        f"Final accuracy, recipe minus baseline, seed by seed: {gains} points.",
    ]


# The plot.

_COLOURS = {"baseline": "#8c8c8c", "recipe": "#0072b2"}


def check_output(path: Path) -> None:
    """Check before training that the plot can be written after it.

    Raises:
        MissingError: If matplotlib is not installed.
        ValueError: If the folder does not exist or matplotlib can't write such a file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingError(
            "mosaic: the plot needs matplotlib, which is not installed; get it with"
            ' pip install "mosaic-core[demo]"'
        ) from error
    if not path.parent.is_dir():
        raise ValueError(f"mosaic: --output must lie in a folder that exists, got {path}")
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise ValueError(
            f"mosaic: --output must end in one of {', '.join(sorted(known))}, got {path}"
        )


def plot(comparison: Comparison, path: Path, title: str) -> None:
    """Save accuracy against steps and against seconds, with a thin line for each seed.

    Args:
        comparison: What to show.
        path: Where to save it; the suffix gives the format.
        title: Title of the picture.
    """
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, quantity in zip(axes, ("step", "seconds"), strict=True):
        for name, arm in (("baseline", comparison.baseline), ("recipe", comparison.recipe)):
            for history in arm.histories:
                _curve(ax, history.evaluations, quantity, color=_COLOURS[name], lw=0.8, alpha=0.35)
            _curve(ax, arm.mean, quantity, color=_COLOURS[name], lw=2.2, label=name)
        ax.axhline(100 * comparison.target, color=_COLOURS["baseline"], lw=1, ls=":")
        ax.set_xlabel("steps" if quantity == "step" else "seconds of training")
        ax.set_xlim(left=0)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    low, high = _limits(comparison)
    axes[0].set_ylim(low, high)
    axes[0].set_ylabel("accuracy, %")
    axes[0].legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=150)


def _curve(ax: "Axes", evaluations: Sequence[Evaluation], quantity: str, **style: Any) -> None:
    xs = [getattr(e, quantity) for e in evaluations]
    ax.plot(xs, [100 * e.accuracy for e in evaluations], **style)


def _limits(comparison: Comparison) -> tuple[float, float]:
    """Return limits that show the end of the curves well, and leave out how they began."""
    ends = [
        h.final_accuracy for arm in (comparison.baseline, comparison.recipe) for h in arm.histories
    ]
    best = max(
        h.best_accuracy for arm in (comparison.baseline, comparison.recipe) for h in arm.histories
    )
    room = max(0.02, 4 * (1 - min(ends)))
    return 100 * max(0.0, min(ends) - room), 100 * min(1.0, best + room / 8)
