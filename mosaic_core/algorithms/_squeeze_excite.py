"""SqueezeExcite: let convolutions weight their channels by what the whole image shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from mosaic_core.adoption import NewParameters
from mosaic_core.algorithm import Algorithm, Card, Place
from mosaic_core.surgery import warn_no_effect

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["SqueezeExcite", "apply_squeeze_excite"]


class SqueezeExcite2d(nn.Module):
    """Weight channels: ``x * sigmoid(W2 relu(W1 z))`` with ``z`` the mean of each channel.

    Args:
        num_features: Channels ``C`` of the input.
        latent_channels: Channels between the two layers, at least 1.
        generator: CPU generator to draw the weights from; None draws from torch's default one.
        like: Tensor whose device and dtype the weights take; None for float32 on the CPU.

    References:
        Hu et al., `Squeeze-and-Excitation Networks <https://arxiv.org/abs/1709.01507>`_, 2018,
        Eq. 2 to 4.
    """

    def __init__(
        self,
        num_features: int,
        latent_channels: int,
        generator: torch.Generator | None = None,
        like: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.squeeze = _linear(num_features, latent_channels, generator, like)
        self.excite = _linear(latent_channels, num_features, generator, like)

    def forward(self, x: Tensor) -> Tensor:
        """Weight feature maps of shape ``(N, C, H, W)`` or ``(C, H, W)``."""
        gates: Tensor = self.excite(F.relu(self.squeeze(x.mean((-2, -1))))).sigmoid()
        return x * gates[..., None, None]


def _linear(
    inputs: int, outputs: int, generator: torch.Generator | None, like: Tensor | None
) -> nn.Linear:
    """Return a layer without bias, initialised as torch does, from a generator."""
    layer = nn.Linear(inputs, outputs, bias=False, device="meta")
    bound = inputs**-0.5
    weight = torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator)
    layer.weight = nn.Parameter(weight if like is None else weight.to(like.device, like.dtype))
    return layer


def apply_squeeze_excite(
    model: nn.Module,
    latent_channels: float = 64,
    min_channels: int = 128,
    optimizers: Optimizer | Sequence[Optimizer] | None = None,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Add a squeeze-and-excitation block behind wide convolutions, in place.

    The convolution stays and gets a submodule ``squeeze_excite``: the block's parameters are new,
    all others, and their names, stay. Applied twice it equals applied once.

    Args:
        model: Model with ``nn.Conv2d`` layers.
        latent_channels: Channels between the two layers of a block, at least 1; below 1 the
            fraction of the convolution's output channels.
        min_channels: Convolutions with fewer input or output channels stay.
        optimizers: Optimizers that exist already; the new parameters join the group of the
            convolution they follow.
        generator: CPU generator to draw the weights from; None draws from torch's default one.

    Returns:
        Names of the convolutions that were changed by this call or before.

    Raises:
        ValueError: If an argument is out of range.
        UnsupportedError: If none of the optimizers trains a convolution that was changed.

    Warns:
        NoEffectWarning: If there is none.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 128, 3), nn.Conv2d(128, 256, 3))
        >>> apply_squeeze_excite(model)
        ['1']
        >>> model[1].squeeze_excite.squeeze.weight.shape
        torch.Size([64, 256])

    References:
        Hu et al., `Squeeze-and-Excitation Networks <https://arxiv.org/abs/1709.01507>`_, 2018.
    """
    _check("apply_squeeze_excite", latent_channels, min_channels)
    changed = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        if not isinstance(getattr(module, "squeeze_excite", None), SqueezeExcite2d):
            channels = module.out_channels
            if min(module.in_channels, channels) < min_channels:
                continue
            latent = latent_channels if latent_channels >= 1 else latent_channels * channels
            block = SqueezeExcite2d(channels, max(1, int(latent)), generator, module.weight)
            module.squeeze_excite = block.train(module.training)
            # A hook, as other surgery has the class of the convolution.
            module.register_forward_hook(_excite)
        changed[name] = module
    if not changed:
        warn_no_effect("apply_squeeze_excite", f"convolution of {min_channels} channels or more")
    if optimizers is not None:
        _new_parameters(NewParameters(), changed).join(
            [optimizers] if isinstance(optimizers, Optimizer) else optimizers
        )
    return list(changed)


def _excite(module: Any, args: Any, output: Tensor) -> Any:
    return module.squeeze_excite(output)


def _new_parameters(new: NewParameters, changed: dict[str, Any]) -> NewParameters:
    for convolution in changed.values():
        block = set(convolution.squeeze_excite.parameters())
        # Not ``weight``, which Factorize and parametrisations compute from parameters of their own.
        own = {n: p for n, p in convolution.named_parameters() if p not in block and n != "bias"}
        new.add(convolution.squeeze_excite.parameters(), beside=next(iter(own.values())))
    return new


def _check(where: str, latent_channels: float, min_channels: int) -> None:
    if not (0 < latent_channels < 1 or latent_channels == latent_channels // 1 >= 1):
        raise ValueError(
            f"{where}: latent_channels must be a whole number or a fraction in (0, 1), got"
            f" {latent_channels}"
        )
    if min_channels < 1:
        raise ValueError(f"{where}: min_channels must be at least 1, got {min_channels}")


@dataclass(frozen=True)
class SqueezeExcite(Algorithm):
    """Add a squeeze-and-excitation block behind wide convolutions.

    Args:
        latent_channels: Channels between the two layers of a block, at least 1; below 1 the
            fraction of the convolution's output channels.
        min_channels: Convolutions with fewer input or output channels stay; at least 1.

    Raises:
        ValueError: If a setting is out of range.
    """

    latent_channels: float = 64
    min_channels: int = 128

    place = Place.SURGERY
    card = Card(
        category="vision",
        summary="Weights the channels behind wide convolutions by what the whole image shows.",
        effect="Two small matrix products and one pass over the feature map for each convolution,"
        " about a tenth of a step; new parameters, which join the optimizer group of the"
        " convolution they follow.",
        use_when="Convolutional networks without such blocks, where accuracy is worth a slower"
        " step; not where throughput counts most.",
        interactions="A checkpoint has the new parameters, so it loads into a model with the"
        " recipe. Optimizers made before must train the convolutions. Models that already have"
        " such blocks get more of them.",
        reference="Hu et al. 2018",
        url="https://arxiv.org/abs/1709.01507",
    )

    @classmethod
    def example(cls) -> "SqueezeExcite":
        """Return one that acts on the network of the contract suites."""
        return cls(latent_channels=8, min_channels=16)

    def __post_init__(self) -> None:
        """Check the settings."""
        _check("SqueezeExcite", self.latent_channels, self.min_channels)

    def prepare_model(self, model: nn.Module, run: "Run") -> None:
        """Add the blocks, the same on every rank, and report where."""
        generator = run.generator(self, shared=True)
        names = apply_squeeze_excite(model, **self.settings, generator=generator)
        _new_parameters(run.new_parameters, {n: model.get_submodule(n) for n in names})
        run.report.changed(self.name, names)
