"""GradientClipping: bound gradients by their norm, by their value or by the size of the weights."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaic_core.algorithm import Algorithm, Card, Place
from mosaic_core.norm import global_norm
from mosaic_core.parameters import Fragment

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["GradientClipping", "apply_gradient_clipping"]

_TYPES = ("norm", "value", "adaptive")
_EPS = 1e-3  # the least norm of a weight in Eq. 3 of the paper: zero weights still learn


@torch.no_grad()
def apply_gradient_clipping(
    model: nn.Module,
    clipping_type: Literal["norm", "value", "adaptive"],
    clipping_threshold: float,
) -> None:
    """Clip the gradients of a model, in place.

    - ``"norm"``: ``g * min(1, t / (|g| + 1e-6))`` with the norm of all gradients together, as
      ``torch.nn.utils.clip_grad_norm_``.
    - ``"value"``: every element to ``[-t, t]``, as ``torch.nn.utils.clip_grad_value_``.
    - ``"adaptive"``: ``g * min(1, t * max(|w|, 1e-3) / |g|)`` for every unit: the weights of one
      output, that is one index of the first dimension, or a vector or scalar as a whole.

    Args:
        model: Model with gradients; parameters without one are left out.
        clipping_type: What bounds the gradients.
        clipping_threshold: The bound ``t``, above 0; for ``"adaptive"`` a share of the weights.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> model.weight.grad = torch.tensor([[7.0, 24.0]])
        >>> apply_gradient_clipping(model, "adaptive", 0.5)
        >>> model.weight.grad
        tensor([[0.7000, 2.4000]])

    References:
        Pascanu et al., `On the difficulty of training recurrent neural networks
        <https://arxiv.org/abs/1211.5063>`_, 2013, Algorithm 1; Brock et al., `High-Performance
        Large-Scale Image Recognition Without Normalization <https://arxiv.org/abs/2102.06171>`_,
        2021, Eq. 3.
    """
    _check("apply_gradient_clipping", clipping_type, clipping_threshold)
    weights = [p for p in model.parameters() if p.grad is not None]
    grads = [p.grad for p in weights if p.grad is not None]
    if not grads:
        return
    if clipping_type == "value":
        _clamp(grads, clipping_threshold)
    elif clipping_type == "norm":
        _scale(grads, global_norm(grads, grads[0].device), clipping_threshold)
    else:
        _scale_units(grads, _unit_norms(weights), _unit_norms(grads), clipping_threshold)


def _clamp(grads: list[Tensor], threshold: float) -> None:
    if grads:
        torch._foreach_clamp_min_(grads, -threshold)
        torch._foreach_clamp_max_(grads, threshold)


def _scale(grads: list[Tensor], norm: Tensor, threshold: float) -> None:
    if grads:
        torch._foreach_mul_(grads, (threshold / (norm + 1e-6)).clamp_(max=1))


def _unit_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the norms of the units of each tensor, in a shape that multiplies it.

    Summed in the order of the elements, so that no layout in memory, such as channels last, is seen
    in their last bits.
    """
    return [
        torch.linalg.vector_norm(t.flatten(1), dim=1, dtype=_precise(t)).view(
            -1, *(1,) * (t.ndim - 1)
        )
        if t.ndim > 1
        else torch.linalg.vector_norm(t, dtype=_precise(t))
        for t in tensors
    ]


def _scale_units(
    grads: list[Tensor], weight_norms: list[Tensor], grad_norms: list[Tensor], threshold: float
) -> None:
    """Scale gradients by unit, in place; the norms of the weights are used up."""
    if not grads:
        return
    factors = weight_norms
    torch._foreach_clamp_min_(factors, _EPS)
    torch._foreach_mul_(factors, threshold)
    torch._foreach_div_(factors, grad_norms)  # infinite without a gradient
    torch._foreach_clamp_max_(factors, 1.0)
    torch._foreach_mul_(grads, factors)


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _check(where: str, clipping_type: str, threshold: float) -> None:
    if clipping_type not in _TYPES:
        raise ValueError(f"{where}: clipping_type must be one of {_TYPES}, got {clipping_type!r}")
    if not threshold > 0:
        raise ValueError(f"{where}: clipping_threshold must be above 0, got {threshold}")


@dataclass
class _State:
    """Where the units of each parameter begin in a list of all, the same on every rank.

    It is empty where every parameter is owned whole, by this rank or by another.
    """

    first: dict[str, int] = field(default_factory=dict)
    units: int = 0


@dataclass(frozen=True)
class GradientClipping(Algorithm):
    """Clip the gradients of each step before the optimizer takes it.

    Args:
        clipping_type: ``"norm"`` bounds the norm of all gradients together, ``"value"`` every
            element, ``"adaptive"`` the norm of each unit relative to that of its weights.
        clipping_threshold: The bound, above 0; for ``"adaptive"`` a share of the weights' norm,
            0.01 to 0.16 in the paper.

    Raises:
        ValueError: If a setting is out of range.
    """

    clipping_type: Literal["norm", "value", "adaptive"]
    clipping_threshold: float

    place = Place.GRADIENTS
    card = Card(
        category="any",
        summary="Bounds gradients by norm, by value, or by the size of the weights they change.",
        effect="A few passes over the gradients a step, without waiting for the device; adaptive"
        " clipping reads the weights too. A unit whose weights are zero still learns: its norm"
        " counts as 0.001.",
        use_when="Training that diverges at the learning rate or batch size you want; adaptive"
        " clipping most of all in networks without batch norm.",
        interactions="Acts in the order of the recipe among algorithms on gradients, after SAM's"
        " second pass. Clipping by the trainer acts afterwards, on gradients that are clipped"
        " already; one of the two is enough.",
        reference="Brock et al. 2021",
        url="https://arxiv.org/abs/2102.06171",
    )

    @classmethod
    def example(cls) -> "GradientClipping":
        """Return one that acts on the network of the contract suites."""
        return cls("adaptive", 0.02)

    def __post_init__(self) -> None:
        """Check the settings."""
        _check("GradientClipping", self.clipping_type, self.clipping_threshold)

    def init_state(self, run: "Run") -> _State:
        """Lay the units of all parameters out, if a rank owns a slice that may cut one apart."""
        if self.clipping_type != "adaptive":
            return _State()
        owned = {f.name: f for f in run.parameters.fragments()}
        names = [name for name, _ in run.model.named_parameters()]
        counts = torch.zeros(len(names) + 1, dtype=torch.int64)
        counts[-1] = sum(f.numel < torch.Size(f.shape).numel() for f in owned.values())
        for i, name in enumerate(names):
            if name in owned and owned[name].start == 0:  # so one rank counts each
                shape = owned[name].shape
                counts[i] = shape[0] if len(shape) > 1 else 1
        *units, slices = run.parameters.all_reduce(counts).tolist()
        if not slices:
            return _State()
        first = itertools.accumulate(units, initial=0)
        return _State(dict(zip(names, first, strict=False)), sum(units))

    @torch.no_grad()
    def on_gradients(self, run: "Run") -> None:
        """Clip what this rank owns, by norms over all ranks."""
        view, threshold = run.parameters, self.clipping_threshold
        state: _State = run.state(self)
        pairs = [(f, g) for f in view.fragments() if (g := view.grad(f)) is not None]
        grads = [grad for _, grad in pairs]
        if self.clipping_type == "value":
            _clamp(grads, threshold)
        elif self.clipping_type == "norm":
            norm = global_norm(grads, next(run.model.parameters()).device, view.all_reduce)
            _scale(grads, norm, threshold)
            run.log("GradientClipping/grad_norm", norm)
        elif state.units:
            self._clip_slices(run, pairs)
        else:
            weights = [fragment.master for fragment, _ in pairs]
            _scale_units(grads, _unit_norms(weights), _unit_norms(grads), threshold)
        for fragment, grad in pairs:  # where the view gave a copy
            view.set_grad(fragment, grad)

    def _clip_slices(self, run: "Run", pairs: list[tuple[Fragment, Tensor]]) -> None:
        """Clip slices adaptively: sum the squares of each unit over the ranks that have a part."""
        state: _State = run.state(self)
        squares = torch.zeros(2, state.units, device=pairs[0][1].device if pairs else None)
        places = []
        for fragment, grad in pairs:
            weight_rows, grad_rows = _rows(fragment, fragment.master), _rows(fragment, grad)
            first = state.first[fragment.name] + fragment.start // grad_rows.shape[1]
            place = slice(first, first + len(grad_rows))
            squares[0, place] = weight_rows.square().sum(1)
            squares[1, place] = grad_rows.square().sum(1)
            places.append(place)
        weight_norms, grad_norms = run.parameters.all_reduce(squares).sqrt()
        factors = torch.ones_like(weight_norms)
        _scale_units([factors], [weight_norms], [grad_norms], self.clipping_threshold)
        for (fragment, grad), place in zip(pairs, places, strict=True):
            rows = _rows(fragment, grad)
            head = fragment.start % rows.shape[1]
            scaled = (rows * factors[place, None]).flatten()
            grad.copy_(scaled[head : head + fragment.numel].view_as(grad))


def _rows(fragment: Fragment, tensor: Tensor) -> Tensor:
    """Return a slice as rows of a unit each, the first and the last filled up with zeros."""
    shape = torch.Size(fragment.shape)
    length = shape[1:].numel() if len(shape) > 1 else shape.numel()
    head = fragment.start % length
    return F.pad(tensor.flatten(), (head, -(head + fragment.numel) % length)).view(-1, length)
