"""CutMix: paste a box of another example into each image and weigh the labels by its area."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mosaic_core.algorithm import Algorithm, Card, Place
from mosaic_core.batch import Batch, describe
from mosaic_core.random import beta, permutation, span, to_device

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["CutMix", "cutmix_batch"]

_Box = tuple[int, int, int, int]


def cutmix_batch(
    input: Tensor,
    target: Tensor,
    length: float | None = None,
    alpha: float = 1.0,
    bbox: _Box | None = None,
    indices: Tensor | None = None,
    uniform_sampling: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, float, _Box]:
    """Replace, in place, a box of each image by its partner's: ``x[box] = x[box][indices]``.

    The loss to train with is ``(1 - mixing) * loss(output, target) + mixing * loss(output,
    target_perm)``, where ``mixing`` is the exact share of the pixels in the box. One box serves
    the batch. It is clipped at the borders of the image, so it may be smaller than was drawn.

    Args:
        input: Images of any dtype, shape ``(N, C, ..., H, W)``; they are written into, so nothing
            but the box is moved. Give a clone where the images are needed again.
        target: Targets of any dtype, shape ``(N, ...)``.
        length: Height and width of the box before it is clipped, as a share of those of the
            image, in (0, 1], rounded down; None draws its share of the area.
        alpha: Both parameters of the Beta distribution of that share, above 0.
        bbox: Box ``(top, left, bottom, right)`` in place of a drawn one, the last two exclusive.
        indices: Partner of each example, int64, shape ``(N,)``; None draws a permutation.
        uniform_sampling: Whether each pixel is as likely to be replaced, the centre of the box
            then being outside the image at times; else the centre is uniform over the pixels, as
            in the paper, and the middle of the image is replaced more often than its borders.
        generator: CPU generator to draw from; None draws from torch's default one.

    Returns:
        ``input`` itself, the partners' targets (a new tensor), the weight of the partner, and the
        box.

    Raises:
        ValueError: If an argument is out of range, the lengths differ, or both ``length`` and
            ``bbox`` are given.

    Example:
        >>> x, y = torch.arange(2.0).view(2, 1, 1, 1).repeat(1, 1, 2, 2), torch.tensor([0, 1])
        >>> x, y, mixing, _ = cutmix_batch(x, y, bbox=(0, 0, 1, 2), indices=torch.tensor([1, 0]))
        >>> x[0, 0], y, mixing
        (tensor([[1., 1.],
                [0., 0.]]), tensor([1, 0]), 0.5)

    References:
        Yun et al., `CutMix <https://arxiv.org/abs/1905.04899>`_, 2019, Eq. 1 and 2.
    """
    if len(input) != len(target):
        raise ValueError(
            f"cutmix_batch: target must have the length of input, {len(input)}, got {len(target)}"
        )
    if bbox is None:
        bbox = _draw_box(input, length, alpha, uniform_sampling, generator)
    elif length is not None:
        raise ValueError(f"cutmix_batch: length must be None where bbox is given, got {length}")
    if indices is None:
        indices = permutation(len(input), generator, input.device)
    mixing = _share(input, bbox)
    return _paste(input, indices, bbox), target[indices], mixing, bbox


def _draw_box(
    input: Tensor,
    length: float | None,
    alpha: float,
    uniform: bool,
    generator: torch.Generator | None,
) -> _Box:
    height, width = _size(input)
    if length is None:
        _check_alpha("cutmix_batch", alpha)
        side = math.sqrt(beta(alpha, generator))
    elif 0 < length <= 1 and length * min(height, width) >= 1:
        side = length
    else:
        raise ValueError(
            "cutmix_batch: length must be in (0, 1] and give a box of at least one pixel, got"
            f" {length} for images of {height} x {width}"
        )
    top, bottom = span(height, int(side * height), uniform, generator)
    left, right = span(width, int(side * width), uniform, generator)
    return top, left, bottom, right


def _size(input: Tensor) -> tuple[int, int]:
    if input.dim() < 4:
        raise ValueError(
            f"cutmix_batch: input must have shape (N, C, ..., H, W), got {describe(input)}"
        )
    return input.shape[-2], input.shape[-1]


def _share(input: Tensor, bbox: _Box) -> float:
    """Return the share of the pixels that lie in a box."""
    (top, left, bottom, right), (height, width) = bbox, _size(input)
    if not (0 <= top <= bottom <= height and 0 <= left <= right <= width):
        raise ValueError(
            f"cutmix_batch: bbox must be (top, left, bottom, right) in an image of {height} x"
            f" {width}, got {bbox}"
        )
    return (bottom - top) * (right - left) / (height * width)


def _paste(input: Tensor, indices: Tensor, bbox: _Box) -> Tensor:
    """Write the partners' boxes into the images, in place; only the boxes are gathered."""
    if indices.shape != (len(input),):
        raise ValueError(
            f"cutmix_batch: indices must have shape ({len(input)},), got {tuple(indices.shape)}"
        )
    top, left, bottom, right = bbox
    box = input[..., top:bottom, left:right]
    box.copy_(box.index_select(0, indices))
    return input


def _check_alpha(where: str, alpha: float) -> None:
    if not alpha > 0:
        raise ValueError(f"{where}: alpha must be above 0, got {alpha}")


@dataclass(frozen=True)
class CutMix(Algorithm):
    """Paste a box of another example into each image and weigh the labels by its area.

    Args:
        alpha: Both parameters of the Beta distribution of the box's share of the area, above 0;
            larger values draw boxes of more equal size.
        uniform_sampling: Whether each pixel is as likely to be replaced; else the box's centre is
            uniform over the pixels, as in the paper.

    Raises:
        ValueError: If ``alpha`` is not above 0.
    """

    alpha: float = 1.0
    uniform_sampling: bool = False

    place = Place.MIXING
    changes_labels = True
    excludes = frozenset({"trainer mixing"})
    card = Card(
        category="vision",
        summary="Pastes a box of another example into each image and mixes the labels by area.",
        effect="One copy of the input a step, and a box of it more; the loss interpolates between"
        " two labels. Training accuracy is measured against the example's own label and looks"
        " lower. Targets with a value for each pixel get the same box pasted instead.",
        use_when="Image classification that overfits, with more than a few epochs, where objects"
        " fill the image; short or underfitting runs lose accuracy.",
        interactions="With MixUp, both act on every batch, one after the other in the order of the"
        " recipe, and the target follows both. Adds to other regularisation, so lower weight decay"
        " or label smoothing.",
        reference="Yun et al. 2019",
        url="https://arxiv.org/abs/1905.04899",
    )

    def __post_init__(self) -> None:
        """Check the settings."""
        _check_alpha("CutMix", self.alpha)

    def on_batch(self, batch: Batch, run: "Run") -> Batch:
        """Paste the box, and mix the labels by its share of the pixels."""
        input, labels, generator = batch.input, batch.labels, run.generator(self)
        bbox = _draw_box(input, None, self.alpha, self.uniform_sampling, generator)
        indices = permutation(len(input), generator, input.device)
        mixing = _share(input, bbox)
        run.log("CutMix/mixing", mixing)
        if labels.label.dim() > 2 and labels.label.shape[-2:] == input.shape[-2:]:
            labels = labels.map(lambda label: _paste(label.clone(), indices, bbox))
        else:
            labels = labels.mix(indices, to_device(torch.tensor(mixing), input.device))
        # Into a copy, as the batch is the user's.
        return batch.replace(_paste(input.clone(), indices, bbox), labels)
