"""What is shown while a benchmark runs: bars in a terminal, else a line for each run, or JSON."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mosaic_core.bench.runs import Job, Record
from mosaic_core.training import Evaluation

__all__ = ["Display", "display"]


class Display(Protocol):
    """What is told of the runs."""

    def step(self, job: Job, step: int, total: int, evaluation: Evaluation | None) -> None:
        """A run goes on, and may just have been evaluated."""

    def done(self, record: Record) -> None:
        """A run has ended, now or before."""


class _Lines:
    """A line for each run that has ended."""

    def __init__(self, console: Console, runs: int) -> None:
        self.console, self.runs, self.ended = console, runs, 0

    def step(self, job: Job, step: int, total: int, evaluation: Evaluation | None) -> None:
        pass

    def done(self, record: Record) -> None:
        self.ended += 1
        self.console.print(
            f"{self.ended}/{self.runs} {record.job.names}, seed {record.job.seed}:"
            f" {record.final_accuracy:.1%} after {record.seconds:.1f} s",
            highlight=False,
            soft_wrap=True,
        )


class _Bars:
    """One bar for all runs, which moves with every turn."""

    def __init__(self, progress: Progress, runs: int) -> None:
        self.progress, self.ended = progress, 0
        self.parts: dict[str, float] = {}
        self.task = progress.add_task("runs", total=runs, ended="0", runs=runs)

    def step(self, job: Job, step: int, total: int, evaluation: Evaluation | None) -> None:
        self.parts[job.file] = step / total
        self._show(f"{job.names}, seed {job.seed}")

    def done(self, record: Record) -> None:
        self.parts.pop(record.job.file, None)
        self.ended += 1
        self._show(f"{record.job.names}, seed {record.job.seed}")

    def _show(self, description: str) -> None:
        completed = self.ended + sum(self.parts.values())
        text = description if len(description) <= 40 else f"{description[:37]}..."
        self.progress.update(
            self.task, description=text, completed=completed, ended=str(self.ended)
        )


class _Json:
    """An object a line, for programs."""

    def __init__(self, console: Console, runs: int) -> None:
        self.console, self.runs, self.ended = console, runs, 0

    def step(self, job: Job, step: int, total: int, evaluation: Evaluation | None) -> None:
        event: dict[str, Any] = {"event": "step", "run": job.file, "step": step, "steps": total}
        if evaluation is not None:
            event |= {"event": "evaluation", "accuracy": evaluation.accuracy}
            event["seconds"] = evaluation.seconds
        self._write(event)

    def done(self, record: Record) -> None:
        self.ended += 1
        event = {"event": "run", "run": record.job.file, "accuracy": record.final_accuracy}
        self._write(event | {"seconds": record.seconds, "done": self.ended, "runs": self.runs})

    def _write(self, event: dict[str, Any]) -> None:
        self.console.out(json.dumps(event), highlight=False)


@contextmanager
def display(console: Console, runs: int, *, as_json: bool = False) -> Iterator[Display]:
    """Show how the runs go on.

    Args:
        console: Where to.
        runs: Number of runs, those done before included.
        as_json: Whether an object a line is written instead of what people read.
    """
    if as_json:
        yield _Json(console, runs)
    elif not console.is_terminal:
        yield _Lines(console, runs)
    else:
        columns = (
            TextColumn("{task.fields[ended]} of {task.fields[runs]} runs"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            yield _Bars(progress, runs)
