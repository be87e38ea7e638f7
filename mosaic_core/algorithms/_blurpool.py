"""BlurPool: low-pass filter feature maps before they are subsampled."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from mosaic_core.algorithm import Algorithm, Card, Place
from mosaic_core.surgery import original_class, swap_class, warn_no_effect

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["BlurPool", "apply_blurpool", "blur_pool2d"]


def blur_pool2d(input: Tensor, filter: Tensor, stride: int | tuple[int, int] = 1) -> Tensor:
    """Filter every channel by a 3x3 kernel with zero padding, then subsample.

    Args:
        input: Feature maps, floating-point, shape ``(N, C, H, W)`` or ``(C, H, W)``.
        filter: One kernel, shape ``(1, 1, 3, 3)``; it takes the dtype of ``input``.
        stride: Subsampling step in H and W.

    Returns:
        A new tensor of shape ``(N, C, (H - 1) // stride + 1, (W - 1) // stride + 1)``.

    References:
        Zhang, `Making Convolutional Networks Shift-Invariant Again
        <https://arxiv.org/abs/1904.11486>`_, 2019, section 3.2.
    """
    channels = input.shape[-3]
    weight = filter.to(input.dtype).expand(channels, 1, 3, 3)
    return F.conv2d(input, weight, stride=stride, padding=1, groups=channels)


def _binomial() -> Tensor:
    row = torch.tensor([1.0, 2.0, 1.0])
    return (torch.outer(row, row) / 16).view(1, 1, 3, 3)


class BlurConv2d(nn.Conv2d):
    """A strided convolution of blurred feature maps."""

    blur_filter: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Blur, then convolve with the stride."""
        return super().forward(blur_pool2d(input, self.blur_filter))


class ConvBlur2d(nn.Conv2d):
    """A convolution at full resolution, blurred and then subsampled."""

    blur_filter: Tensor
    blur_stride: tuple[int, int]

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with stride 1, then blur with the stride."""
        return blur_pool2d(super().forward(input), self.blur_filter, self.blur_stride)


class BlurMaxPool2d(nn.MaxPool2d):
    """A max-pool at full resolution, blurred and then subsampled."""

    blur_filter: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Take the maximum with stride 1, then blur with the stride."""
        maxima = F.max_pool2d(input, self.kernel_size, 1, self.padding, self.dilation)
        return blur_pool2d(maxima, self.blur_filter, self.stride)


def apply_blurpool(
    model: nn.Module,
    replace_convs: bool = True,
    replace_maxpools: bool = True,
    blur_first: bool = True,
    min_channels: int = 16,
    optimizers: Optimizer | Sequence[Optimizer] | None = None,
) -> list[str]:
    """Make strided convolutions and max-pools blur before they subsample, in place.

    Output shapes, Parameter objects and ``state_dict`` keys stay. Applied twice it equals applied
    once. Left as they are: subclasses of the two layers, max-pools that return indices or round
    their output size up, and convolutions whose stride is 1.

    Args:
        model: Model with ``nn.Conv2d`` or ``nn.MaxPool2d`` layers.
        replace_convs: Whether to change convolutions with a stride.
        replace_maxpools: Whether to change max-pools with a stride.
        blur_first: For convolutions, whether to blur before the strided convolution (cheap), or to
            convolve at full resolution and blur while subsampling (``stride**2`` the work).
        min_channels: Convolutions with fewer input channels stay, above all the one that sees the
            image.
        optimizers: Accepted for symmetry; the parameters stay, so there is nothing to update.

    Returns:
        Names of the modules that were changed by this call or before.

    Warns:
        NoEffectWarning: If there is none.

    Example:
        >>> conv = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        >>> apply_blurpool(nn.Sequential(conv))
        ['0']
        >>> conv(torch.ones(1, 16, 8, 8)).shape
        torch.Size([1, 16, 4, 4])

    References:
        Zhang, `Making Convolutional Networks Shift-Invariant Again
        <https://arxiv.org/abs/1904.11486>`_, 2019.
    """
    names = []
    device = next(model.parameters(), torch.empty(0)).device  # a max-pool has none of its own
    for name, module in model.named_modules():
        if isinstance(module, BlurConv2d | ConvBlur2d | BlurMaxPool2d):
            pass  # by an earlier call
        elif original_class(module) is nn.Conv2d and replace_convs:
            if max(module.stride) > 1 and module.in_channels >= min_channels:
                _blur_conv(module, blur_first)
        elif type(module) is nn.MaxPool2d and replace_maxpools:
            strided = max(_pair(module.stride)) > 1
            if strided and not module.return_indices and not module.ceil_mode:
                swap_class(module, BlurMaxPool2d, blur_filter=_binomial().to(device))
        if isinstance(module, BlurConv2d | ConvBlur2d | BlurMaxPool2d):
            names.append(name)
    if not names:
        warn_no_effect("apply_blurpool", "strided convolutions or max-pools to blur")
    return names


def _blur_conv(conv: nn.Conv2d, blur_first: bool) -> None:
    filter = _binomial().to(conv.weight.device)
    if blur_first:
        swap_class(conv, BlurConv2d, blur_filter=filter)
    else:
        swap_class(conv, ConvBlur2d, blur_filter=filter, blur_stride=conv.stride)
        conv.stride = (1, 1)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


@dataclass(frozen=True)
class BlurPool(Algorithm):
    """Low-pass filter feature maps before they are subsampled.

    Args:
        replace_convs: Whether to change convolutions with a stride.
        replace_maxpools: Whether to change max-pools with a stride.
        blur_first: Whether convolutions see blurred maps, or blur their full-resolution output.
        min_channels: Convolutions with fewer input channels stay; at least 1.

    Raises:
        ValueError: If a setting is out of range, or nothing is to be replaced.
    """

    replace_convs: bool = True
    replace_maxpools: bool = True
    blur_first: bool = True
    min_channels: int = 16

    place = Place.SURGERY
    card = Card(
        category="vision",
        summary="Blurs feature maps before strided convolutions and max-pools subsample them.",
        effect="One depthwise 3x3 filter more for each strided layer, a few percent of a step. No"
        " new parameters; names, shapes and checkpoints stay, but a checkpoint belongs to the"
        " blurred network.",
        use_when="Convolutional networks that subsample by stride or max-pool, above all where"
        " small shifts of the image should not matter. Not for feature maps of a few pixels, of"
        " which the blur leaves little, nor for small networks without normalisation.",
        interactions="None known; works under mixed precision, channels last and torch.compile.",
        reference="Zhang 2019",
        url="https://arxiv.org/abs/1904.11486",
    )

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.min_channels < 1:
            raise ValueError(f"BlurPool: min_channels must be at least 1, got {self.min_channels}")
        if not (self.replace_convs or self.replace_maxpools):
            raise ValueError(
                "BlurPool: replace_convs or replace_maxpools must be true, got neither"
            )

    def prepare_model(self, model: nn.Module, run: "Run") -> None:
        """Change the layers and report which."""
        run.report.changed(self.name, apply_blurpool(model, **self.settings))
