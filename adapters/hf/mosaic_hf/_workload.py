"""Training a workload with the Hugging Face Trainer, for ``mosaic demo`` and ``mosaic bench``."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from logging import ERROR
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, logging

from mosaic_core import Algorithm, Recipe
from mosaic_core.algorithms import NoOp
from mosaic_core.training import History, Recorder, Report
from mosaic_core.workloads import Workload
from mosaic_hf._callback import MosaicCallback

__all__ = ["overhead", "train"]


class _Classifier(nn.Module):
    """What the Trainer takes for a model; nothing in it knows of mosaic."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(pixel_values)
        return {"loss": self.loss(logits, labels), "logits": logits}


class _Batches(IterableDataset[dict[str, Tensor]]):
    """The batches of a loader, so that all trainers see the same ones in the same order."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for pixel_values, labels in self.loader:
            yield {"pixel_values": pixel_values, "labels": labels}


class _Record(TrainerCallback):
    """Tells the recorder what the Trainer does."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.recorder.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.recorder.end_step()
        if control.should_evaluate:
            self.recorder.pause()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.recorder.evaluated(kwargs["metrics"]["eval_accuracy"])


def train(
    workload: Workload,
    recipe: Iterable[Algorithm] | Recipe,
    *,
    seed: int = 0,
    epochs: int | None = None,
    data_dir: Path | None = None,
    report: Report | None = None,
) -> History:
    """Train a workload with the Trainer; see :class:`mosaic_core.training.Train`."""
    loader, evaluation_loader = workload.loaders(workload.load(data_dir), seed)
    epochs = workload.epochs if epochs is None else epochs
    recorder = Recorder(epochs, len(loader), workload.evaluations, report)
    model = _Classifier(workload.new_model(seed), workload.loss)
    with _quiet() as folder:
        trainer = Trainer(
            model,
            _arguments(
                folder,
                not torch.cuda.is_available(),
                epochs,
                eval_strategy="steps",
                eval_steps=recorder.interval,
            ),
            data_collator=_unwrap,
            train_dataset=_Batches(loader),
            eval_dataset=_Batches(evaluation_loader),
            compute_metrics=_accuracy,
            # The recorder comes last: what the recipe does after a step belongs to training.
            callbacks=[MosaicCallback(recipe, seed=seed), _Record(recorder)],
            # On the model as surgery leaves it, which makes no new parameters here.
            optimizers=workload.optimizer(model, recorder.total_steps),  # type: ignore[arg-type]  # any schedule does
        )
        trainer.train()
    return recorder.history(model.model)


class _Clock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def overhead(arm: str, steps: int) -> list[float]:
    """Time steps of a tiny model in the Trainer; see :mod:`mosaic_core.bench.overhead`.

    Args:
        arm: One of ``mosaic_core.bench.overhead.ARMS``.
        steps: Number of steps.

    Returns:
        Seconds of each step.
    """
    arms: dict[str, Callable[[], TrainerCallback]] = {
        "empty callback": TrainerCallback,
        "empty recipe": lambda: MosaicCallback([]),
        "NoOp": lambda: MosaicCallback([NoOp()]),
    }
    clock, model = _Clock(), _Classifier(nn.Linear(8, 2), F.cross_entropy)
    batch = (torch.ones(4, 8), torch.zeros(4, dtype=torch.int64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with _quiet() as folder:
        trainer = Trainer(
            model,
            _arguments(folder, True, 1),
            data_collator=_unwrap,
            train_dataset=_Batches([batch] * (steps + 1)),
            callbacks=[clock, arms[arm]()],
            optimizers=(optimizer, constant),
        )
        trainer.train()
    return [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)]


def _arguments(folder: str, use_cpu: bool, epochs: int, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        folder,
        use_cpu=use_cpu,
        num_train_epochs=epochs,
        per_device_train_batch_size=1,  # of whole batches
        per_device_eval_batch_size=1,
        max_grad_norm=0,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        **options,
    )


def _unwrap(items: list[Any]) -> Any:
    return items[0]


def _accuracy(prediction: Any) -> dict[str, float]:
    right = prediction.predictions.argmax(1) == prediction.label_ids
    return {"accuracy": float(right.mean())}


@contextlib.contextmanager
def _quiet() -> Iterator[str]:
    """Keep the Trainer's words out of the demo; yields a folder for what it may write."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
            yield folder
    finally:
        logging.set_verbosity(verbosity)
