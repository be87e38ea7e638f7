"""What an adapter's test session is asked to do, and what comes of it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from mosaic_core.adapter import Mode
from mosaic_core.algorithm import Algorithm
from mosaic_core.run import Run
from mosaic_core.testing._measures import by_hand

__all__ = ["EPOCHS", "STEPS_PER_EPOCH", "Job", "Loss", "Outcome", "Session", "Trained"]

STEPS_PER_EPOCH, EPOCHS = 10, 2


class Loss:
    """Cross entropy that notes the targets it is given while evaluating.

    Attributes:
        seen: Targets that came without gradients being asked for.
        ignoring: Whether it computes the loss from the plain labels, by hand.
        error: Raised by the call number ``error_at`` for training.
        overflow_at: Number of the call for training whose loss overflows in float16, or 0.
        calls: Number of calls for training.
    """

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.ignoring = False
        self.error: BaseException | None = None
        self.error_at = 3
        self.overflow_at = 0
        self.calls = 0

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross entropy."""
        if not torch.is_grad_enabled():
            self.seen.append(target)
            return F.cross_entropy(logits, target)
        self.calls += 1
        if self.error is not None and self.calls == self.error_at:
            raise self.error
        if self.ignoring:
            return by_hand(logits, target)
        if self.calls == self.overflow_at:  # in what cross_entropy is given: its result is the loss
            logits = 2.0**24 * logits
        return F.cross_entropy(logits, target)


@dataclass
class Job:
    """One training that a session is to do.

    Two epochs of ten optimizer steps, all with the same batches in the same order; no schedule.

    Attributes:
        recipe: The algorithms; None trains without mosaic.
        mode: How to train: accumulation, precision, number of processes.
        model: The model, as :meth:`AdapterContract.wrap` returned it; train this object.
        loss: The loss ``loss(logits, target)``; the wrapped model may hold it too.
        optimizer: Makes the optimizer of some parameters.
        batches: Micro-batches of one epoch as this rank sees them: pairs of images and classes.
        evaluation: Batches to evaluate after every epoch; none for no evaluation.
        clip_norm: Largest norm of all gradients together, or None.
        epochs: Number of epochs.
        seed: Seed of the recipe.
        folder: Where files may be written; checkpoints belong here.
        save: Whether to save a checkpoint, from which training can go on, after every epoch.
        resume: Whether to go on from the checkpoint that another process saved in ``folder``.
    """

    recipe: Sequence[Algorithm] | None
    mode: Mode
    model: nn.Module
    loss: Loss
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    batches: list[tuple[Tensor, Tensor]]
    folder: Path
    evaluation: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    clip_norm: float | None = None
    epochs: int = EPOCHS
    seed: int = 3
    save: bool = False
    resume: bool = False


class Session(Protocol):
    """One training with the trainer, set up and not yet begun."""

    def fit(self) -> None:
        """Train; exceptions of the job's loss come out, perhaps as the trainer turns them."""

    @property
    def run(self) -> Run | None:
        """The run of the recipe, None without one."""

    def objects(self) -> Iterable[Any]:
        """Return the objects that the adapter may have changed: trainer, model, data, optimizer."""


@dataclass
class Outcome:
    """What one cell of the matrix gave; what is not refused is compared with the plain loop.

    Attributes:
        refused: The message, if the adapter refused the recipe before the first step.
        weights: Largest relative difference of a training weight or buffer.
        averaged: The same of the weights to evaluate.
        effect: The same of the training weights and those without a recipe.
    """

    refused: str | None = None
    weights: float = 0.0
    averaged: float = 0.0
    effect: float = 0.0


@dataclass
class Trained:
    """What a training gave.

    Attributes:
        weights: Training weights and buffers by name.
        averaged: Parameters to evaluate.
        by_epoch: The same after every epoch, of the plain loop.
        left: What a user finds in the model when training has ended.
    """

    weights: dict[str, Tensor]
    averaged: dict[str, Tensor]
    by_epoch: list[dict[str, Tensor]]
    left: dict[str, Tensor] = field(default_factory=dict)
