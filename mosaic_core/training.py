"""What training a workload gives, and what records it.

Every adapter has a function as :class:`Train` describes it, :mod:`mosaic_core.plain` that of the
plain loop; with the same seed all of them begin with the same weights and see the same data in the
same order.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mosaic_core.algorithm import Algorithm
from mosaic_core.recipe import Recipe
from mosaic_core.workloads import Workload

__all__ = [
    "WARM_UP",
    "Evaluation",
    "History",
    "Recorder",
    "Report",
    "Train",
    "Update",
    "mean_curve",
]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Attributes:
        step: Optimizer steps before it.
        epoch: Whole epochs before it; ``step`` tells more in the middle of one.
        seconds: Time spent training before it, without the start-up; evaluations do not count.
        accuracy: Share of the evaluation data classified correctly, in [0, 1].
    """

    step: int
    epoch: int
    seconds: float
    accuracy: float


def mean_curve(runs: Iterable[Sequence[Evaluation]]) -> list[Evaluation]:
    """Return the evaluations averaged over runs, as far as every run has them."""
    return [
        Evaluation(
            step=same[0].step,
            epoch=same[0].epoch,
            seconds=statistics.mean(point.seconds for point in same),
            accuracy=statistics.mean(point.accuracy for point in same),
        )
        for same in zip(*runs, strict=False)
    ]


@dataclass(frozen=True)
class History:
    """What a training gave.

    Attributes:
        evaluations: In the order of the steps.
        ms_per_step: Median time from the end of a step to the end of the next, in milliseconds.
        start_up: Seconds that the first steps took longer than later ones, as they compile and warm
            up; no part of the other figures. See :class:`Recorder`.
        weights: The parameters that training leaves, by their names in the workload's model, on
            the CPU.
    """

    evaluations: tuple[Evaluation, ...]
    ms_per_step: float
    weights: Mapping[str, Tensor] = field(repr=False, compare=False)
    start_up: float = 0.0

    @property
    def final_accuracy(self) -> float:
        """Accuracy of the weights that training leaves."""
        return self.evaluations[-1].accuracy

    @property
    def best_accuracy(self) -> float:
        """Highest accuracy on the way."""
        return max(evaluation.accuracy for evaluation in self.evaluations)


@dataclass(frozen=True)
class Update:
    """How far a training has come: after every step, and once more after every evaluation.

    Attributes:
        step: Optimizer steps done.
        total_steps: Optimizer steps of the run.
        evaluation: The one that has just been made.
        clock_stopped: Makes a context in which the training may wait: its clock stands still. It
            serves a report; a copy in another process stops nothing.
    """

    step: int
    total_steps: int
    evaluation: Evaluation | None = None
    clock_stopped: Callable[[], AbstractContextManager[None]] = field(
        default=contextlib.nullcontext, repr=False, compare=False
    )

    def __reduce__(self) -> tuple[type["Update"], tuple[Any, ...]]:
        # Without the clock, which belongs to this process.
        return Update, (self.step, self.total_steps, self.evaluation)


Report = Callable[[Update], None]


class Train(Protocol):
    """Trains a workload: the function that ``Adapter.trainer`` names."""

    def __call__(
        self,
        workload: Workload,
        recipe: Iterable[Algorithm] | Recipe,
        *,
        seed: int = 0,
        epochs: int | None = None,
        data_dir: Path | None = None,
        report: Report | None = None,
    ) -> History:
        """Train a workload from scratch.

        Args:
            workload: What to train.
            recipe: Algorithms, or none for the baseline.
            seed: Seed of weights, data order and algorithms.
            epochs: Length of the run; None takes that of the workload.
            data_dir: Folder to look for the data first.
            report: Called after every step and every evaluation; its time counts as training,
                unless it waits inside ``update.clock_stopped()``.

        Raises:
            ValueError: If the workload's evaluations do not divide the steps of an epoch.
        """
        ...


WARM_UP = 5
"""First steps of a run, in which things are compiled and caches fill."""


class Recorder:
    """Keeps the clock and the evaluations of one training; all trainers call the same methods.

    If more than ``2 * WARM_UP`` steps lie before the first evaluation, the first ``WARM_UP`` count
    as if each had taken the median time of the others before it: what they took longer, if they
    did, is the start-up, which is taken off ``seconds``. In a run of that many steps the median
    step leaves them out too.

    Args:
        epochs: Epochs of the run.
        steps: Optimizer steps of an epoch.
        evaluations: Evaluations an epoch.
        report: Called after every step and every evaluation.

    Attributes:
        total_steps: Optimizer steps of the run.
        interval: Optimizer steps from an evaluation to the next.

    Raises:
        ValueError: If the evaluations don't divide the steps.
    """

    def __init__(
        self, epochs: int, steps: int, evaluations: int = 1, report: Report | None = None
    ) -> None:
        if evaluations < 1 or steps % evaluations:
            raise ValueError(
                f"Recorder: evaluations must divide the {steps} steps of an epoch,"
                f" got {evaluations}"
            )
        self.total_steps, self.interval = epochs * steps, steps // evaluations
        self._steps, self._report = steps, report
        self._step, self._seconds, self._start_up = 0, 0.0, 0.0
        self._started = self._last = 0.0
        self._intervals: list[float] = []
        self._evaluations: list[Evaluation] = []

    def start(self) -> None:
        """Let the clock run: training begins, or goes on after an evaluation."""
        self._started = self._last = time.perf_counter()

    def end_step(self) -> None:
        """Count a step."""
        now = time.perf_counter()
        self._intervals.append(now - self._last)
        self._last = now
        self._step += 1
        self._tell(None)

    @property
    def due(self) -> bool:
        """Whether an evaluation is due in the middle of an epoch; at its end one always is."""
        return self._step % self.interval == 0 and self._step % self._steps != 0

    def pause(self) -> None:
        """Stop the clock: an evaluation begins."""
        self._seconds += _now() - self._started

    def evaluated(self, accuracy: float) -> None:
        """Note an evaluation and let the clock run on.

        Args:
            accuracy: Share classified correctly, in [0, 1].
        """
        if not self._evaluations and self._step > 2 * WARM_UP:
            first, later = self._intervals[:WARM_UP], self._intervals[WARM_UP:]
            self._start_up = max(0.0, sum(first) - WARM_UP * statistics.median(later))
            self._seconds -= self._start_up
        epoch = self._step // self._steps
        self._evaluations.append(Evaluation(self._step, epoch, self._seconds, accuracy))
        self._tell(self._evaluations[-1])
        self.start()

    def history(self, model: nn.Module) -> History:
        """Return what was recorded.

        Args:
            model: The workload's model as training leaves it, with the averaged weights if any.
        """
        warm = self._intervals[WARM_UP:] if self._step > 2 * WARM_UP else self._intervals
        return History(
            tuple(self._evaluations),
            1e3 * statistics.median(warm),
            {name: weight.detach().cpu().clone() for name, weight in model.named_parameters()},
            self._start_up,
        )

    def _tell(self, evaluation: Evaluation | None) -> None:
        if self._report is not None:
            self._report(Update(self._step, self.total_steps, evaluation, self._clock_stopped))

    @contextlib.contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        stopped = _now()
        try:
            yield
        finally:
            waited = time.perf_counter() - stopped
            self._started += waited
            self._last += waited


def _now() -> float:
    """Return the time once the device has done what was asked of it, as that is training too."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
