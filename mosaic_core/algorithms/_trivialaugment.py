"""TrivialAugment: one random image operation of random strength, and nothing to tune."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mosaic_core.algorithm import Algorithm, Card, Place
from mosaic_core.augmentation import Policy, apply_each, augment, augment_batch, torchvision_for
from mosaic_core.batch import Batch

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["TrivialAugment", "trivialaugment_image"]

# The "wide" space of the paper, with its 31 strengths.
_POLICY = Policy(
    shear=0.99, translate=(32.0, 32.0), rotate=135.0, enhance=0.99, bits=(8, 2), identity=True
)
_LEVELS = [k / 30 for k in range(31)]


def trivialaugment_image(img: Any, generator: torch.Generator | None = None) -> Any:
    """Apply one random operation of random strength to each image.

    Each image draws its own of the 14 operations of the paper's wide space, and one of 31
    strengths. The function itself is a transform for a data set.

    Args:
        img: PIL image (L or RGB), or uint8 or floating-point tensor of shape ``(C, H, W)`` or
            ``(N, C, H, W)`` with 1 or 3 channels. Floats are taken as in [0, 1], or normalised
            where a channel leaves it: see :func:`mosaic_core.augmentation.augment_batch`.
        generator: CPU generator to draw from; None draws from torch's default one.

    Returns:
        A new image or batch of the same kind, size, dtype and memory format.

    Raises:
        ImportError: If torchvision is not installed.
        TypeError: If ``img`` is of another type or dtype.
        ValueError: If the channels are neither 1 nor 3.

    Example:
        >>> images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
        >>> trivialaugment_image(images).shape
        torch.Size([4, 3, 8, 8])

    References:
        Müller and Hutter, `TrivialAugment <https://arxiv.org/abs/2103.10158>`_, 2021, section 3.
    """
    torchvision_for("trivialaugment_image")
    return augment("trivialaugment_image", img, lambda x: _trivialaugment(x, generator))


def _trivialaugment(images: Any, generator: torch.Generator | None) -> Any:
    count = len(images) if isinstance(images, torch.Tensor) else 1
    return apply_each(images, _POLICY.draw(count, _LEVELS, generator))


@dataclass(frozen=True)
class TrivialAugment(Algorithm):
    """Apply one random operation of random strength to each image of a batch, on the device.

    Raises:
        ImportError: If torchvision is not installed.
    """

    place = Place.AUGMENTATION
    card = Card(
        category="vision",
        summary="Applies one random operation of torchvision, of random strength, to each image.",
        effect="Each image draws its own operation and strength; those that drew the same go"
        " through it together. Floats that leave [0, 1] are taken as normalised: each channel is"
        " mapped from its range in the batch to [0, 1] and back. Training accuracy looks lower.",
        use_when="Image classification with many epochs and no time to tune an augmentation. Where"
        " the device is the bottleneck, use trivialaugment_image as a transform of the data set"
        " before Normalize: loader workers then do it in parallel, and on a GPU torchvision's"
        " geometric operations wait for the device.",
        interactions="Acts before mixing; each policy is made to be used alone, so RandAugment or"
        " AugMix beside it augments more than any paper did. Boxes and masks do not move. Shifts"
        " of up to 32 pixels and turns of up to 135 degrees are meant for natural images.",
        reference="Müller and Hutter 2021",
        url="https://arxiv.org/abs/2103.10158",
    )

    def __post_init__(self) -> None:
        """Check that torchvision is there."""
        torchvision_for("TrivialAugment")

    def on_batch(self, batch: Batch, run: "Run") -> Batch:
        """Augment the images."""
        generator = run.generator(self)
        images = augment_batch(
            "TrivialAugment", batch.input, lambda x: _trivialaugment(x, generator)
        )
        return batch.replace(images)
