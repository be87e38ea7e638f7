"""Random image operations on whole batches: what RandAugment, TrivialAugment and AugMix share.

The operations are those of ``torchvision.transforms.v2.functional``. Every image draws its own,
and the images that drew the same go through it together: a batch of hundreds takes some dozen calls
of torchvision, not one an image.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mosaic_core.random import to_device

__all__ = ["Operation", "Policy", "apply_each", "augment", "augment_batch", "torchvision_for"]

Operation = tuple[str, float]
"""Name and magnitude of an operation."""

_NAMES = (
    *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    *("Brightness", "Color", "Contrast", "Sharpness"),
    *("Posterize", "Solarize", "AutoContrast", "Equalize"),
)


def torchvision_for(where: str) -> Any:
    """Return ``torchvision.transforms.v2``, which is imported only when it is used.

    Raises:
        ImportError: If torchvision is not installed; the message tells how to install it.
    """
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise ImportError(
            f'{where}: needs torchvision, which is optional; pip install "mosaic-core[vision]"'
        ) from error
    return v2


@dataclass(frozen=True)
class Policy:
    """Operations to draw from, and their magnitudes at level 1; they are linear in the level.

    Attributes:
        shear: Slope.
        translate: Shift along x and along y, in pixels.
        rotate: Angle, in degrees.
        enhance: Distance from 1 of the factor of brightness, colour, contrast and sharpness.
        bits: Bits that posterizing keeps at level 0 and at level 1.
        identity: Whether doing nothing is one of the operations.
    """

    shear: float
    translate: tuple[float, float]
    rotate: float
    enhance: float
    bits: tuple[int, int]
    identity: bool

    def draw(
        self, count: int, levels: Sequence[float], generator: torch.Generator | None
    ) -> list[Operation]:
        """Draw, uniformly and for each image, an operation, its level and its sign.

        Args:
            count: Number of images.
            levels: Levels to draw from, in [0, 1].
            generator: CPU generator to draw from; None draws from torch's default one.
        """
        names = (*_NAMES, "Identity") if self.identity else _NAMES

        def draw(choices: int) -> list[int]:
            drawn: list[int] = torch.randint(choices, (count,), generator=generator).tolist()
            return drawn

        return [
            (names[name], self._magnitude(names[name], levels[level], (1, -1)[negative]))
            for name, level, negative in zip(
                draw(len(names)), draw(len(levels)), draw(2), strict=True
            )
        ]

    def _magnitude(self, name: str, level: float, sign: int) -> float:
        match name:
            case "ShearX" | "ShearY":
                return sign * level * self.shear
            case "TranslateX":
                return int(sign * level * self.translate[0])  # torchvision shifts whole pixels
            case "TranslateY":
                return int(sign * level * self.translate[1])
            case "Rotate":
                return sign * level * self.rotate
            case "Brightness" | "Color" | "Contrast" | "Sharpness":
                return sign * level * self.enhance
            case "Posterize":
                return round(self.bits[0] + level * (self.bits[1] - self.bits[0]))
            case "Solarize":
                return 1 - level  # of the brightest value: what is brighter is inverted
            case _:
                return 0  # there is no weaker and stronger


def apply_each(images: Any, operations: Sequence[Operation], interpolation: str = "nearest") -> Any:
    """Apply to each image its own operation.

    Args:
        images: uint8 or float in [0, 1], shape ``(N, C, H, W)``; or one PIL image.
        operations: One an image.
        interpolation: How the geometric operations interpolate.

    Returns:
        New images, or those given where nothing is done to any.
    """
    members: dict[Operation, list[int]] = {}
    for i, operation in enumerate(operations):
        members.setdefault(operation, []).append(i)
    if len(members) == 1:
        return _apply(images, *operations[0], interpolation)
    order = torch.tensor([i for each in members.values() for i in each])
    parts = to_device(order, images.device).split([len(each) for each in members.values()])
    out = torch.empty_like(images)
    for part, operation in zip(parts, members, strict=True):
        out.index_copy_(0, part, _apply(images[part], *operation, interpolation))
    return out


def _apply(images: Any, name: str, magnitude: float, interpolation: str) -> Any:
    v2 = torchvision_for("mosaic")
    vision, mode = v2.functional, v2.InterpolationMode(interpolation)

    def affine(
        translate: tuple[float, float] = (0, 0),
        shear: tuple[float, float] = (0.0, 0.0),
        center: list[float] | None = None,
    ) -> Any:
        return vision.affine(images, 0.0, list(translate), 1.0, list(shear), mode, center=center)

    match name:
        case "ShearX":
            return affine(shear=(math.degrees(math.atan(magnitude)), 0.0), center=[0, 0])
        case "ShearY":
            return affine(shear=(0.0, math.degrees(math.atan(magnitude))), center=[0, 0])
        case "TranslateX":
            return affine(translate=(magnitude, 0))
        case "TranslateY":
            return affine(translate=(0, magnitude))
        case "Rotate":
            return vision.rotate(images, magnitude, mode)
        case "Brightness":
            return vision.adjust_brightness(images, 1 + magnitude)
        case "Color":
            return vision.adjust_saturation(images, 1 + magnitude)
        case "Contrast":
            return vision.adjust_contrast(images, 1 + magnitude)
        case "Sharpness":
            return vision.adjust_sharpness(images, 1 + magnitude)
        case "Posterize":
            return vision.posterize(images, int(magnitude))
        case "Solarize":
            unit = isinstance(images, Tensor) and images.is_floating_point()
            return vision.solarize(images, magnitude if unit else 255 * magnitude)
        case "AutoContrast":
            return vision.autocontrast(images)
        case "Equalize":
            return vision.equalize(images)
        case _:
            return images


def augment(where: str, img: Any, function: Callable[[Any], Any]) -> Any:
    """Run a function of one PIL image, or of a batch as in :func:`augment_batch`, on an image.

    Args:
        where: The caller, to open error messages.
        img: PIL image of mode L or RGB, or tensor ``(C, H, W)`` or ``(N, C, H, W)``.
        function: Takes the PIL image, or a batch, and returns the same.

    Raises:
        TypeError: If it is neither a PIL image nor a uint8 or floating-point tensor.
        ValueError: If it has not 1 or 3 channels.
    """
    if isinstance(img, Tensor):
        if img.dim() == 3:
            return augment_batch(where, img[None], function)[0]
        return augment_batch(where, img, function)
    mode = getattr(img, "mode", None)
    if mode is None:
        raise TypeError(f"{where}: img must be a PIL image or a tensor, got {type(img).__name__}")
    if mode not in ("L", "RGB"):
        raise ValueError(
            f"{where}: img must be of mode L or RGB, got {mode}; use img.convert('RGB')"
        )
    return function(img)


def augment_batch(where: str, images: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Run a function of a batch that is uint8, or float32 or better in [0, 1], on any batch.

    Floats may be normalised: a channel that leaves [0, 1] somewhere in the batch is mapped so that
    its smallest and its largest value, or 0 and 1 where these lie farther out, become 0 and 1; and
    it is mapped back afterwards. Where the batch holds black and white, as batches of photographs
    do, that undoes the normalisation. Floats in [0, 1] stay as they are.

    Args:
        where: The caller, to open error messages.
        images: uint8 or floating-point, shape ``(N, C, H, W)`` with C 1 or 3.
        function: Takes a batch and returns it or a new one, which is then changed in place.

    Raises:
        TypeError: If the images are of another dtype.
        ValueError: If they are of another shape.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"{where}: images must have shape (N, C, H, W) with 1 or 3 channels, got"
            f" {tuple(images.shape)}"
        )
    if images.dtype == torch.uint8:
        return function(images)
    if not images.is_floating_point():
        raise TypeError(f"{where}: images must be uint8 or floating-point, got {images.dtype}")
    precise = images.to(torch.promote_types(images.dtype, torch.float32))
    low = precise.amin((0, 2, 3), keepdim=True).clamp_(max=0)
    span = precise.amax((0, 2, 3), keepdim=True).clamp_(min=1) - low
    unit = (precise - low).div_(span).clamp_(0, 1)  # which rounding may leave
    return function(unit).mul_(span).add_(low).to(images.dtype)
