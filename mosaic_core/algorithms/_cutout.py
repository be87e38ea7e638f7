"""CutOut: blank square holes in the images."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mosaic_core.algorithm import Algorithm, Card, Place
from mosaic_core.batch import Batch, describe
from mosaic_core.random import span

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["CutOut", "cutout_batch"]


def cutout_batch(
    input: Any,
    num_holes: int = 1,
    length: float = 0.5,
    uniform_sampling: bool = False,
    generator: torch.Generator | None = None,
) -> Any:
    """Set square holes to zero in an image, or in all images of a batch alike.

    Args:
        input: A PIL image of any mode, or a tensor of any dtype, shape ``(C, H, W)`` or
            ``(N, C, ..., H, W)``.
        num_holes: Number of holes, at least 1; they may overlap.
        length: Side of a hole as a share of the smaller of H and W, in (0, 1], rounded down to
            pixels. A hole is clipped at the borders of the image, so it may be smaller.
        uniform_sampling: Whether each pixel is as likely to be blanked, the centre of a hole then
            being outside the image at times; else the centre is uniform over the pixels, as in
            the paper, and the middle of the image is blanked more often than its borders.
        generator: CPU generator to draw from; None draws from torch's default one.

    Returns:
        A new image or tensor of the type, mode, shape, dtype and memory format of ``input``.

    Raises:
        TypeError: If ``input`` is neither a tensor nor a PIL image.
        ValueError: If an argument is out of range.

    Example:
        >>> cutout_batch(torch.ones(3, 8, 8), generator=torch.Generator().manual_seed(0)).mean()
        tensor(0.8125)

    References:
        DeVries and Taylor, `Improved Regularization of Convolutional Neural Networks with Cutout
        <https://arxiv.org/abs/1708.04552>`_, 2017, section 3.
    """
    _check("cutout_batch", num_holes, length)
    if isinstance(input, Tensor):
        if input.dim() < 3:
            raise ValueError(
                f"cutout_batch: input must have shape (..., C, H, W), got {describe(input)}"
            )
        output, height, width = input.clone(), *input.shape[-2:]
    elif hasattr(input, "paste"):  # a PIL image, known without importing Pillow
        output, height, width = input.copy(), input.height, input.width
    else:
        raise TypeError(
            f"cutout_batch: input must be a tensor or a PIL image, got {describe(input)}"
        )
    side = int(length * min(height, width))
    if side < 1:
        raise ValueError(
            f"cutout_batch: length must give a hole of at least one pixel, got {length} for images"
            f" of {height} x {width}"
        )
    for _ in range(num_holes):
        top, bottom = span(height, side, uniform_sampling, generator)
        left, right = span(width, side, uniform_sampling, generator)
        if isinstance(output, Tensor):
            output[..., top:bottom, left:right] = 0
        else:
            output.paste(0, (left, top, right, bottom))
    return output


def _check(where: str, num_holes: int, length: float) -> None:
    if num_holes < 1:
        raise ValueError(f"{where}: num_holes must be at least 1, got {num_holes}")
    if not 0 < length <= 1:
        raise ValueError(f"{where}: length must be in (0, 1], got {length}")


@dataclass(frozen=True)
class CutOut(Algorithm):
    """Blank square holes in the images.

    Args:
        num_holes: Number of holes, at least 1; they may overlap.
        length: Side of a hole as a share of the shorter side of the image, in (0, 1].
        uniform_sampling: Whether each pixel is as likely to be blanked; else a hole's centre is
            uniform over the pixels, as in the paper.

    Raises:
        ValueError: If a setting is out of range.
    """

    num_holes: int = 1
    length: float = 0.5
    uniform_sampling: bool = False

    place = Place.AUGMENTATION
    card = Card(
        category="vision",
        summary="Sets square holes in the images to zero, at the same places in a whole batch.",
        effect="One copy of the input a step. Labels stay.",
        use_when="Image classification that overfits; zero should be the mean of the data, as it is"
        " after normalisation. Adds little to a run that mixes images already.",
        interactions="Acts before MixUp and CutMix, whose target is that of the images without"
        " holes. Adds to other regularisation.",
        reference="DeVries and Taylor 2017",
        url="https://arxiv.org/abs/1708.04552",
    )

    def __post_init__(self) -> None:
        """Check the settings."""
        _check("CutOut", self.num_holes, self.length)

    def on_batch(self, batch: Batch, run: "Run") -> Batch:
        """Blank the holes."""
        if batch.input.dim() < 4:
            raise ValueError(
                f"CutOut: the input must have shape (N, C, ..., H, W), got {describe(batch.input)}"
            )
        return batch.replace(
            cutout_batch(batch.input, **self.settings, generator=run.generator(self))
        )
