"""Factorize: two small layers in the place of a wide one."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from mosaic_core.adoption import NewParameters
from mosaic_core.algorithm import Algorithm, Card, Place
from mosaic_core.surgery import swap_class, warn_no_effect

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["Factorize", "apply_factorization", "factorize_matrix"]


def factorize_matrix(weight: Tensor, rank: int | float = 0.25) -> tuple[Tensor, Tensor]:
    """Return the two factors whose product is the best approximation of a matrix at a rank.

    With the singular value decomposition ``weight = U S Vᵀ`` they are ``U[:, :r] S[:r]**0.5`` and
    ``S[:r]**0.5 V[:, :r]ᵀ``: no other product of that rank is nearer in the Frobenius or the
    spectral norm. Computed in float64 on the CPU, so that every device gives the same.

    Args:
        weight: Matrix, floating-point, shape ``(m, n)``.
        rank: Rank ``r``, at least 1; below 1 a fraction of ``min(m, n)``.

    Returns:
        New factors of shapes ``(m, r)`` and ``(r, n)``, in dtype and device of ``weight``.

    Raises:
        ValueError: If ``weight`` is no matrix, ``rank`` is out of range, or the factors would hold
            no fewer numbers than ``weight``, so that nothing would be saved.

    Example:
        >>> left, right = factorize_matrix(torch.ones(4, 6), rank=1)
        >>> left.shape, right.shape
        (torch.Size([4, 1]), torch.Size([1, 6]))
        >>> torch.allclose(left @ right, torch.ones(4, 6))
        True

    References:
        Eckart and Young, `The approximation of one matrix by another of lower rank
        <https://doi.org/10.1007/BF02288367>`_, 1936.
    """
    _check_rank("factorize_matrix: rank", rank)
    if weight.dim() != 2:
        raise ValueError(f"factorize_matrix: weight must be a matrix, got {tuple(weight.shape)}")
    m, n = weight.shape
    r = _rank(rank, m, n)
    if not _saves(r, m, n):
        raise ValueError(
            f"factorize_matrix: rank must be below m * n / (m + n) = {m * n / (m + n):g} to save"
            f" anything for a matrix {m} x {n}, got {r}"
        )
    if m > n:
        right, left = factorize_matrix(weight.T, r)
        return left.T.contiguous(), right.T.contiguous()
    w = weight.detach().to("cpu", torch.float64)
    # The left singular vectors by the small W Wᵀ: many times cheaper than a decomposition of W.
    squares, vectors = torch.linalg.eigh(w @ w.T)
    squares, vectors = squares.flip(0)[:r].clamp_min(0), vectors.flip(1)[:, :r]
    root = squares.where(squares > 0, 1.0).pow(0.25)  # of zeros, one factor must learn
    left, right = vectors * root, vectors.T @ w / root[:, None]
    return left.contiguous().to(weight), right.contiguous().to(weight)


class FactorizedLinear(nn.Linear):
    """A linear layer of low rank; ``weight`` is the product of its factors."""

    weight_in: nn.Parameter  # (rank, in)
    weight_out: nn.Parameter  # (out, rank)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a parameter of the class it replaces
        """The weight as one matrix, for who asks."""
        return self.weight_out @ self.weight_in

    def forward(self, input: Tensor) -> Tensor:
        """Project to the latent features, then to the output."""
        return F.linear(F.linear(input, self.weight_in), self.weight_out, self.bias)


class FactorizedConv2d(nn.Conv2d):
    """A convolution to few channels, then a pointwise one; ``weight`` is their product."""

    weight_in: nn.Parameter  # (rank, in, height, width)
    weight_out: nn.Parameter  # (out, rank, 1, 1)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a parameter of the class it replaces
        """The weight as one kernel, for who asks."""
        kernel = self.weight_in
        return (self.weight_out.flatten(1) @ kernel.flatten(1)).view(-1, *kernel.shape[1:])

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with stride, padding and dilation, then mix the latent channels."""
        latent = self._conv_forward(input, self.weight_in, None)
        return F.conv2d(latent, self.weight_out, self.bias)


def apply_factorization(
    model: nn.Module,
    factorize_convs: bool = True,
    factorize_linears: bool = True,
    min_channels: int = 256,
    latent_channels: int | float = 0.25,
    min_features: int = 256,
    latent_features: int | float = 128,
    optimizers: Optimizer | Sequence[Optimizer] | None = None,
) -> list[str]:
    """Split wide layers into two small ones that compute nearly the same, in place.

    A layer's weight becomes ``weight_in`` and ``weight_out``, by :func:`factorize_matrix`: the best
    approximation of the trained weight. A convolution has its kernel in the first and a pointwise
    convolution as the second. The module, its bias and its shapes stay. Applied twice it equals
    applied once.

    Left as they are: layers the two would not make smaller, grouped convolutions, subclasses
    (``type(layer)`` must be ``nn.Linear`` or ``nn.Conv2d``), and weights that several modules
    share.

    Args:
        model: Model with ``nn.Linear`` or ``nn.Conv2d`` layers.
        factorize_convs: Whether to split convolutions.
        factorize_linears: Whether to split linear layers.
        min_channels: Convolutions with fewer input or output channels stay.
        latent_channels: Channels between the two convolutions; below 1 a fraction of the smaller
            of input and output channels.
        min_features: Linear layers with fewer input or output features stay.
        latent_features: Features between the two linear layers, or a fraction as above.
        optimizers: Optimizers made before; new parameters take the place of the old in them.

    Returns:
        Names of the modules that were changed by this call or before.

    Raises:
        ValueError: If a latent size is out of range.
        UnsupportedError: If none of the optimizers trains a weight that is replaced.

    Warns:
        NoEffectWarning: If there is none.

    Example:
        >>> model = nn.Sequential(nn.Linear(512, 1024))
        >>> apply_factorization(model)
        ['0']
        >>> [tuple(p.shape) for p in model.parameters()]
        [(1024,), (128, 512), (1024, 128)]

    References:
        Jaderberg et al., `Speeding up Convolutional Neural Networks with Low Rank Expansions
        <https://arxiv.org/abs/1405.3866>`_, 2014, section 2; scheme 1 without separating the
        kernel.
    """
    _check_rank("apply_factorization: latent_channels", latent_channels)
    _check_rank("apply_factorization: latent_features", latent_features)
    new = NewParameters()
    names, _ = _factorize(
        *(model, new, factorize_convs, factorize_linears),
        *(min_channels, latent_channels, min_features, latent_features),
    )
    if optimizers is not None:
        new.join([optimizers] if isinstance(optimizers, Optimizer) else optimizers)
    return names


def _factorize(
    model: nn.Module,
    new: NewParameters,
    factorize_convs: bool,
    factorize_linears: bool,
    min_channels: int,
    latent_channels: int | float,
    min_features: int,
    latent_features: int | float,
) -> tuple[list[str], list[str]]:
    """Split layers, and return the names of all that are split and of those it would not help."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    split, refused = [], []
    for name, module in model.named_modules():
        if isinstance(module, FactorizedLinear | FactorizedConv2d):
            split.append(name)
        if type(module) is nn.Linear and factorize_linears:
            least, latent = min_features, latent_features
        elif type(module) is nn.Conv2d and factorize_convs and module.groups == 1:
            least, latent = min_channels, latent_channels
        else:
            continue
        weight = module._parameters.get("weight")
        if weight is not None and uses[id(weight)] == 1 and min(weight.shape[:2]) >= least:
            rank = _rank(latent, *weight.shape[:2])
            if _saves(rank, *weight.flatten(1).shape):
                _split(module, weight, rank, new)
                split.append(name)
            else:
                refused.append(name)
    if not split:
        warn_no_effect("apply_factorization", "layers wide enough to be worth splitting", 4)
    return split, refused


def _split(module: nn.Module, weight: nn.Parameter, rank: int, new: NewParameters) -> None:
    second, first = factorize_matrix(weight.flatten(1), rank)
    first = first.view(rank, *weight.shape[1:])
    second = second.view(-1, rank, *(1 for _ in weight.shape[2:]))
    del module.weight
    swap_class(module, FactorizedLinear if isinstance(module, nn.Linear) else FactorizedConv2d)
    module.weight_in = nn.Parameter(first, weight.requires_grad)
    module.weight_out = nn.Parameter(second, weight.requires_grad)
    new.replace(weight, [module.weight_in, module.weight_out])


def _rank(rank: int | float, m: int, n: int) -> int:
    return max(1, int(rank * min(m, n))) if rank < 1 else int(rank)


def _saves(rank: int, m: int, n: int) -> bool:
    """Tell whether the factors hold fewer numbers, and so need fewer multiplications."""
    return rank * (m + n) < m * n


def _check_rank(what: str, rank: int | float) -> None:
    if not (0 < rank < 1 or (rank >= 1 and rank == int(rank))):
        raise ValueError(
            f"{what} must be a whole number of at least 1, or a fraction in (0, 1), got {rank}"
        )


@dataclass(frozen=True)
class Factorize(Algorithm):
    """Split wide layers into two small ones, keeping what they have learnt.

    Args:
        factorize_convs: Whether to split convolutions.
        factorize_linears: Whether to split linear layers.
        min_channels: Convolutions with fewer input or output channels stay; at least 1.
        latent_channels: Channels between the two, or a fraction in (0, 1).
        min_features: Linear layers with fewer input or output features stay; at least 1.
        latent_features: Features between the two, or a fraction in (0, 1).

    Raises:
        ValueError: If a setting is out of range, or nothing is to be split.
    """

    factorize_convs: bool = True
    factorize_linears: bool = True
    min_channels: int = 256
    latent_channels: int | float = 0.25
    min_features: int = 256
    latent_features: int | float = 128

    place = Place.STRUCTURE
    card = Card(
        category="any",
        summary="Splits wide linear and convolutional layers into two of low rank.",
        effect="Fewer parameters and multiplications, and a loss of accuracy that training must"
        " win back. Starts from the best approximation of the weights, found in float64 before"
        " training. Weights have new names.",
        use_when="Wide layers, of a trained model above all; layers the two would not make smaller"
        " stay.",
        interactions="Comes before all other surgery: BlurPool acts on the first of the two"
        " convolutions, WeightStandardization on neither. Tied weights stay whole.",
        reference="Jaderberg et al. 2014",
        url="https://arxiv.org/abs/1405.3866",
    )

    @classmethod
    def example(cls) -> "Factorize":
        """Return one that splits layers of the network of the contract suites."""
        return cls(min_channels=16, min_features=5, latent_features=2)

    def __post_init__(self) -> None:
        """Check the settings."""
        for name in ("min_channels", "min_features"):
            if getattr(self, name) < 1:
                raise ValueError(f"Factorize: {name} must be at least 1, got {getattr(self, name)}")
        _check_rank("Factorize: latent_channels", self.latent_channels)
        _check_rank("Factorize: latent_features", self.latent_features)
        if not (self.factorize_convs or self.factorize_linears):
            raise ValueError(
                "Factorize: factorize_convs or factorize_linears must be true, got neither"
            )

    def prepare_model(self, model: nn.Module, run: "Run") -> None:
        """Split the layers; report which, and which are wide but stay."""
        names, refused = _factorize(model, run.new_parameters, **self.settings)
        run.report.changed(self.name, names)
        if refused:
            run.report.notes.append(
                f"Factorize left {', '.join(refused)}: at this rank two layers would be no smaller"
            )
