"""GhostBatchNorm: batch norm over small parts of a large batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from mosaic_core.algorithm import Algorithm, Card, Place
from mosaic_core.errors import UnsupportedError
from mosaic_core.surgery import original_class, swap_class, warn_no_effect

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["GhostBatchNorm", "apply_ghost_batchnorm", "ghost_batch_norm"]


def ghost_batch_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    ghost_batch_size: int = 32,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each ghost batch by its own mean and variance per channel.

    The batch is cut into ``ceil(N / ghost_batch_size)`` ghost batches of neighbours as
    ``torch.chunk`` cuts it: of one size, the last perhaps smaller. Those of one size are folded
    into the channels and normalised in one call. A last one with a single value per channel, which
    has no variance, is joined to the one before.

    Args:
        input: Floating-point activations, shape ``(N, C, ...)``, in any memory format.
        weight: Scale of each channel, shape ``(C,)``; None for ones.
        bias: Shift of each channel, shape ``(C,)``; None for zeros.
        ghost_batch_size: Largest number of examples in a ghost batch, at least 1.
        eps: Added to the variance, positive.

    Returns:
        The output, new, in the memory format of ``input``; and the mean over the ghost batches,
        each counted by its examples, of their means and of their unbiased variances, shape
        ``(C,)``, without gradient.

    Raises:
        ValueError: If ``ghost_batch_size`` is below 1, or ghost batches have one value per channel.

    Example:
        >>> y, mean, var = ghost_batch_norm(torch.arange(8.0).view(4, 1, 2), ghost_batch_size=2)
        >>> y.view(2, 4).mean(1)
        tensor([0., 0.])
        >>> mean
        tensor([3.5000])

    References:
        Hoffer et al., `Train longer, generalize better <https://arxiv.org/abs/1705.08741>`_, 2017,
        Algorithm 1.
    """
    _check("ghost_batch_norm", ghost_batch_size)
    examples = len(input)
    size = -(-examples // -(-examples // ghost_batch_size))
    count, rest = examples // size, examples % size
    if rest == 1 and input[0, 0].numel() == 1:
        count, rest = count - 1, size + 1
    if not rest or not count:
        return _normalize(input, max(count, 1), weight, bias, eps)
    alike, other = input.split((examples - rest, rest))
    most, mean, var = _normalize(alike, count, weight, bias, eps)
    last, last_mean, last_var = _normalize(other, 1, weight, bias, eps)
    share = rest / examples
    return torch.cat([most, last]), mean.lerp(last_mean, share), var.lerp(last_var, share)


def _normalize(
    x: Tensor, count: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise ``count`` ghost batches of one size in one call."""
    # The copies move whole examples, or whole pixels: the fold is made where the channels lie.
    last = x.movedim(1, -1).is_contiguous() and not x.is_contiguous()
    axis = x.dim() - 1 if last else 1
    x = x.movedim(1, axis)
    folded = x.unflatten(0, (count, -1)).movedim(0, axis).flatten(axis, axis + 1).movedim(axis, 1)
    dtype = torch.promote_types(x.dtype, torch.float32) if weight is None else weight.dtype
    mean, var = (x.new_zeros(folded.shape[1], dtype=dtype) for _ in range(2))
    weight, bias = (None if p is None else p.repeat(count) for p in (weight, bias))
    # A momentum of 1 turns running statistics into those of the batch.
    y = F.batch_norm(folded, mean, var, weight, bias, True, 1.0, eps)
    y = y.movedim(1, axis).unflatten(axis, (count, -1)).movedim(axis, 0).flatten(0, 1)
    return y.movedim(axis, 1), mean.view(count, -1).mean(0), var.view(count, -1).mean(0)


class Ghost(_BatchNorm):
    """A batch norm that normalises ghost batches in training."""

    ghost_batch_size: int
    ghost_tail: tuple[str, ...]  # modules of its own that timm's layers apply to the output

    def forward(self, input: Tensor) -> Tensor:
        """Normalise; in evaluation, and a batch within one ghost batch, as without the surgery."""
        if not self.training:
            return super().forward(input)
        if len(input) <= self.ghost_batch_size:
            output = _BatchNorm.forward(self, input)  # SyncBatchNorm's would wait for other ranks
        else:
            self._check_input_dim(input)  # type: ignore[no-untyped-call]  # torch's
            output, mean, var = ghost_batch_norm(
                input, self.weight, self.bias, self.ghost_batch_size, self.eps
            )
            self._track(mean, var)
        for name in self.ghost_tail:
            output = getattr(self, name)(output)
        return output

    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics once, as for one batch."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        factor: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the mean over all batches, without reading their number
                factor = self.num_batches_tracked.to(self.running_mean.dtype).reciprocal()
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(var.to(self.running_var.dtype), factor)


def apply_ghost_batchnorm(
    model: nn.Module,
    ghost_batch_size: int = 32,
    optimizers: Optimizer | Sequence[Optimizer] | None = None,
) -> list[str]:
    """Let batch norms normalise ghost batches in training, in place.

    Running statistics move once a step, by the mean over the ghost batches (see
    :func:`ghost_batch_norm`), so momentum, also None, means what it did; evaluation is plain batch
    norm. A batch no larger than ``ghost_batch_size`` is one ghost batch. ``nn.SyncBatchNorm`` no
    longer synchronises in training: ghost batches lie within a rank.

    Parameter objects, buffers and ``state_dict`` keys stay. Applied twice it equals applied once;
    the first size stays. Changed are torch's batch norms, subclasses with torch's ``forward``, and
    timm's ``BatchNormAct2d``; layers that compute otherwise, with all their parts, and
    lazy ones stay.

    Args:
        model: Model with batch norms.
        ghost_batch_size: Largest number of examples in a ghost batch, at least 1.
        optimizers: Accepted for symmetry; the parameters stay, so there is nothing to update.

    Returns:
        Names of the modules that were changed by this call or before.

    Raises:
        ValueError: If ``ghost_batch_size`` is below 1.

    Warns:
        NoEffectWarning: If there is none.

    Example:
        >>> apply_ghost_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        ['1']

    References:
        Hoffer et al., `Train longer, generalize better <https://arxiv.org/abs/1705.08741>`_, 2017.
    """
    _check("apply_ghost_batchnorm", ghost_batch_size)
    names = []
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    parts = {part for norm in norms for part in norm.modules() if part is not norm}
    for name, module in model.named_modules():
        if not isinstance(module, Ghost) and _is_known(module) and module not in parts:
            tail = tuple(n for n in ("drop", "act") if _is_timms(module) and hasattr(module, n))
            swap_class(module, Ghost, ghost_batch_size=ghost_batch_size, ghost_tail=tail)
        if isinstance(module, Ghost):
            names.append(name)
    if not names:
        warn_no_effect("apply_ghost_batchnorm", "batch norms")
    return names


def _is_known(module: nn.Module) -> bool:
    lazy = isinstance(module, nn.modules.lazy.LazyModuleMixin)
    torchs = original_class(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    return isinstance(module, _BatchNorm) and not lazy and (torchs or _is_timms(module))


def _is_timms(module: nn.Module) -> bool:
    cls = original_class(module)
    names = ("BatchNormAct2d", "SyncBatchNormAct")
    return cls.__module__ == "timm.layers.norm_act" and cls.__name__ in names


def _check(where: str, ghost_batch_size: int) -> None:
    if ghost_batch_size < 1:
        raise ValueError(f"{where}: ghost_batch_size must be at least 1, got {ghost_batch_size}")


@dataclass(frozen=True)
class GhostBatchNorm(Algorithm):
    """Normalise small parts of a batch, each by its own statistics.

    Args:
        ghost_batch_size: Largest number of examples in a part; at least 1.

    Raises:
        ValueError: If it is below 1.
    """

    ghost_batch_size: int = 32

    place = Place.SURGERY
    card = Card(
        category="vision",
        summary="Lets batch norms normalise small parts of a batch by their own statistics.",
        effect="One fused batch norm and a copy of its input and output; two where the batch does"
        " not divide. No new parameters; evaluation is plain batch norm.",
        use_when="Batches on one device are far larger than 32, where the noise of small batches"
        " helps to generalise; without effect where they are not.",
        interactions="Batch norms that synchronise ranks no longer do so in training; converting"
        " the model to them afterwards is refused. A part holds neighbours in the batch.",
        reference="Hoffer et al. 2017",
        url="https://arxiv.org/abs/1705.08741",
    )

    @classmethod
    def example(cls) -> "GhostBatchNorm":
        """Return one whose ghost batches are smaller than the contract suites' batches."""
        return cls(ghost_batch_size=3)

    def __post_init__(self) -> None:
        """Check the settings."""
        _check("GhostBatchNorm", self.ghost_batch_size)

    def prepare_model(self, model: nn.Module, run: "Run") -> None:
        """Change the layers and report which."""
        run.report.changed(self.name, apply_ghost_batchnorm(model, self.ghost_batch_size))

    def init_state(self, run: "Run") -> None:
        """Check that nothing has replaced the layers since.

        Raises:
            UnsupportedError: If something did, such as a conversion to ``SyncBatchNorm``.
        """
        for name in run.report.changes.get(self.name, []):
            module = run.model.get_submodule(name)
            if not isinstance(module, Ghost):
                raise UnsupportedError(
                    f"GhostBatchNorm: {name} was replaced by {type(module).__name__} after the"
                    " surgery; ghost batches lie within a rank, so turn the conversion of batch"
                    " norms off, such as sync_batchnorm, or leave GhostBatchNorm out"
                )
