"""MixUp: train on blends of two examples and their labels."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mosaic_core.algorithm import Algorithm, Card, Place
from mosaic_core.batch import Batch
from mosaic_core.random import beta, permutation, to_device

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["MixUp", "mixup_batch"]


def mixup_batch(
    input: Tensor,
    target: Tensor,
    mixing: float | None = None,
    alpha: float = 0.2,
    indices: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, float]:
    """Blend each example with a partner: ``(1 - mixing) * x + mixing * x[indices]``.

    The loss to train with is ``(1 - mixing) * loss(output, target) + mixing * loss(output,
    target_perm)``. One coefficient serves the batch; as Beta(alpha, alpha) is symmetric, the
    smaller of it and its complement is taken, so the example itself dominates.

    Args:
        input: Floating-point inputs, shape ``(N, ...)``.
        target: Targets of any dtype, shape ``(N, ...)``.
        mixing: Weight of the partner, in [0, 1]; None draws it.
        alpha: Both parameters of the Beta distribution, above 0.
        indices: Partner of each example, int64, shape ``(N,)``; None draws a permutation.
        generator: CPU generator to draw from; None draws from torch's default one.

    Returns:
        The blended inputs (a new tensor of the memory format of ``input``), the partners' targets
        (a new tensor), and the weight of the partner.

    Raises:
        TypeError: If ``input`` is not floating-point.
        ValueError: If an argument is out of range or the lengths differ.

    Example:
        >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1])
        >>> mixup_batch(x, y, mixing=0.25, indices=torch.tensor([1, 0]))
        (tensor([[0.2500],
                [0.7500]]), tensor([1, 0]), 0.25)

    References:
        Zhang et al., `mixup <https://arxiv.org/abs/1710.09412>`_, 2018, Eq. 1.
    """
    if len(input) != len(target):
        raise ValueError(
            f"mixup_batch: target must have the length of input, {len(input)}, got {len(target)}"
        )
    if mixing is None:
        mixing = _draw_mixing(alpha, generator)
    if indices is None:
        indices = permutation(len(input), generator, input.device)
    return _blend(input, indices, mixing), target[indices], mixing


def _draw_mixing(alpha: float, generator: torch.Generator | None) -> float:
    """Draw the smaller of z and 1 - z, z from Beta(alpha, alpha), on the CPU."""
    _check_alpha("mixup_batch", alpha)
    z = beta(alpha, generator)
    return min(z, 1 - z)


def _blend(input: Tensor, indices: Tensor, mixing: float) -> Tensor:
    if not input.is_floating_point():
        raise TypeError(
            f"mixup_batch: input must be floating-point, got {input.dtype}; convert integer images"
            " first, for example with x.float() / 255"
        )
    if not 0 <= mixing <= 1:
        raise ValueError(f"mixup_batch: mixing must be in [0, 1], got {mixing}")
    if indices.shape != (len(input),):
        raise ValueError(
            f"mixup_batch: indices must have shape ({len(input)},), got {tuple(indices.shape)}"
        )
    # The partners are gathered into the result and blended in place: one allocation.
    return input[indices].lerp_(input, 1 - mixing)


def _check_alpha(where: str, alpha: float) -> None:
    if not alpha > 0:
        raise ValueError(f"{where}: alpha must be above 0, got {alpha}")


@dataclass(frozen=True)
class MixUp(Algorithm):
    """Train on blends of two examples and their labels.

    Args:
        alpha: Both parameters of the Beta distribution the blend is drawn from, above 0;
            larger values blend more evenly.

    Raises:
        ValueError: If ``alpha`` is not above 0.
    """

    alpha: float = 0.2

    place = Place.MIXING
    changes_labels = True
    excludes = frozenset({"trainer mixing"})
    card = Card(
        category="vision",
        summary="Trains on convex combinations of pairs of examples and of their labels.",
        effect="One blended copy of the input a step; the loss interpolates between two labels."
        " Training accuracy is measured against the example's own label and looks lower.",
        use_when="Image classification that overfits, with more than a few epochs; short or"
        " underfitting runs lose accuracy.",
        interactions="Adds to other regularisation, so lower weight decay or label smoothing. With"
        " CutMix, both act on every batch, one after the other. Batch structure is kept: any loss"
        " that mosaic knows computes the mixture.",
        reference="Zhang et al. 2018",
        url="https://arxiv.org/abs/1710.09412",
    )

    def __post_init__(self) -> None:
        """Check the settings."""
        _check_alpha("MixUp", self.alpha)

    def on_batch(self, batch: Batch, run: "Run") -> Batch:
        """Blend the inputs, and the labels alike."""
        generator = run.generator(self)
        mixing = _draw_mixing(self.alpha, generator)
        indices = permutation(len(batch.input), generator, batch.input.device)
        input = _blend(batch.input, indices, mixing)
        run.log("MixUp/mixing", mixing)
        weight = to_device(torch.tensor(mixing), batch.input.device)
        return batch.replace(input, batch.labels.mix(indices, weight))
