"""Training a workload with fastai, for ``mosaic demo`` and ``mosaic bench``."""

import contextlib
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mosaic_core import Algorithm, Recipe
from mosaic_core.algorithms import NoOp
from mosaic_core.training import History, Recorder, Report
from mosaic_core.workloads import Workload
from mosaic_fastai._callback import MosaicCallback

__all__ = ["overhead", "train"]


class _Record(Callback):  # type: ignore[misc]  # fastai has no types
    """Tells the recorder what fastai does."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.clock, self.started = recorder, False

    def before_train(self) -> None:
        if not self.started:
            self.started = True
            self.clock.start()

    def after_batch(self) -> None:
        if self.training:
            self.clock.end_step()

    def before_validate(self) -> None:
        self.clock.pause()

    def after_epoch(self) -> None:
        self.clock.evaluated(float(self.recorder.log[-1]))


class _Midway(Callback):  # type: ignore[misc]  # fastai has no types
    """Validates in the middle of an epoch too, and leaves the Learner as it was."""

    order = 70  # when all others have seen the training batch

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.clock = recorder

    def after_batch(self) -> None:
        if not (self.training and self.clock.due):
            return
        learn = self.learn
        before = learn.dl, learn.n_iter, learn.recorder.log
        with learn.validation_context(inner=True):
            learn._do_epoch_validate()
        accuracy = float(learn.recorder.log[-1])
        learn.dl, learn.n_iter, learn.recorder.log = before
        learn.model.train()
        learn.training = True
        self.clock.evaluated(accuracy)


class _Schedule(Callback):  # type: ignore[misc]  # fastai has no types
    """Steps torch's schedule, as fastai's own schedules set learning rates before a batch."""

    order = 60

    def __init__(self, schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
        super().__init__()
        self.schedule = schedule

    def after_step(self) -> None:
        self.schedule.step()


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).float().mean()


def train(
    workload: Workload,
    recipe: Iterable[Algorithm] | Recipe,
    *,
    seed: int = 0,
    epochs: int | None = None,
    data_dir: Path | None = None,
    report: Report | None = None,
) -> History:
    """Train a workload with fastai; see :class:`mosaic_core.training.Train`."""
    loaders = workload.loaders(workload.load(data_dir), seed)
    epochs = workload.epochs if epochs is None else epochs
    recorder = Recorder(epochs, len(loaders[0]), workload.evaluations, report)
    model = workload.new_model(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    learn = _learner(
        DataLoaders(*loaders, device=device),
        model,
        loss_func=workload.loss,
        metrics=_accuracy,
        cbs=[_Record(recorder), _Midway(recorder), MosaicCallback(recipe, seed=seed)],
    )
    optimizer, schedule = workload.optimizer(model, recorder.total_steps)  # after surgery
    learn.opt_func = OptimWrapper(opt=optimizer)
    with _quiet():
        learn.fit(epochs, lr=optimizer.param_groups[0]["lr"], cbs=_Schedule(schedule))
    return recorder.history(model)


class _Clock(Callback):  # type: ignore[misc]  # fastai has no types
    """Notes when each step ends."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def before_train(self) -> None:
        self.ends.append(time.perf_counter())

    def after_batch(self) -> None:
        if self.training:
            self.ends.append(time.perf_counter())


class _Empty(Callback):  # type: ignore[misc]  # fastai has no types
    """Does nothing."""


def overhead(arm: str, steps: int) -> list[float]:
    """Time steps of a tiny model in fastai; see :mod:`mosaic_core.bench.overhead`.

    Args:
        arm: One of ``mosaic_core.bench.overhead.ARMS``.
        steps: Number of steps.

    Returns:
        Seconds of each step.
    """
    recipe = [NoOp()] if arm == "NoOp" else []
    callback = _Empty() if arm == "empty callback" else MosaicCallback(recipe)
    clock, model = _Clock(), nn.Linear(8, 2)
    data = TensorDataset(torch.ones(steps, 4, 8), torch.zeros(steps, 4, dtype=torch.int64))
    nothing = TensorDataset(torch.ones(0, 4, 8))
    loaders = [DataLoader(part, batch_size=None) for part in (data, nothing)]
    learn = _learner(
        DataLoaders(*loaders, device=torch.device("cpu")),
        model,
        loss_func=F.cross_entropy,
        opt_func=lambda parameters, lr: OptimWrapper(parameters, torch.optim.SGD, lr=lr),
        cbs=[clock, callback],
    )
    with _quiet():
        learn.fit(1, lr=0.1)
    return [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)]


def _learner(loaders: Any, model: nn.Module, **options: Any) -> Any:
    learn = Learner(loaders, model, **options)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *args: None
    return learn


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep fastai's warnings out of the demo."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="fastai")
        yield
