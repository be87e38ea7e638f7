"""Training a workload with Lightning, for ``mosaic demo`` and ``mosaic bench``."""

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mosaic_core import Algorithm, Recipe
from mosaic_core.algorithms import NoOp
from mosaic_core.training import History, Recorder, Report
from mosaic_core.workloads import Workload
from mosaic_lightning._callback import MosaicCallback

__all__ = ["overhead", "train"]


class _Classifier(pl.LightningModule):
    """An ordinary module: nothing in it knows of mosaic."""

    def __init__(self, workload: Workload, seed: int) -> None:
        super().__init__()
        self.workload, self.model = workload, workload.new_model(seed)

    def forward(self, x: Tensor) -> Any:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.workload.loss(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean(), batch_size=len(y))

    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        optimizer, schedule = self.workload.optimizer(self, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class _Record(pl.Callback):
    """Tells the recorder what Lightning does."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.recorder.start()

    def on_train_batch_end(self, *args: Any) -> None:
        self.recorder.end_step()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.recorder.pause()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.recorder.evaluated(float(trainer.callback_metrics["accuracy"]))


def train(
    workload: Workload,
    recipe: Iterable[Algorithm] | Recipe,
    *,
    seed: int = 0,
    epochs: int | None = None,
    data_dir: Path | None = None,
    report: Report | None = None,
) -> History:
    """Train a workload with Lightning; see :class:`mosaic_core.training.Train`."""
    loader, evaluation_loader = workload.loaders(workload.load(data_dir), seed)
    epochs = workload.epochs if epochs is None else epochs
    recorder = Recorder(epochs, len(loader), workload.evaluations, report)
    with _quiet():
        trainer = _trainer(
            "gpu" if torch.cuda.is_available() else "cpu",
            [_Record(recorder), MosaicCallback(recipe, seed=seed)],
            max_epochs=epochs,
            val_check_interval=recorder.interval,
        )
        module = _Classifier(workload, seed)
        trainer.fit(module, loader, evaluation_loader)
    return recorder.history(module.model)


class _Tiny(pl.LightningModule):
    """A model so small that the trainer is what takes the time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.layer(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class _Clock(pl.Callback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append(time.perf_counter())


def overhead(arm: str, steps: int) -> list[float]:
    """Time steps of a tiny model in Lightning; see :mod:`mosaic_core.bench.overhead`.

    Args:
        arm: One of ``mosaic_core.bench.overhead.ARMS``.
        steps: Number of steps.

    Returns:
        Seconds of each step.
    """
    arms: dict[str, Callable[[], pl.Callback]] = {
        "empty callback": pl.Callback,
        "empty recipe": lambda: MosaicCallback([]),
        "NoOp": lambda: MosaicCallback([NoOp()]),
    }
    clock = _Clock()
    data = TensorDataset(torch.ones(steps, 4, 8), torch.zeros(steps, 4, dtype=torch.int64))
    with _quiet():
        trainer = _trainer("cpu", [clock, arms[arm]()], max_epochs=1)
        trainer.fit(_Tiny(), DataLoader(data, batch_size=None))
    return [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)]


def _trainer(accelerator: str, callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator=accelerator,
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's banners and advice out of the demo."""
    # Both roots share one logger of messages, that of whichever was imported last.
    names = ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric")
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
