"""SelectiveBackprop: train on the examples of a batch that the model finds hardest."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaic_core.algorithm import Algorithm, Card, Place
from mosaic_core.batch import Batch
from mosaic_core.example_losses import example_losses
from mosaic_core.random import to_device
from mosaic_core.untraced import Untraced

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["SelectiveBackprop", "select_using_loss", "should_selective_backprop"]


def should_selective_backprop(
    current_duration: float,
    batch_idx: int,
    start: float = 0.5,
    end: float = 0.9,
    interrupt: int = 2,
) -> bool:
    """Tell whether a step trains on a selection.

    Args:
        current_duration: Share of the run that is done, in [0, 1].
        batch_idx: Number of the step, from 0.
        start: Share of the run at which selection begins, in [0, 1].
        end: Share of the run at which it ends, in [0, 1].
        interrupt: Every so many steps one trains on the whole batch; 0 for none.

    Example:
        >>> [should_selective_backprop(0.6, step, interrupt=3) for step in range(4)]
        [True, True, False, True]
    """
    whole = interrupt > 0 and (batch_idx + 1) % interrupt == 0
    return start <= current_duration < end and not whole


def select_using_loss(
    input: Tensor,
    target: Tensor,
    model: nn.Module,
    loss_fun: Callable[..., Tensor],
    keep: float = 0.5,
    scale_factor: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep ``int(keep * N)`` examples, at least one, preferring those with a large loss.

    The example at percentile ``q`` of the losses is drawn with a probability proportional to
    ``q ** (1 / keep - 1)``, without replacement. The model runs forward once more, as it is set
    (training or evaluation) and without gradients; its buffers and the random streams stay.

    Args:
        input: Inputs, shape ``(N, ...)``.
        target: Targets, shape ``(N, ...)``.
        model: The model, ``model(input)``.
        loss_fun: Loss ``loss_fun(output, target, reduction="none")`` of shape ``(N, ...)``.
        keep: Share of the examples to keep, in (0, 1].
        scale_factor: Size at which images ``(N, C, H, W)`` are run forward for it, in (0, 1].
        generator: CPU generator to draw from; None draws from torch's default one.

    Returns:
        The inputs and targets that are kept, in their order.

    Raises:
        ValueError: If an argument is out of range, the lengths differ, or the input is too small
            or has no height and width to be scaled.

    Example:
        >>> x, y = torch.tensor([[0.1], [3.0]]), torch.zeros(2, 1)
        >>> select_using_loss(x, y, nn.Identity(), F.mse_loss, keep=0.5)[0].shape
        torch.Size([1, 1])

    References:
        Jiang et al., `Accelerating Deep Learning by Focusing on the Biggest Losers
        <https://arxiv.org/abs/1910.00762>`_, 2019, section 3.2.
    """
    _check("select_using_loss", keep, scale_factor)
    if len(input) != len(target):
        raise ValueError(
            f"select_using_loss: target must have the length of input, {len(input)}, got"
            f" {len(target)}"
        )
    small = _scaled("select_using_loss", input, scale_factor)
    with torch.no_grad(), Untraced(model):
        losses = loss_fun(model(small), target, reduction="none")
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    indices = _choose(losses.reshape(len(input), -1).mean(1), keep, seed)
    return input[indices], target[indices]


def _scaled(where: str, input: Tensor, scale_factor: float) -> Tensor:
    if scale_factor == 1:
        return input
    if input.dim() != 4 or scale_factor * min(input.shape[2:]) < 1:
        raise ValueError(
            f"{where}: scale_factor below 1 needs images (N, C, H, W) of which at least a pixel is"
            f" left, got {scale_factor} for an input of shape {tuple(input.shape)}"
        )
    return F.interpolate(input, scale_factor=scale_factor, mode="bilinear", align_corners=False)


def _choose(losses: Tensor, keep: float, seed: int) -> Tensor:
    """Draw examples by the rank of their loss; which ranks, is known without the losses."""
    count = len(losses)
    chance = ((np.arange(count) + 0.5) / count) ** (1 / keep - 1)
    ranks = np.random.default_rng(seed).choice(
        count, max(1, int(keep * count)), replace=False, p=chance / chance.sum()
    )
    order = losses.argsort(stable=True)
    kept: Tensor = order[to_device(torch.from_numpy(ranks), losses.device)]
    return kept.sort().values


def _check(where: str, keep: float, scale_factor: float) -> None:
    for name, value in (("keep", keep), ("scale_factor", scale_factor)):
        if not 0 < value <= 1:
            raise ValueError(f"{where}: {name} must be in (0, 1], got {value}")


@dataclass(frozen=True)
class SelectiveBackprop(Algorithm):
    """Train, in the middle of the run, on a part of each micro-batch, chosen by its losses.

    Args:
        start: Share of the run at which selection begins, in [0, 1].
        end: Share of the run at which it ends, in [0, 1], not before ``start``.
        keep: Share of the examples to keep, in (0, 1].
        scale_factor: Size at which images are run forward to choose, in (0, 1].
        interrupt: Every so many steps one trains on the whole batch; 0 for none.

    Raises:
        ValueError: If a setting is out of range.
    """

    start: float = 0.5
    end: float = 0.9
    keep: float = 0.5
    scale_factor: float = 1.0
    interrupt: int = 2

    place = Place.SELECTION
    card = Card(
        category="any",
        summary="Drops examples the model already predicts well before they are trained on.",
        effect="In the steps that select: one more forward pass without gradients over the batch,"
        " forward and backward over the share that is kept, and every tensor of the batch with a"
        " row for each example shrinks alike. Batch-norm statistics move once a step. The first"
        " micro-batch is tried, so a loss it can't work with is refused at once.",
        use_when="Large data sets with many easy examples, where backward costs more than the"
        " extra forward; a small scale_factor makes that cheaper. Noisy labels are hard examples"
        " too, so do not use it with many of them.",
        interactions="Chooses before anything is mixed or augmented. Losses are the trainer's own"
        " where it computes one that mosaic knows, and cross entropy where the loss lies in a"
        " loop. Dropout is drawn a second time for the choice, from a stream that is put back.",
        reference="Jiang et al. 2019",
        url="https://arxiv.org/abs/1910.00762",
    )

    def __post_init__(self) -> None:
        """Check the settings."""
        _check("SelectiveBackprop", self.keep, self.scale_factor)
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(
                "SelectiveBackprop: start and end must be in [0, 1] and in this order, got"
                f" {self.start} and {self.end}"
            )
        if self.interrupt < 0:
            raise ValueError(
                f"SelectiveBackprop: interrupt must be at least 0, got {self.interrupt}"
            )

    @classmethod
    def example(cls) -> "SelectiveBackprop":
        """Return one that acts on the network of the contract suites."""
        return cls(start=0.0, interrupt=3)

    @property
    def reads_labels(self) -> bool:
        """It needs them for the losses, and drops some."""
        return True

    def init_state(self, run: "Run") -> None:
        """Refuse a run whose length is not known."""
        _ = run.progress.fraction

    def on_batch(self, batch: Batch, run: "Run") -> Batch:
        """Keep a part of the micro-batch."""
        progress = run.progress
        selects = should_selective_backprop(
            progress.fraction, progress.step, self.start, self.end, self.interrupt
        )
        first = not (progress.step or progress.micro_batch)
        if not (selects or first):
            return batch
        small = _scaled("SelectiveBackprop", batch.input, self.scale_factor)
        losses = example_losses(run, small, batch.labels)
        if not selects:  # it was tried, as what can't be done must not be found in mid-run
            return batch
        return batch.select(_choose(losses, self.keep, run.seed_for(self)))
