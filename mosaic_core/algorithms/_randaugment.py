"""RandAugment: a few random image operations of one strength."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mosaic_core.algorithm import Algorithm, Card, Place
from mosaic_core.augmentation import Policy, apply_each, augment, augment_batch, torchvision_for
from mosaic_core.batch import Batch

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["RandAugment", "randaugment_image"]


def randaugment_image(
    img: Any, severity: float = 9, depth: int = 2, generator: torch.Generator | None = None
) -> Any:
    """Apply ``depth`` random operations of strength ``severity`` to each image.

    Each image draws its own of the 14 operations of the paper. At severity 10 an operation has the
    largest magnitude of the paper, at 0 none; that is magnitude ``3 * severity`` of torchvision's
    0 to 30. For a data set, ``functools.partial(randaugment_image, severity=9)`` is a transform.

    Args:
        img: PIL image (L or RGB), or uint8 or floating-point tensor of shape ``(C, H, W)`` or
            ``(N, C, H, W)`` with 1 or 3 channels. Floats are taken as in [0, 1], or normalised
            where a channel leaves it: see :func:`mosaic_core.augmentation.augment_batch`.
        severity: Strength, in [0, 10].
        depth: Number of operations for each image, at least 1.
        generator: CPU generator to draw from; None draws from torch's default one.

    Returns:
        A new image or batch of the same kind, size, dtype and memory format.

    Raises:
        ImportError: If torchvision is not installed.
        TypeError: If ``img`` is of another type or dtype.
        ValueError: If an argument is out of range, or the channels are neither 1 nor 3.

    Example:
        >>> images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
        >>> randaugment_image(images, severity=5, depth=1).shape
        torch.Size([4, 3, 8, 8])

    References:
        Cubuk et al., `RandAugment <https://arxiv.org/abs/1909.13719>`_, 2020, section 3.
    """
    _check("randaugment_image", severity, depth)
    torchvision_for("randaugment_image")
    return augment("randaugment_image", img, lambda x: _randaugment(x, severity, depth, generator))


def _randaugment(
    images: Any, severity: float, depth: int, generator: torch.Generator | None
) -> Any:
    height, width = torchvision_for("RandAugment").functional.get_size(images)
    policy = Policy(
        shear=0.3,
        translate=(150 / 331 * width, 150 / 331 * height),
        rotate=30.0,
        enhance=0.9,
        bits=(8, 4),
        identity=True,
    )
    count = len(images) if isinstance(images, torch.Tensor) else 1
    for _ in range(depth):
        images = apply_each(images, policy.draw(count, [severity / 10], generator))
    return images


def _check(where: str, severity: float, depth: int) -> None:
    if not 0 <= severity <= 10:
        raise ValueError(f"{where}: severity must be in [0, 10], got {severity}")
    if depth < 1 or depth != int(depth):
        raise ValueError(f"{where}: depth must be a whole number of at least 1, got {depth}")


@dataclass(frozen=True)
class RandAugment(Algorithm):
    """Apply a few random operations of one strength to each image of a batch, on the device.

    Args:
        severity: Strength of the operations, in [0, 10], where 10 is the largest magnitude of the
            paper; torchvision's magnitude is ``3 * severity``.
        depth: Number of operations for each image, at least 1.

    Raises:
        ImportError: If torchvision is not installed.
        ValueError: If a setting is out of range.
    """

    severity: float = 9
    depth: int = 2

    place = Place.AUGMENTATION
    card = Card(
        category="vision",
        summary="Applies a few random operations of torchvision, of one strength, to each image.",
        effect="Each image draws its own operations; those that drew the same go through them"
        " together. Floats that leave [0, 1] are taken as normalised: each channel is mapped from"
        " its range in the batch to [0, 1] and back. Training accuracy looks lower.",
        use_when="Image classification with many epochs. Where the device is the bottleneck, use"
        " randaugment_image as a transform of the data set before Normalize: loader workers then"
        " do it in parallel, and on a GPU torchvision's geometric operations wait for the device.",
        interactions="Acts before mixing; each policy is tuned to be used alone, so AugMix or"
        " TrivialAugment beside it augments more than any paper did. Boxes and masks do not move.",
        reference="Cubuk et al. 2020",
        url="https://arxiv.org/abs/1909.13719",
    )

    def __post_init__(self) -> None:
        """Check the settings, and that torchvision is there."""
        _check("RandAugment", self.severity, self.depth)
        torchvision_for("RandAugment")

    def on_batch(self, batch: Batch, run: "Run") -> Batch:
        """Augment the images."""
        generator = run.generator(self)
        images = augment_batch(
            "RandAugment",
            batch.input,
            lambda x: _randaugment(x, self.severity, self.depth, generator),
        )
        return batch.replace(images)
