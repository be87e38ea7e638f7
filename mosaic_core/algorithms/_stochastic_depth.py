"""StochasticDepth: skip the branches of residual blocks at random in training."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from mosaic_core.algorithm import Algorithm, Card, Place
from mosaic_core.batch import Batch
from mosaic_core.errors import UnsupportedError
from mosaic_core.parameters import ReplicatedParameters
from mosaic_core.progress import Duration
from mosaic_core.random import uniform
from mosaic_core.residual import Shortcut, no_gradient, residual_blocks
from mosaic_core.surgery import Mixin, original_class, swap_class, warn_no_effect

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["StochasticDepth", "apply_stochastic_depth"]

Method = Literal["block", "sample"]
Distribution = Literal["linear", "uniform"]


def apply_stochastic_depth(
    model: nn.Module,
    target_layer_name: str | None = None,
    stochastic_method: Method = "block",
    drop_rate: float = 0.2,
    drop_distribution: Distribution = "linear",
    optimizers: Optimizer | Sequence[Optimizer] | None = None,
) -> list[str]:
    """Let residual blocks ``x + f(x)`` compute ``x + b / (1 - p) * f(x)`` in training, in place.

    ``b`` is 0 with probability ``p`` and 1 otherwise, so the mean over ``b`` is the block, which
    is what evaluation computes. In a block that ends in a ReLU both sums are rectified. A block
    dropped for the whole batch is not computed; its parameters get gradients of zero.

    A residual block is found by what it computes: with its weights at zero, and its norms neutral,
    it returns its input, or the input rectified. It stands in an ``nn.Sequential`` or
    ``nn.ModuleList``. Blocks that change the shape have no input to fall back on and are left.
    Parameter objects and ``state_dict`` keys stay. Applied twice it equals applied once. Until a
    run draws, the blocks draw from torch's default generators.

    Args:
        model: Any model with residual blocks.
        target_layer_name: Shell-style pattern of module names, or name of a class, to choose
            the blocks; of nested matches the outermost counts. None finds them.
        stochastic_method: ``"block"`` drops a block for the whole batch, ``"sample"`` for each
            example.
        drop_rate: Probability ``p`` to drop the last block, in [0, 1]; with 1 blocks are the
            identity.
        drop_distribution: ``"linear"``: block ``l`` of ``L`` is dropped with ``p * l / L``;
            ``"uniform"``: all with ``p``.
        optimizers: Accepted for symmetry; the parameters stay, so there is nothing to update.

    Returns:
        Names of the blocks, in the order of the model.

    Raises:
        ValueError: If a setting is out of range.
        UnsupportedError: If the model has a stochastic depth of its own that is switched on.

    Warns:
        NoEffectWarning: If there is no residual block.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, norm_first=True)
        >>> model = nn.Sequential(layer)
        >>> apply_stochastic_depth(model, drop_rate=1.0)
        ['0']
        >>> x = torch.randn(3, 2, 8)
        >>> torch.equal(model(x), x)
        True

    References:
        Huang et al., `Deep Networks with Stochastic Depth <https://arxiv.org/abs/1603.09382>`_,
        2016, Eq. 2 and 4. They scale the branch in evaluation (Eq. 5) instead of training.
    """
    _check("apply_stochastic_depth", stochastic_method, drop_rate, drop_distribution)
    for name, module in model.named_modules():
        if type(module).__name__.endswith(("DropPath", "StochasticDepth")):
            rate = getattr(module, "drop_prob", None) or getattr(module, "p", None) or 0.0
            if rate > 0:
                raise UnsupportedError(
                    f"apply_stochastic_depth: the model drops its branches itself, {name!r} at the"
                    f" rate {rate:g}; make it without (drop_path_rate=0, stochastic_depth_prob=0),"
                    " or remove StochasticDepth"
                )
    blocks = residual_blocks(model, target_layer_name)
    for i, (block, shortcut) in enumerate(blocks.values(), start=1):
        rate = drop_rate * (i / len(blocks) if drop_distribution == "linear" else 1)
        _self, *names = inspect.signature(original_class(block).forward).parameters
        depth = _Depth(stochastic_method, rate, shortcut, names[0] if names else "")
        swap_class(block, _StochasticBlock, mosaic_depth=depth)
    if not blocks:
        where = "" if target_layer_name is None else f" that matches {target_layer_name!r}"
        warn_no_effect("apply_stochastic_depth", f"residual block{where}")
    return list(blocks)


class _Depth:
    """How a block is dropped, and what was drawn for this micro-batch.

    Attributes:
        scale: Weight of a branch that is kept.
        skips: Whether a dropped block is left out, rather than computed and weighted by zero.
        dropped: Whether the run drops the whole block; None where the block itself draws.
        tensors: Probability, scale and seed, for graphs, which Python numbers would make compile
            anew at every step.
    """

    def __init__(self, method: Method, rate: float, shortcut: Shortcut, input: str) -> None:
        self.method, self.rate, self.shortcut, self.input = method, rate, shortcut, input
        self.skips = method == "block" and shortcut.beside is not None
        self.dropped: bool | None = None
        self.seeded = False
        self.tensors = torch.zeros(()), torch.zeros(()), torch.zeros((), dtype=torch.int64)
        self.draw(rate)

    def draw(self, rate: float, seed: int | None = None) -> None:
        """Set the probability, and with a seed what it decides."""
        self.scale = 1 / (1 - rate) if rate < 1 else 0.0
        if seed is not None:
            self.seeded = True
            self.tensors[2].fill_(seed)
            if self.method == "block":
                self.dropped = seed < rate * 2**63
                rate = float(self.dropped)
        self.tensors[0].fill_(rate)
        self.tensors[1].fill_(self.scale)

    def drops(self) -> bool:
        """Tell whether the whole block is dropped now."""
        return bool(torch.rand(()) < self.tensors[0]) if self.dropped is None else self.dropped

    def weight(self, x: Tensor) -> Tensor:
        """Return the weight of the branch: 0 or the scale, for the batch or each example."""
        rate, scale, seed = self.tensors
        shape = () if self.method == "block" else (x.shape[0], *(1,) * (x.dim() - 1))
        if self.seeded:
            return (uniform(shape, seed, x.device) >= rate) * scale
        return (torch.rand(shape, device=x.device) >= rate) * scale

    def combine(self, x: Tensor, output: Any, weight: Any) -> Any:
        """Weight the branch of a block that was computed, ``output = x + f(x)``.

        With a ReLU at its end ``x`` is one's output itself, so at least 0, and
        ``max(x + w * (max(x + f, 0) - x), 0) = max(x + w * f, 0)`` for every ``w`` of at least 1.
        """
        y = output[0] if isinstance(output, tuple) else output
        if y.shape != x.shape:
            raise TypeError(
                "StochasticDepth: a block must keep the shape of its input, got"
                f" {tuple(x.shape)} and returned {tuple(y.shape)}; choose others"
            )
        weight = weight.to(y.dtype) if isinstance(weight, Tensor) else y.new_full((), weight)
        return self.put(output, torch.lerp(x.to(y.dtype), y, weight))  # a number rounds otherwise

    def put(self, output: Any, y: Tensor) -> Any:
        """Return the new sum in the form in which the block returns it."""
        y = F.relu(y, inplace=True) if self.shortcut.rectified else y
        if output is None:
            return (y, *(self.shortcut.beside or ())) if self.shortcut.boxed else y
        return (y, *output[1:]) if isinstance(output, tuple) else y


class _StochasticBlock(Mixin):
    """Mixed into the class of a residual block."""

    mosaic_depth: _Depth

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the block, in training with its branch dropped or scaled."""
        if not self.training:
            return super().forward(*args, **kwargs)
        depth = self.mosaic_depth
        x = args[0] if args else kwargs.get(depth.input, next(iter(kwargs.values())))
        if depth.skips and not torch.compiler.is_compiling():
            if depth.drops():
                return depth.put(None, x + no_gradient(self, x))
            return depth.combine(x, super().forward(*args, **kwargs), depth.scale)
        weight, before = depth.weight(x), []
        if depth.method == "block":  # one that is dropped has not seen the batch
            before = [(b, b.clone()) for b in self.buffers()]
        output = super().forward(*args, **kwargs)
        for buffer, value in before:  # .data, as backward does not need what changes here
            buffer.data.copy_(torch.where(weight > 0, buffer, value))
        return depth.combine(x, output, weight)


def _check(where: str, method: str, rate: float, distribution: str) -> None:
    if method not in ("block", "sample"):
        raise ValueError(f"{where}: stochastic_method must be 'block' or 'sample', got {method!r}")
    if not 0 <= rate <= 1:
        raise ValueError(f"{where}: drop_rate must be in [0, 1], got {rate}")
    if distribution not in ("linear", "uniform"):
        raise ValueError(
            f"{where}: drop_distribution must be 'linear' or 'uniform', got {distribution!r}"
        )


@dataclass(frozen=True)
class StochasticDepth(Algorithm):
    """Skip the branches of residual blocks at random in training.

    Args:
        stochastic_method: ``"block"`` drops a block for the whole batch, on all ranks, and saves
            its computation; ``"sample"`` drops it for each example.
        drop_rate: Probability to drop the last block, in [0, 1].
        drop_distribution: ``"linear"`` grows from the first block to the last, ``"uniform"`` gives
            all the same.
        drop_warmup: Time in which the rate grows linearly from 0: a fraction of the run, or a
            duration in ``dur``, ``ep`` or ``ba``.
        target_layer_name: Shell-style pattern of module names, or name of a class, to choose the
            blocks; None finds them.

    Raises:
        ValueError: If a setting is out of range.
    """

    stochastic_method: Method = "block"
    drop_rate: float = 0.2
    drop_distribution: Distribution = "linear"
    drop_warmup: float | str = 0.0
    target_layer_name: str | None = None

    place = Place.SURGERY
    draws_in_forward = True
    card = Card(
        category="any",
        summary="Skips the branches of residual blocks at random in training.",
        effect='With "block" a dropped block is not computed, so a step costs about the mean rate'
        ' less; sharded and compiled models, and "sample", compute it and weight it by zero.'
        " Evaluation, names and checkpoints are those of the plain model.",
        use_when="Deep residual networks that overfit or train for long; small rates for short"
        " runs and shallow networks.",
        interactions="Kept branches are scaled by 1 / (1 - rate). Blocks that change the shape are"
        " never dropped. Whole blocks are dropped, also those that sum several branches; of a block"
        " that ends in a norm, the norm is part of the branch. Refuses models whose own stochastic"
        " depth is on.",
        reference="Huang et al. 2016",
        url="https://arxiv.org/abs/1603.09382",
    )

    @classmethod
    def example(cls) -> "StochasticDepth":
        """Return one that acts on the contract suites' network, where a norm can be skipped."""
        return cls("block", 0.5, "uniform", "2ba", "*norm2")

    def __post_init__(self) -> None:
        """Check the settings."""
        _check("StochasticDepth", self.stochastic_method, self.drop_rate, self.drop_distribution)
        if self._warmup.unit not in ("ba", "ep", "dur"):
            raise ValueError(
                f"StochasticDepth: drop_warmup must be in dur, ep or ba, got {self.drop_warmup!r}"
            )

    @property
    def _warmup(self) -> Duration:
        unit = "" if isinstance(self.drop_warmup, str) else "dur"
        return Duration.parse(f"{self.drop_warmup}{unit}", "StochasticDepth: drop_warmup")

    def prepare_model(self, model: nn.Module, run: "Run") -> None:
        """Change the blocks; in evaluation they stay, so a checkpoint needs no warning."""
        names = apply_stochastic_depth(
            model,
            self.target_layer_name,
            self.stochastic_method,
            self.drop_rate,
            self.drop_distribution,
        )
        run.report.notes.append(f"StochasticDepth drops {', '.join(names) or 'nothing'}")

    def init_state(self, run: "Run") -> list[_Depth]:
        """Return what the blocks read; a warm-up this run can't tell is refused here."""
        self._strength(run)
        depths = [m.mosaic_depth for m in run.model.modules() if isinstance(m, _StochasticBlock)]
        for depth in depths:  # of a sharded block that is skipped, no rank would gather parameters
            depth.skips = depth.skips and isinstance(run.parameters, ReplicatedParameters)
        return depths

    def _strength(self, run: "Run") -> float:
        if self._warmup.value == 0:
            return 1.0
        return min(1.0, run.progress.step / run.progress.steps(self._warmup))

    def on_batch(self, batch: Batch, run: "Run") -> Batch:
        """Draw for each block; the batch stays."""
        strength, shared = self._strength(run), self.stochastic_method == "block"
        for i, depth in enumerate(run.state(self)):  # not by name, which a wrapper would change
            depth.draw(depth.rate * strength, run.seed_for(self, i, shared=shared))
        return batch
