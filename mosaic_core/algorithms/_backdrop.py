"""Backdrop: dropout on the backward pass alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mosaic_core.algorithm import Algorithm, Card, Place
from mosaic_core.batch import Batch
from mosaic_core.random import derive_seed, uniform
from mosaic_core.surgery import matching, warn_no_effect

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["Backdrop", "apply_backdrop", "backdrop"]

Mode = Literal["sample", "patch"]
_SEED = "backdrop_seed"  # attribute of a module whose output is masked


def backdrop(
    x: Tensor,
    p: float = 0.5,
    generator: torch.Generator | None = None,
    mode: Mode = "sample",
    patch_size: int = 1,
    seed: Tensor | None = None,
) -> Tensor:
    """Return ``x``; on the way back, mask a random part of its gradient and rescale the rest.

    With a mask ``m`` of zeros and ones the gradient becomes ``g * m * numel(m) / sum(m)``, so that
    its scale is kept by the share that was really let through. At least one part always passes.

    Args:
        x: Activations, floating-point, shape ``(N, ...)``.
        p: Probability to mask a part, in [0, 1).
        generator: CPU generator to draw the mask's seed from; None draws from torch's default one.
        mode: ``"sample"`` masks whole examples; ``"patch"`` masks squares of ``(N, C, H, W)``, all
            channels alike.
        patch_size: Side of these squares in positions of the feature map, at least 1.
        seed: Seed of the mask in place of a draw, int64, shape ``()``, in [0, 2**63).

    Returns:
        A new view with the values of ``x``.

    Raises:
        ValueError: If an argument is out of range, or ``x`` has no patches.

    Example:
        >>> x = torch.ones(4, 2, requires_grad=True)
        >>> backdrop(x, p=0.5, seed=torch.tensor(0)).sum().backward()
        >>> x.grad.sum().item()
        8.0

    References:
        Golkar and Cranmer, `Backdrop: Stochastic Backpropagation
        <https://arxiv.org/abs/1806.01337>`_, 2018, section 2.
    """
    _check("backdrop", p, mode, patch_size)
    if seed is None:
        seed = torch.randint(2**63 - 1, (), generator=generator)
    if mode == "patch" and x.dim() != 4:
        raise ValueError(
            f'backdrop: mode="patch" needs activations (N, C, H, W), got {tuple(x.shape)}'
        )
    if p == 0:
        return x.view_as(x)
    return _Mask.apply(x, _mask(x, p, seed, mode, patch_size))  # type: ignore[no-any-return]


def _mask(x: Tensor, p: float, seed: Tensor, mode: Mode, patch_size: int) -> Tensor:
    """Draw the mask, rescaled, in a shape that broadcasts against ``x``."""
    if mode == "sample":
        draws = uniform((x.shape[0], *(1,) * (x.dim() - 1)), seed, x.device)
    else:
        rows, columns = (-(-size // patch_size) for size in x.shape[2:])
        draws = uniform((x.shape[0], 1, rows, columns), seed, x.device)
    keep = (draws >= p) | (draws == draws.max())
    if mode == "patch" and patch_size > 1:
        keep = keep.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
        keep = keep[:, :, : x.shape[2], : x.shape[3]]
    return keep * (keep.numel() / keep.sum())


class _Mask(torch.autograd.Function):
    """Identity forward, multiplication by a mask backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (mask,) = ctx.saved_tensors
        return grads[0] * mask.to(grads[0].dtype), None


def apply_backdrop(
    model: nn.Module,
    layers: str | Sequence[str],
    p: float = 0.5,
    mode: Mode = "sample",
    patch_size: int = 1,
) -> list[str]:
    """Mask the gradient that flows back through the output of some layers, in place.

    Parameters, names and the forward pass stay; in evaluation nothing happens. Applied twice it
    equals applied once. Until a run sets the seeds, every layer draws one mask from its name; for
    a loop of your own, call :func:`backdrop` in ``forward`` instead.

    Args:
        model: Any model.
        layers: Shell-style patterns of module names, such as ``"layer4"`` or ``"blocks.*.mlp"``.
        p: Probability to mask a part, in [0, 1).
        mode: ``"sample"`` or ``"patch"``, as in :func:`backdrop`.
        patch_size: Side of a patch.

    Returns:
        Names of the layers, in the order of the model.

    Warns:
        NoEffectWarning: If no name matches.

    References:
        Golkar and Cranmer, `Backdrop <https://arxiv.org/abs/1806.01337>`_, 2018.
    """
    _check("apply_backdrop", p, mode, patch_size)
    names = []
    for name, module in matching(model, layers):
        if not hasattr(module, _SEED):
            # An attribute, no buffer: DDP would send rank 0's seed to all ranks.
            module.backdrop_seed = torch.tensor(derive_seed(name))
            module.register_forward_hook(_Hook(p, mode, patch_size))
        names.append(name)
    if not names:
        warn_no_effect("apply_backdrop", f"module whose name matches {layers!r}")
    return names


@dataclass(frozen=True)
class _Hook:
    p: float
    mode: Mode
    patch_size: int

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        if not module.training:
            return output
        if not isinstance(output, Tensor):
            raise TypeError(
                "backdrop: a masked layer must return a tensor,"
                f" {type(module).__name__} returned {type(output).__name__}; place it on another"
            )
        return backdrop(output, self.p, None, self.mode, self.patch_size, seed=module.backdrop_seed)


def _check(where: str, p: float, mode: str, patch_size: int) -> None:
    if not 0 <= p < 1:
        raise ValueError(f"{where}: p must be in [0, 1), got {p}")
    if mode not in ("sample", "patch"):
        raise ValueError(f"{where}: mode must be 'sample' or 'patch', got {mode!r}")
    if patch_size < 1:
        raise ValueError(f"{where}: patch_size must be at least 1, got {patch_size}")


@dataclass(frozen=True)
class Backdrop(Algorithm):
    """Mask a random part of the gradient that flows back through some layers.

    Args:
        layers: Shell-style patterns of module names, such as ``"layer4"``.
        p: Probability to mask a part, in [0, 1).
        mode: ``"sample"`` masks whole examples, ``"patch"`` squares of the feature map.
        patch_size: Side of a square.

    Raises:
        ValueError: If a setting is out of range.
    """

    layers: str | Sequence[str]
    p: float = 0.5
    mode: Mode = "sample"
    patch_size: int = 1

    place = Place.SURGERY
    draws_in_forward = True
    card = Card(
        category="any",
        summary="Is the identity forward and masks a random part of the gradient backward.",
        effect="One small mask for each placed layer; forward, evaluation and checkpoints stay.",
        use_when="Few examples made of many parts (large images, hierarchies of scales), and losses"
        " that do not decompose over examples.",
        interactions="Placed layers must return one tensor, and no operation in place may follow,"
        " such as ReLU(inplace=True), which torch refuses: place it behind that. Batch norm behind"
        " a placed layer still sees the whole batch.",
        reference="Golkar and Cranmer 2018",
        url="https://arxiv.org/abs/1806.01337",
    )

    @classmethod
    def example(cls) -> "Backdrop":
        """Return one that acts on the network of the contract suites."""
        return cls("*conv2")

    def __post_init__(self) -> None:
        """Check the settings; a list of patterns becomes a tuple."""
        if not isinstance(self.layers, str):
            object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise ValueError("Backdrop: layers must name at least one pattern, got none")
        _check("Backdrop", self.p, self.mode, self.patch_size)

    def prepare_model(self, model: nn.Module, run: "Run") -> None:
        """Place the masks; the forward pass is the same, so a checkpoint needs no warning."""
        names = apply_backdrop(model, **self.settings)
        run.report.notes.append(f"Backdrop masks the gradient behind {', '.join(names)}")

    def init_state(self, run: "Run") -> dict[str, Tensor]:
        """Return the seeds of the placed layers by name."""
        return {n: m.backdrop_seed for n, m in run.model.named_modules() if hasattr(m, _SEED)}

    def on_batch(self, batch: Batch, run: "Run") -> Batch:
        """Give each placed layer its seed for this micro-batch; the batch stays."""
        for name, seed in run.state(self).items():
            seed.fill_(run.seed_for(self, name))
        return batch
