"""The runs of a benchmark, a file each: none is done twice, and nothing half is kept."""

import dataclasses
import datetime
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mosaic_core.recipe import Recipe
from mosaic_core.training import Evaluation, History
from mosaic_core.workloads import Workload

__all__ = ["SCHEMA", "Job", "Record", "Runner", "Store", "complete", "environment"]

SCHEMA = 2
"""Version of the files; a file of another version is not read."""


@dataclass(frozen=True)
class Job:
    """One run: all that decides what comes of it, but for the machine.

    Attributes:
        workload: Name of the workload.
        trainer: Name of the adapter, or ``torch``.
        recipe: The recipe as YAML.
        seed: Seed of weights, data order and algorithms.
        epochs: Length of the run; the schedule decays over all of it.
        settings: Those of the workload, such as the learning rate, by name.
        replica: Tells runs apart that are alike in all of this, as a control compares them.
    """

    workload: str
    trainer: str
    recipe: str
    seed: int
    epochs: int
    settings: Mapping[str, Any]
    replica: int = 0

    @property
    def file(self) -> str:
        """Name of its file: algorithms and seed for people, a digest of all for the rest."""
        text = json.dumps(asdict(self), sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
        return f"{self.names[:80]}-seed{self.seed}-{digest}.json"

    @property
    def names(self) -> str:
        """The algorithms, such as ``"MixUp+EMA"``, or ``"none"``."""
        return "+".join(a.name for a in Recipe.from_yaml(self.recipe)) or "none"

    def of(self, workload: Workload) -> Workload:
        """Return the workload with the settings of this run."""
        return dataclasses.replace(workload, **self.settings)


@dataclass(frozen=True)
class Record:
    """What came of a run.

    Attributes:
        job: The run.
        evaluations: In the order of the steps.
        ms_per_step: Median time of a step, in milliseconds.
        start_up: Seconds that the first steps took longer than later ones.
        memory: Bytes that its tensors take at most, in a short training.
        phases: Median time of each phase of a step, in milliseconds, in a short training.
        turns: Files of the runs that it took turns with, itself included: these saw the same
            machine. Empty if it ran alone.
        environment: Date, machine and versions.
    """

    job: Job
    evaluations: tuple[Evaluation, ...]
    ms_per_step: float
    start_up: float
    memory: int
    phases: Mapping[str, float]
    turns: tuple[str, ...]
    environment: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        job: Job,
        history: History,
        *,
        memory: int = 0,
        phases: Mapping[str, float] | None = None,
        turns: Sequence[str] = (),
    ) -> "Record":
        """Make the record of a training that has just ended here."""
        return cls(
            job,
            history.evaluations,
            history.ms_per_step,
            history.start_up,
            memory,
            phases or {},
            tuple(turns),
            environment(),
        )

    @property
    def final_accuracy(self) -> float:
        """Accuracy of the weights that training leaves."""
        return self.evaluations[-1].accuracy

    @property
    def seconds(self) -> float:
        """Time of the whole training."""
        return self.evaluations[-1].seconds

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
            turns = tuple(data.pop("turns"))
            return cls(Job(**data.pop("job")), evaluations, turns=turns, **data)
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


Runner = Callable[[Sequence[Job]], Iterator[Record]]
"""Does some runs that belong together and yields the record of each when it has ended."""


def complete(
    jobs: Sequence[Job],
    runner: Runner,
    store: Store,
    done: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Return the records of runs that belong together, doing those that were not done yet.

    Args:
        jobs: The runs, no two alike.
        runner: Does those that are missing.
        store: Where the records are; each is put there when its run has ended.
        done: Called with every record, of a run that was done before as of one done now.
    """
    found = {job.file: store.load(job) for job in jobs}
    missing = [job for job in jobs if found[job.file] is None]
    for record in found.values():
        if record is not None and done is not None:
            done(record)
    if missing:
        store.tidy()
        for record in runner(missing):
            store.save(record)
            found[record.job.file] = record
            if done is not None:
                done(record)
    return [record for record in found.values() if record is not None]


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
