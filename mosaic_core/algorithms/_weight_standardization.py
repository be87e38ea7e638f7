"""WeightStandardization: filters of mean 0 and variance 1."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from mosaic_core.algorithm import Algorithm, Card, Place
from mosaic_core.surgery import original_class, swap_class, warn_no_effect

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["WeightStandardization", "apply_weight_standardization", "standardize_weight"]

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def standardize_weight(weight: Tensor, eps: float = 1e-10) -> Tensor:
    """Standardise each filter: ``(w - mean(w)) / sqrt(var(w) + eps)``, with the biased variance.

    Args:
        weight: Weight of a convolution, floating-point, shape ``(out, in / groups, ...)``.
        eps: Added to the variance. So small that also the small weights of wide layers, whose
            variance is about ``2 / fan_in``, come to variance 1; a constant filter becomes 0.

    Returns:
        A new tensor in the memory format of ``weight``, which gradients flow through.

    Example:
        >>> standardize_weight(Tensor([[[1.0, 3.0]]]))
        tensor([[[-1.,  1.]]])

    References:
        Qiao et al., `Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization <https://arxiv.org/abs/1903.10520>`_, 2019, Eqs. 5-6.
    """
    # Layer norm over a filter is the same formula in one kernel. It sums in the order of the
    # elements whatever their order in memory, so the result is the same to the last bit.
    y = F.layer_norm(weight, weight.shape[1:], eps=eps)
    return y if weight.is_contiguous() else torch.empty_like(weight).copy_(y)


class Standardized(_ConvNd):
    """A convolution by its standardised weight."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, standardize_weight(weight), bias)


def apply_weight_standardization(module: nn.Module, n_last_layers_ignore: int = 0) -> list[str]:
    """Let convolutions use their weights standardised, in place.

    The weights themselves, Parameter objects and ``state_dict`` keys stay. Applied twice it equals
    applied once. Left as they are: transposed and lazy convolutions, filters of a single weight
    (which has no variance), subclasses that compute in their own way, and layers whose weight is no
    parameter because another reparametrisation makes it.

    Args:
        module: Model with ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` layers.
        n_last_layers_ignore: Number of convolutions to leave at the end, in the order in which the
            model defines them; for those whose output is the prediction.

    Returns:
        Names of the modules that were changed by this call or before.

    Raises:
        ValueError: If ``n_last_layers_ignore`` is negative.

    Warns:
        NoEffectWarning: If there is none.

    Example:
        >>> apply_weight_standardization(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        ['0']

    References:
        Qiao et al., `Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization <https://arxiv.org/abs/1903.10520>`_, 2019.
    """
    _check("apply_weight_standardization", n_last_layers_ignore)
    convs = [(name, m) for name, m in module.named_modules() if isinstance(m, _KINDS)]
    names = []
    for name, conv in convs[: max(len(convs) - n_last_layers_ignore, 0)]:
        if not isinstance(conv, Standardized) and _can_be_standardized(conv):
            swap_class(conv, Standardized)
        if isinstance(conv, Standardized):
            names.append(name)
    if not names:
        warn_no_effect("apply_weight_standardization", "convolutions to standardise")
    return names


def _can_be_standardized(module: nn.Module) -> bool:
    cls, weight = original_class(module), module._parameters.get("weight")
    return (
        any(
            issubclass(cls, kind)
            and cls.forward is kind.forward
            and cls._conv_forward is kind._conv_forward
            for kind in _KINDS
        )
        and weight is not None
        and not is_lazy(weight)
        and weight[0].numel() > 1
    )


def _check(where: str, n_last_layers_ignore: int) -> None:
    if n_last_layers_ignore < 0:
        raise ValueError(
            f"{where}: n_last_layers_ignore must be at least 0, got {n_last_layers_ignore}"
        )


@dataclass(frozen=True)
class WeightStandardization(Algorithm):
    """Standardise the weights of convolutions, filter by filter.

    Args:
        n_last_layers_ignore: Number of convolutions to leave at the end; at least 0.

    Raises:
        ValueError: If it is negative.
    """

    n_last_layers_ignore: int = 0

    place = Place.SURGERY
    card = Card(
        category="vision",
        summary="Lets convolutions use weights of mean 0 and variance 1 in each filter.",
        effect="One small kernel more for each convolution. No new parameters; names, shapes and"
        " checkpoints stay, but a checkpoint belongs to the standardised network.",
        use_when="Convolutions followed by a normalisation, above all group norm or batch norm with"
        " few examples on a device. Leave convolutions that predict out.",
        interactions="Works in either order with BlurPool, and under ChannelsLast, mixed precision"
        " and torch.compile. Layers that Factorize has split are left alone. Without a"
        " normalisation behind it a layer's scale changes much.",
        reference="Qiao et al. 2019",
        url="https://arxiv.org/abs/1903.10520",
    )

    def __post_init__(self) -> None:
        """Check the settings."""
        _check("WeightStandardization", self.n_last_layers_ignore)

    def prepare_model(self, model: nn.Module, run: "Run") -> None:
        """Change the layers and report which."""
        names = apply_weight_standardization(model, self.n_last_layers_ignore)
        run.report.changed(self.name, names)
