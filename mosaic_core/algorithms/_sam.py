"""SAM: step with the gradient of a nearby point where the loss is higher."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mosaic_core.algorithm import Algorithm, Card, Place
from mosaic_core.norm import global_norm
from mosaic_core.parameters import Fragment

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["SAM", "sam_perturb", "sam_restore"]


@torch.no_grad()
def sam_perturb(
    parameters: Iterable[Tensor],
    rho: float = 0.05,
    epsilon: float = 1e-12,
    adaptive: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """Move weights uphill, in place: ``w + rho * g / (|g| + epsilon)``.

    The norm is that of all gradients together. With ``adaptive`` every element is scaled by its
    own size: ``w + rho * w^2 * g / (|w * g| + epsilon)``.

    Args:
        parameters: Weights, floating-point, with their gradients; those without one stay.
        rho: Length of the move, above 0.
        epsilon: Added to the norm, at least 0.
        adaptive: Whether the neighbourhood scales with the weights (ASAM).

    Returns:
        Pairs of a moved weight and a copy of what it was, for :func:`sam_restore`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> w = torch.tensor([1.0], requires_grad=True)
        >>> (3 * w).sum().backward()
        >>> before = sam_perturb([w], rho=0.5)
        >>> w.item()
        1.5
        >>> sam_restore(before)
        >>> w.item()
        1.0

    References:
        Foret et al., `Sharpness-Aware Minimization <https://arxiv.org/abs/2010.01412>`_, 2021,
        Eq. 2; Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021, Eq. 7.
    """
    _check("sam_perturb", rho, epsilon)
    moved = [p for p in parameters if p.grad is not None]
    grads = [p.grad for p in moved if p.grad is not None]
    if not moved:
        return []
    steps, normed = _directions(moved, grads, adaptive)
    return _move(moved, steps, rho / (global_norm(normed, moved[0].device) + epsilon))


@torch.no_grad()
def sam_restore(before: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Give weights back, in place, what they were before :func:`sam_perturb`.

    Args:
        before: What :func:`sam_perturb` returned.
    """
    if before:
        weights, saved = (list(tensors) for tensors in zip(*before, strict=True))
        torch._foreach_copy_(weights, saved)


def _directions(
    weights: list[Tensor], grads: list[Tensor], adaptive: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the unscaled moves, new tensors if adaptive, and what to divide by the norm of."""
    # The range of float16 is too small for squared weights and for one over a tiny norm.
    grads = [g.float() if g.dtype == torch.float16 else g for g in grads]
    if not (adaptive and grads):
        return grads, grads
    normed = list(torch._foreach_mul(weights, grads))
    return list(torch._foreach_mul(normed, weights)), normed


def _move(weights: list[Tensor], steps: list[Tensor], scale: Tensor) -> list[tuple[Tensor, Tensor]]:
    if not weights:
        return []
    saved = [weight.detach().clone() for weight in weights]
    torch._foreach_add_(weights, torch._foreach_mul(steps, scale))
    return list(zip(weights, saved, strict=True))


def _check(where: str, rho: float, epsilon: float) -> None:
    if not rho > 0:
        raise ValueError(f"{where}: rho must be above 0, got {rho}")
    if not epsilon >= 0:
        raise ValueError(f"{where}: epsilon must be at least 0, got {epsilon}")


@dataclass
class _State:
    before: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class SAM(Algorithm):
    """Step with the gradient of the point that is ``rho`` uphill, where the loss is sharpest.

    Every ``interval`` steps the window of micro-batches is run forward and backward a second time,
    at the moved weights; the optimizer then steps from the original ones.

    Args:
        rho: Length of the move uphill, above 0.
        epsilon: Added to the norm of the gradient, at least 0.
        interval: Optimizer steps from one such step to the next, at least 1; the others are plain.
        adaptive: Whether the neighbourhood scales with the weights (ASAM); ``rho`` is then larger,
            0.5 to 2.

    Raises:
        ValueError: If a setting is out of range.
    """

    rho: float = 0.05
    epsilon: float = 1e-12
    interval: int = 1
    adaptive: bool = False

    place = Place.GRADIENTS
    card = Card(
        category="any",
        summary="Steps with the gradient taken a little uphill, which favours flat minima.",
        effect="A step takes two forward and backward passes, on average 1 + 1/interval, and one"
        " more copy of the weights. Batch-norm statistics, metrics and logs move once.",
        use_when="Training long enough to overfit, where accuracy counts more than time; an"
        " interval of 2 to 10 keeps most of the gain.",
        interactions="Sees gradients before clipping, which acts on those of the second pass."
        " Not with algorithms that draw inside forward, which a second pass would not repeat.",
        reference="Foret et al. 2021",
        url="https://arxiv.org/abs/2010.01412",
    )

    def __post_init__(self) -> None:
        """Check the settings."""
        _check("SAM", self.rho, self.epsilon)
        if self.interval < 1:
            raise ValueError(f"SAM: interval must be at least 1, got {self.interval}")

    def init_state(self, run: "Run") -> _State:
        """Begin with nothing moved."""
        return _State()

    def second_pass_due(self, run: "Run") -> bool:
        """Take two passes every ``interval`` steps, the first included."""
        return run.progress.step % self.interval == 0

    @torch.no_grad()
    def on_first_pass(self, run: "Run") -> None:
        """Move uphill; each rank moves what it owns, by the norm over all."""
        view = run.parameters
        pairs: list[tuple[Fragment, Tensor]] = [
            (fragment, grad)
            for fragment in view.fragments()
            if (grad := view.grad(fragment)) is not None
        ]
        masters = [fragment.master for fragment, _ in pairs]
        steps, normed = _directions(masters, [grad for _, grad in pairs], self.adaptive)
        device = next(run.model.parameters()).device  # this rank may own nothing with a gradient
        norm = global_norm(normed, device, view.all_reduce)
        run.state(self).before = _move(masters, steps, self.rho / (norm + self.epsilon))
        run.log("SAM/grad_norm", norm)

    def on_second_pass(self, run: "Run") -> None:
        """Go back to where the step starts."""
        state: _State = run.state(self)
        sam_restore(state.before)
        state.before = []
