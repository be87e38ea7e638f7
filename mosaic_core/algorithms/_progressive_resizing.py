"""ProgressiveResizing: train on small images first and let them grow."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic_core.algorithm import Algorithm, Card, Place
from mosaic_core.batch import Batch
from mosaic_core.errors import UnsupportedError

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["ProgressiveResizing", "resize_batch"]

Mode = Literal["resize", "crop"]


def resize_batch(
    input: Tensor,
    target: Tensor,
    scale_factor: float,
    mode: Mode = "resize",
    resize_targets: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Make images smaller: each side becomes ``round(scale_factor * side)``, at least 1.

    ``"resize"`` interpolates bilinearly with antialiasing, as image loaders do, in float32 or
    better; integer images are rounded. A target of integers is a mask of classes, which can't be
    interpolated: it keeps the value nearest to the centre of each new pixel.

    Args:
        input: Images of any dtype, shape ``(N, C, H, W)``.
        target: Targets of any dtype; where they are resized, shape ``(N, ..., H, W)``.
        scale_factor: Length of a side relative to now, in (0, 1].
        mode: ``"resize"`` interpolates, ``"crop"`` cuts one random window out of all images.
        resize_targets: Whether the targets are made smaller alike.
        generator: CPU generator to draw the window from; None draws from torch's default one.

    Returns:
        New inputs, in the memory format of the old, and new targets; the given ones where nothing
        is done to them.

    Raises:
        ValueError: If an argument is out of range or a shape does not fit.

    Example:
        >>> images, masks = torch.ones(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long)
        >>> x, y = resize_batch(images, masks, 0.5, resize_targets=True)
        >>> x.shape, y.shape
        (torch.Size([2, 3, 4, 4]), torch.Size([2, 4, 4]))

    References:
        Tan and Le, `EfficientNetV2 <https://arxiv.org/abs/2104.00298>`_, 2021, section 4.
    """
    _check_mode("resize_batch", mode)
    if not 0 < scale_factor <= 1:
        raise ValueError(f"resize_batch: scale_factor must be in (0, 1], got {scale_factor}")
    height, width = _sides(input)
    size = max(1, round(scale_factor * height)), max(1, round(scale_factor * width))
    if size == (height, width):
        return input, target
    if resize_targets:
        _check_target(input, target)
    corner = _draw_corner(input, size, generator) if mode == "crop" else None
    resized = _shrink(input, size, corner)
    return resized, _shrink(target, size, corner, _is_mask(target)) if resize_targets else target


def _shrink(
    images: Tensor, size: tuple[int, int], corner: tuple[int, int] | None, nearest: bool = False
) -> Tensor:
    """Cut a window out at a corner, or resize; shape ``(..., H, W)``."""
    if corner is not None:
        (top, left), (height, width) = corner, size
        return images[..., top : top + height, left : left + width].clone()
    if nearest:
        for dim, new in zip((-2, -1), size, strict=True):
            old = images.shape[dim]
            centres = torch.arange(new, device=images.device).mul_(2).add_(1).mul_(old)
            images = images.index_select(dim, centres.div_(2 * new, rounding_mode="floor"))
        return images
    batch = images if images.dim() == 4 else images.reshape(len(images), -1, *images.shape[-2:])
    precise = batch.to(torch.promote_types(batch.dtype, torch.float32))
    precise = F.interpolate(precise, size, mode="bilinear", antialias=True)
    if not images.is_floating_point():
        precise = precise.round_()
    return precise.to(images.dtype).reshape(*images.shape[:-2], *size)


def _draw_corner(
    images: Tensor, size: tuple[int, int], generator: torch.Generator | None
) -> tuple[int, int]:
    """Draw the upper left corner of a window, uniformly, on the CPU."""
    room = (side - new + 1 for side, new in zip(images.shape[-2:], size, strict=True))
    top, left = (int(torch.randint(choices, (), generator=generator)) for choices in room)
    return top, left


def _is_mask(target: Tensor) -> bool:
    return not target.is_floating_point()


def _sides(input: Tensor) -> tuple[int, int]:
    if input.dim() != 4:
        raise ValueError(
            f"resize_batch: input must have shape (N, C, H, W), got {tuple(input.shape)}"
        )
    return input.shape[2], input.shape[3]


def _check_target(input: Tensor, target: Tensor) -> None:
    if target.dim() < 3 or target.shape[-2:] != input.shape[-2:]:
        raise ValueError(
            "resize_batch: target must have shape (N, ..., H, W) with the height and width of"
            f" input, {tuple(input.shape[-2:])}, got {tuple(target.shape)}; with"
            " resize_targets=False it stays"
        )


def _check_mode(where: str, mode: str) -> None:
    if mode not in ("resize", "crop"):
        raise ValueError(f"{where}: mode must be 'resize' or 'crop', got {mode!r}")


@dataclass(frozen=True)
class ProgressiveResizing(Algorithm):
    """Train on small images first and let them grow to their full size.

    The scale follows the fraction ``t`` of the whole run that is done, step by step: it is
    ``initial_scale`` until ``delay_fraction``, grows linearly, and is 1 from ``1 -
    finetune_fraction`` on. Each side becomes the multiple of ``size_increment``, or the full side,
    that lies nearest.

    Args:
        mode: ``"resize"`` interpolates; ``"crop"`` cuts one random window out of each batch.
        initial_scale: Scale at the beginning, in (0, 1].
        finetune_fraction: Fraction of the run at its end with full images, in [0, 1].
        delay_fraction: Fraction of the run at its beginning with the smallest images, in [0, 1];
            together with ``finetune_fraction`` at most 1.
        size_increment: Multiple, in pixels, that sides are rounded to, at least 1.
        resize_targets: Whether targets ``(N, ..., H, W)``, such as masks, shrink alike.

    Raises:
        ValueError: If a setting is out of range.
    """

    mode: Mode = "resize"
    initial_scale: float = 0.5
    finetune_fraction: float = 0.2
    delay_fraction: float = 0.5
    size_increment: int = 4
    resize_targets: bool = False

    place = Place.AUGMENTATION
    card = Card(
        category="vision",
        summary="Trains on small images first and lets them grow to full size.",
        effect="Steps are faster and need less memory while images are small: at half the sides"
        " a quarter of the work. Evaluation sees full images. Resizing is antialiased bilinear,"
        " nearest for integer masks.",
        use_when="Convolutional networks that take images of any size and where the device, not the"
        " loader, is the bottleneck; not with position embeddings of a fixed size.",
        interactions="Acts before mixing; among augmentations in the order of the recipe, and first"
        " is cheapest. A compiled model compiles anew for each size, so take a large"
        " size_increment. Needs a run of known length.",
        reference="Tan and Le 2021",
        url="https://arxiv.org/abs/2104.00298",
    )

    @classmethod
    def example(cls) -> "ProgressiveResizing":
        """Return one that acts on the network of the contract suites."""
        return cls(initial_scale=0.75, size_increment=2)

    def __post_init__(self) -> None:
        """Check the settings."""
        _check_mode("ProgressiveResizing", self.mode)
        if not 0 < self.initial_scale <= 1:
            raise ValueError(
                f"ProgressiveResizing: initial_scale must be in (0, 1], got {self.initial_scale}"
            )
        for name in ("finetune_fraction", "delay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"ProgressiveResizing: {name} must be in [0, 1], got {getattr(self, name)}"
                )
        if self.delay_fraction + self.finetune_fraction > 1:
            raise ValueError(
                "ProgressiveResizing: delay_fraction + finetune_fraction must be at most 1, got"
                f" {self.delay_fraction} + {self.finetune_fraction}"
            )
        if self.size_increment < 1:
            raise ValueError(
                f"ProgressiveResizing: size_increment must be at least 1, got {self.size_increment}"
            )

    @property
    def reads_labels(self) -> bool:
        """Only where it resizes them."""
        return self.resize_targets

    def init_state(self, run: "Run") -> None:
        """Refuse a run that can't tell how much of it is done."""
        if not run.progress.total_steps:
            raise UnsupportedError(
                "ProgressiveResizing: images grow with the fraction of the whole run that is done,"
                " and the length of this run is unknown; give it a fixed length (a number of steps,"
                " or epochs over a loader with a length), or call resize_batch with a scale of"
                " your own"
            )

    def on_batch(self, batch: Batch, run: "Run") -> Batch:
        """Shrink the images, and the targets alike where they are to be resized."""
        scale = self._scale(run.progress.fraction)
        full = _sides(batch.input)
        size = self._side(full[0], scale), self._side(full[1], scale)
        run.log("ProgressiveResizing/scale", scale)
        if size == full:
            return batch
        corner = None
        if self.mode == "crop":
            corner = _draw_corner(batch.input, size, run.generator(self))
        input = _shrink(batch.input, size, corner)
        if not self.resize_targets:
            return batch.replace(input)
        label = batch.labels.label
        _check_target(batch.input, label)
        nearest = _is_mask(label)  # then so are weights of pixels
        return batch.replace(input, batch.labels.map(lambda t: _shrink(t, size, corner, nearest)))

    def _scale(self, done: float) -> float:
        left = 1 - self.finetune_fraction - done
        if left <= 1e-9:  # fractions such as 0.3 have no exact floating-point number
            return 1.0
        passed = max(0.0, done - self.delay_fraction)
        return self.initial_scale + (1 - self.initial_scale) * passed / (passed + left)

    def _side(self, full: int, scale: float) -> int:
        """Return the multiple, or the full side, nearest to the scaled side; the larger of two."""
        exact, increment = scale * full, self.size_increment
        below = int(exact // increment) * increment
        above = min(below + increment, full)
        return below if below and exact - below < above - exact else above
