"""AugMix: blend an image with several randomly augmented copies of it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mosaic_core.algorithm import Algorithm, Card, Place
from mosaic_core.augmentation import Policy, apply_each, augment, augment_batch, torchvision_for
from mosaic_core.batch import Batch
from mosaic_core.random import to_device

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["AugMix", "augmix_image"]


def augmix_image(
    img: Any,
    severity: int = 3,
    width: int = 3,
    depth: int = -1,
    alpha: float = 1.0,
    generator: torch.Generator | None = None,
) -> Any:
    """Return ``(1 - m) * x + m * sum_i w_i * chain_i(x)`` for each image ``x``.

    Each of the ``width`` chains applies ``depth`` random operations; the weights ``w`` come from
    Dirichlet(alpha, ..., alpha) and ``m`` from Beta(alpha, alpha). Each image draws its own. Each
    operation draws one of the ``severity`` weakest of torchvision's ten strengths. For a data set,
    ``functools.partial(augmix_image, severity=3)`` is a transform.

    Args:
        img: PIL image (L or RGB), or uint8 or floating-point tensor of shape ``(C, H, W)`` or
            ``(N, C, H, W)`` with 1 or 3 channels. Floats are taken as in [0, 1], or normalised
            where a channel leaves it: see :func:`mosaic_core.augmentation.augment_batch`.
        severity: Number of strengths to draw from, in 1, ..., 10.
        width: Number of chains, at least 1.
        depth: Number of operations in a chain, at least 1; -1 draws 1, 2 or 3 for each chain.
        alpha: All parameters of the Dirichlet and the Beta distribution, above 0.
        generator: CPU generator to draw from; None draws from torch's default one.

    Returns:
        A new image or batch of the same kind, size, dtype and memory format.

    Raises:
        ImportError: If torchvision is not installed.
        TypeError: If ``img`` is of another type or dtype.
        ValueError: If an argument is out of range, or the channels are neither 1 nor 3.

    Example:
        >>> images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
        >>> augmix_image(images, severity=5, width=2).shape
        torch.Size([4, 3, 8, 8])

    References:
        Hendrycks et al., `AugMix <https://arxiv.org/abs/1912.02781>`_, 2020, Algorithm 1.
    """
    _check("augmix_image", severity, width, depth, alpha)
    vision = torchvision_for("augmix_image").functional

    def mix(images: Any) -> Any:
        if isinstance(images, Tensor):
            return _augmix(images, severity, width, depth, alpha, generator)
        return vision.to_pil_image(mix(vision.pil_to_tensor(images)[None])[0])

    return augment("augmix_image", img, mix)


def _augmix(
    images: Tensor,
    severity: int,
    width: int,
    depth: int,
    alpha: float,
    generator: torch.Generator | None,
) -> Tensor:
    count, _, high, wide = images.shape
    policy = Policy(
        shear=0.3,
        translate=(wide / 3, high / 3),
        rotate=30.0,
        enhance=0.9,
        bits=(4, 0),
        identity=False,
    )
    levels = [k / 9 for k in range(severity)]
    chains = images.repeat(width, 1, 1, 1)
    lengths = [depth] * len(chains)
    if depth < 0:
        lengths = torch.randint(1, 4, (len(chains),), generator=generator).tolist()
    for step in range(max(lengths)):
        drawn = policy.draw(len(chains), levels, generator)
        due = [
            operation if step < length else ("Identity", 0)
            for operation, length in zip(drawn, lengths, strict=True)
        ]
        chains = apply_each(chains, due, "bilinear")

    weights = to_device(_draw_weights(count, width, alpha, generator), images.device)
    weights = weights.reshape(1 + width, count, 1, 1, 1)
    mixed = images * weights[0]
    for weight, chain in zip(weights[1:], chains.split(count), strict=True):
        mixed.addcmul_(chain.to(mixed.dtype), weight)
    return mixed if images.is_floating_point() else mixed.round_().to(images.dtype)


def _draw_weights(
    count: int, width: int, alpha: float, generator: torch.Generator | None
) -> Tensor:
    """Draw the weights of the image itself and of its chains, float32, shape ``(1 + width, N)``."""
    # torch's own distributions take no generator, so the generator seeds NumPy's.
    rng = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=generator)))
    m = rng.beta(alpha, alpha, count)
    weights = np.stack([1 - m, *(m * rng.dirichlet([alpha] * width, count).T)])
    return torch.from_numpy(weights).float()


def _check(where: str, severity: int, width: int, depth: int, alpha: float) -> None:
    if severity not in range(1, 11):
        raise ValueError(f"{where}: severity must be one of 1, ..., 10, got {severity}")
    if width < 1 or width != int(width):
        raise ValueError(f"{where}: width must be a whole number of at least 1, got {width}")
    if (depth < 1 and depth != -1) or depth != int(depth):
        raise ValueError(
            f"{where}: depth must be a whole number of at least 1, or -1 to draw it, got {depth}"
        )
    if not alpha > 0:
        raise ValueError(f"{where}: alpha must be above 0, got {alpha}")


@dataclass(frozen=True)
class AugMix(Algorithm):
    """Blend each image of a batch with several randomly augmented copies of it, on the device.

    Args:
        severity: Number of strengths each operation draws from, in 1, ..., 10; torchvision's.
        width: Number of augmented copies, at least 1.
        depth: Number of operations on each copy, at least 1; -1 draws 1, 2 or 3 for each copy.
        alpha: Parameter of the Dirichlet and Beta distributions that weight them, above 0.

    Raises:
        ImportError: If torchvision is not installed.
        ValueError: If a setting is out of range.
    """

    severity: int = 3
    width: int = 3
    depth: int = -1
    alpha: float = 1.0

    place = Place.AUGMENTATION
    card = Card(
        category="vision",
        summary="Blends each image with several randomly augmented copies of itself.",
        effect="Holds as many copies of the batch as its width. Each image draws its own operations"
        " and weights. Floats that leave [0, 1] are taken as normalised: each channel is mapped"
        " from its range in the batch to [0, 1] and back.",
        use_when="Image classification that must be robust to corruptions and shifts. Where the"
        " device is the bottleneck, use augmix_image as a transform of the data set before"
        " Normalize: loader workers then do it in parallel, and on a GPU torchvision's geometric"
        " operations wait for the device.",
        interactions="Acts before mixing; without the paper's consistency loss, which needs three"
        " forwards of each image. Each policy is tuned to be used alone, so RandAugment or"
        " TrivialAugment beside it augments more than any paper did.",
        reference="Hendrycks et al. 2020",
        url="https://arxiv.org/abs/1912.02781",
    )

    def __post_init__(self) -> None:
        """Check the settings, and that torchvision is there."""
        _check("AugMix", self.severity, self.width, self.depth, self.alpha)
        torchvision_for("AugMix")

    def on_batch(self, batch: Batch, run: "Run") -> Batch:
        """Augment the images."""
        generator = run.generator(self)
        images = augment_batch(
            "AugMix",
            batch.input,
            lambda x: _augmix(
                x, self.severity, self.width, self.depth, self.alpha, generator=generator
            ),
        )
        return batch.replace(images)
