"""Runs that take turns: every few steps another one goes on, so all see the same machine.

On a shared machine a run may take a tenth longer than the same run a minute later. Runs that
alternate every few steps meet the same disturbances, and the ratio of their times stays sharp. Each
lives in a process of its own, as trainers keep global state; only one of them computes at a time,
and the clock of the others stands still.
"""

import contextlib
import itertools
import multiprocessing
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Self

import torch

from mosaic_core.bench.probe import Probe, probe
from mosaic_core.bench.runs import Job, Record
from mosaic_core.plugins import load
from mosaic_core.recipe import Recipe
from mosaic_core.training import Evaluation, Train, Update
from mosaic_core.workloads import Workload

__all__ = ["TURN", "Report", "Trainee", "Turns"]

TURN = 20
"""Steps of a turn, unless told otherwise: long beside what a change of turns costs."""

Report = Callable[[Job, int, int, Evaluation | None], None]
"""Called with a run that goes on, its steps done and to do, and an evaluation that it just had."""


class Trainee:
    """Performs runs in this process, one after another.

    Args:
        workload: What is trained.
        train: Trains it with some trainer.
        data_dir: Folder to look for the data first.
        report: Called after every step and evaluation.
    """

    def __init__(
        self,
        workload: Workload,
        train: Train,
        data_dir: Path | None = None,
        report: Report | None = None,
    ) -> None:
        self.workload, self.train, self.data_dir = workload, train, data_dir
        self._report = report
        self._probes: dict[tuple[str, int, str], Probe] = {}

    def __call__(self, jobs: Sequence[Job]) -> Iterator[Record]:
        """Do some runs and yield the record of each."""
        for job in jobs:

            def report(update: Update, job: Job = job) -> None:
                if self._report is not None:
                    self._report(job, update.step, update.total_steps, update.evaluation)

            yield self.perform(job, report)

    def warm_up(self, job: Job) -> Probe:
        """Return memory and phases of a recipe, from short trainings that also warm up."""
        workload, key = job.of(self.workload), (job.recipe, job.epochs, repr(job.settings))
        if key not in self._probes:
            if workload.threads is not None:
                torch.set_num_threads(workload.threads)
            recipe = Recipe.from_yaml(job.recipe)
            self._probes[key] = probe(
                self.train, workload, recipe, epochs=job.epochs, data_dir=self.data_dir
            )
        return self._probes[key]

    def perform(
        self, job: Job, report: Callable[[Update], None] | None, turns: Sequence[str] = ()
    ) -> Record:
        """Do one run."""
        found = self.warm_up(job)
        history = self.train(
            job.of(self.workload),
            Recipe.from_yaml(job.recipe),
            seed=job.seed,
            epochs=job.epochs,
            data_dir=self.data_dir,
            report=report,
        )
        return Record.of(job, history, memory=found.memory, phases=found.phases, turns=turns)


class Turns:
    """Performs runs that are given together in turns, each in a process of its own.

    Use it as a context manager: the processes end with it, and with the process that made it.

    Args:
        workload: What is trained; it and ``train`` are pickled, so they are of an importable
            module.
        train: Trains it with some trainer.
        data_dir: Folder to look for the data first.
        report: Called after every turn and every evaluation.
        turn: Steps of a turn, at least 1.
        plugins: Modules to load as plugins in each process; see :func:`mosaic_core.plugins.load`.

    Raises:
        ValueError: If ``turn`` is below 1, or the workload can't be pickled.
    """

    def __init__(
        self,
        workload: Workload,
        train: Train,
        data_dir: Path | None = None,
        report: Report | None = None,
        *,
        turn: int = TURN,
        plugins: Sequence[str] = (),
    ) -> None:
        if turn < 1:
            raise ValueError(f"Turns: turn must be at least 1, got {turn}")
        try:
            pickle.dumps((workload, train))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"Turns: workload must be made of functions and classes of a module, as the"
                f" processes that train it import them, got {workload.name}: {error}"
            ) from error
        self._what = (workload, train, data_dir, turn, tuple(plugins))
        self._report = report
        self._context = _context(train)
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def _end(self) -> None:
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    def __call__(self, jobs: Sequence[Job]) -> Iterator[Record]:
        """Do some runs in turns and yield the record of each when it has ended."""
        while len(self._workers) < len(jobs):
            self._workers.append(_Worker(self._context, self._what))
        together = tuple(job.file for job in jobs)
        running = list(zip(jobs, self._workers, strict=False))
        try:
            for job, worker in running:  # all are warm, and none was refused, before one begins
                worker.ask(job, (job, together))
            for n in itertools.count():
                if not running:
                    return
                # Back and forth, so that none always follows the same one.
                for job, worker in list(running if n % 2 == 0 else reversed(running)):
                    answer = worker.ask(job, "go on")
                    if isinstance(answer, Record):
                        running.remove((job, worker))
                        yield answer
                    elif self._report is not None:
                        self._report(job, *answer)
        finally:
            if running:  # something went wrong, and the others wait in the middle of their runs
                self._end()


class _Worker:
    """The other end of a process that performs runs."""

    def __init__(self, context: BaseContext, what: tuple[Any, ...]) -> None:
        self._connection, theirs = context.Pipe()
        self._process: Any = context.Process(target=_work, args=(theirs, *what))  # type: ignore[attr-defined]  # every context has it
        self._process.start()
        theirs.close()
        self._answer("to train")

    def ask(self, job: Job, message: Any) -> Any:
        """Send a message about a run and return the answer; one that is an error is raised."""
        with contextlib.suppress(OSError):  # the answer tells what became of it
            self._connection.send(message)
        return self._answer(f"of {job.file}")

    def _answer(self, whose: str) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise RuntimeError(
                f"mosaic: the process {whose} ended with exit code {self._process.exitcode}; if"
                " that is -9, memory was short"
            ) from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def end(self) -> None:
        self._connection.close()  # it ends at the end of its turn, if it is in one
        self._process.join(timeout=1)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _context(train: Train) -> BaseContext:
    """Return how processes are started: copies of one that has imported what all need."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, getattr(train, "__module__", __name__)])
    return context


def _work(
    connection: Connection,
    workload: Workload,
    train: Train,
    data_dir: Path | None,
    turn: int,
    plugins: Sequence[str],
) -> None:
    """Perform the runs that come through a connection, until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other end is told, and closes
    for module in plugins:
        load(module)
    trainee = Trainee(workload, train, data_dir)

    def exchange(answer: Any) -> Any:
        try:
            connection.send(answer)
            return connection.recv()
        except (EOFError, OSError):  # nobody is there any more
            raise SystemExit from None

    def report(update: Update) -> None:
        if update.evaluation is not None or update.step % turn == 0:
            with update.clock_stopped():
                exchange((update.step, update.total_steps, update.evaluation))

    message = exchange("ready")
    while True:
        job, together = message
        try:
            trainee.warm_up(job)
            exchange("warm")
            answer: Any = trainee.perform(job, report, together)
        except Exception as error:
            answer = _portable(error)
        message = exchange(answer)


def _portable(error: Exception) -> Exception:
    """Return the error, or its text where it does not survive being sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
