"""The runs of a benchmark, a file each: none is done twice, and nothing half is kept."""

import dataclasses
import datetime
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mosaic_core.recipe import Recipe
from mosaic_core.training import Evaluation, History, Train, Update
from mosaic_core.workloads import Workload

__all__ = ["SCHEMA", "Job", "Record", "Store", "environment", "execute"]

SCHEMA = 1
"""Version of the files; a file of another version is not read."""


@dataclass(frozen=True)
class Job:
    """One run: all that decides what comes of it, but for the machine.

    Attributes:
        workload: Name of the workload.
        trainer: Name of the adapter, or ``torch``.
        recipe: The recipe as YAML.
        seed: Seed of weights, data order and algorithms.
        epochs: Length of the run.
        learning_rate: Peak learning rate of its schedule.
    """

    workload: str
    trainer: str
    recipe: str
    seed: int
    epochs: int
    learning_rate: float

    @property
    def file(self) -> str:
        """Name of its file: algorithms and seed for people, a digest of all for the rest."""
        text = json.dumps(asdict(self), sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
        names = "+".join(a.name for a in Recipe.from_yaml(self.recipe)) or "none"
        return f"{names[:80]}-seed{self.seed}-{digest}.json"


@dataclass(frozen=True)
class Record:
    """What came of a run.

    Attributes:
        job: The run.
        evaluations: One after each epoch.
        ms_per_step: Median time of a step, in milliseconds.
        environment: Date, machine and versions.
    """

    job: Job
    evaluations: tuple[Evaluation, ...]
    ms_per_step: float
    environment: Mapping[str, Any]

    @property
    def final_accuracy(self) -> float:
        """Accuracy of the weights that training leaves."""
        return self.evaluations[-1].accuracy

    def to_json(self) -> str:
        """Write it as JSON."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: If it is no such text, or of another version.
        """
        try:
            data = json.loads(text)
            if data.pop("schema") != SCHEMA:
                raise ValueError(f"mosaic: the record of a run must have schema {SCHEMA}")
            evaluations = tuple(Evaluation(**e) for e in data.pop("evaluations"))
            return cls(Job(**data.pop("job")), evaluations, **data)
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"mosaic: not the record of a run: {error}") from error


class Store:
    """A folder with a file for every run that is finished.

    Args:
        folder: The folder, which is made when something is put into it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, job: Job) -> Record | None:
        """Return what came of a run, None if it was not done.

        Raises:
            ValueError: If its file is not the record of this run.
        """
        path = self.folder / job.file
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        try:
            record = Record.from_json(text)
        except ValueError as error:
            raise ValueError(f"{error}; remove {path} to have it done again") from error
        if record.job != job:
            raise ValueError(f"mosaic: {path} is the record of another run; remove it")
        return record

    def save(self, record: Record) -> None:
        """Put a record in its place: whole, or not at all if the process is killed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / f"{record.job.file}.{os.getpid()}.part"
        with scratch.open("w", encoding="utf-8") as file:
            file.write(record.to_json())
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(self.folder / record.job.file)

    def tidy(self) -> None:
        """Remove what a killed process left half written."""
        for scratch in self.folder.glob("*.part"):
            scratch.unlink(missing_ok=True)


def execute(
    jobs: Iterable[Job],
    train: Train,
    workload: Workload,
    store: Store,
    *,
    data_dir: Path | None = None,
    report: Callable[[Job, Update], None] | None = None,
) -> Iterator[Record]:
    """Yield the records of some runs in their order, doing those that were not done yet.

    Args:
        jobs: The runs.
        train: Trains the workload with some trainer.
        workload: What is trained; a job sets its learning rate.
        store: Where the records are.
        data_dir: Folder to look for the data first.
        report: Called after every step and evaluation of a run that is done now.
    """
    store.tidy()
    for job in jobs:
        record = store.load(job)
        if record is None:
            history = train(
                dataclasses.replace(workload, learning_rate=job.learning_rate),
                Recipe.from_yaml(job.recipe),
                seed=job.seed,
                epochs=job.epochs,
                data_dir=data_dir,
                report=None if report is None else _bound(report, job),
            )
            record = _record(job, history)
            store.save(record)
        yield record


def _bound(report: Callable[[Job, Update], None], job: Job) -> Callable[[Update], None]:
    return lambda update: report(job, update)


def _record(job: Job, history: History) -> Record:
    return Record(job, history.evaluations, history.ms_per_step, environment())


def environment() -> dict[str, Any]:
    """Return the date, the machine and the versions that figures depend on."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
