"""The mixture of labels: what mixing, smoothing and weighting of examples do to the target.

MixUp, CutMix, LabelSmoothing and the like all turn the label of an example into a distribution.
That distribution is one value here, a :class:`Mixture`, so that they compose in any order; what
it means for a loss is defined once, in :meth:`Mixture.loss`. How it travels to the user's own
loss is the matter of :mod:`mosaic_core.target`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic_core.errors import UnsupportedError

__all__ = ["Mixture", "Receipt", "is_known_loss", "known_losses", "register_loss_function"]


@dataclass
class Receipt:
    """Whether a loss has computed the mixture, shared by all views of one target."""

    consumed: bool = False


@dataclass(frozen=True)
class Mixture:
    """A target ``(1 - smoothing) * sum_k weight_k * label_k + smoothing * uniform``.

    Attributes:
        components: Pairs of label and weight. Labels are what the loss takes: class indices
            ``(N, ...)`` or dense targets. A weight is None for 1, or a float tensor of shape
            ``()`` or one that broadcasts against the labels from the left, such as ``(N,)``.
        smoothing: Share of the uniform distribution over the classes, in [0, 1].
        receipt: Marked when a loss has computed the mixture.
    """

    components: tuple[tuple[Tensor, Tensor | None], ...]
    smoothing: float = 0.0
    receipt: Receipt = field(default_factory=Receipt)

    @classmethod
    def of(cls, label: Tensor) -> "Mixture":
        """Return the mixture of one label per example and nothing else."""
        return cls(((label, None),))

    @property
    def label(self) -> Tensor:
        """The label of the first component: the example's own."""
        return self.components[0][0]

    @property
    def trivial(self) -> bool:
        """Whether it is the plain label."""
        return not self.smoothing and len(self.components) == 1 and self.components[0][1] is None

    # What algorithms do to it: each returns a new mixture.

    def mix(self, indices: Tensor, mixing: Tensor) -> "Mixture":
        """Blend every example's target with that of its partner.

        Args:
            indices: Partner of each example, int64, shape ``(N,)``.
            mixing: Weight of the partner, in [0, 1], shape ``()`` or ``(N,)``.
        """
        own = tuple((label, _times(1 - mixing, weight)) for label, weight in self.components)
        partner = tuple(
            (label[indices], _times(mixing, _select(weight, indices)))
            for label, weight in self.components
        )
        return replace(self, components=own + partner)

    def smooth(self, smoothing: float) -> "Mixture":
        """Move a share of the target to the uniform distribution over the classes."""
        return replace(self, smoothing=1 - (1 - self.smoothing) * (1 - smoothing))

    def weighted(self, weights: Tensor) -> "Mixture":
        """Weight the examples, shape ``(N,)``: a mean becomes the weighted mean."""
        weighted = ((label, _times(weights, weight)) for label, weight in self.components)
        return replace(self, components=tuple(weighted))

    def select(self, indices: Tensor) -> "Mixture":
        """Keep some of the examples, by index or mask of shape ``(N,)``."""
        kept = ((label[indices], _select(weight, indices)) for label, weight in self.components)
        return replace(self, components=tuple(kept))

    def map(self, function: Callable[[Tensor], Any]) -> "Mixture":
        """Apply one reshaping, indexing or moving operation to all labels and their weights."""
        return replace(
            self,
            components=tuple(
                (function(label), _map_weight(function, label, weight))
                for label, weight in self.components
            ),
        )

    # What it is.

    def dense(self, num_classes: int) -> Tensor:
        """Return the distribution, float32, shape ``(N, C, ...)``; for inspection, not training.

        Args:
            num_classes: Number C of classes.
        """
        total = torch.zeros(())
        for label, weight in self.components:
            one_hot = label
            if not label.is_floating_point():
                one_hot = F.one_hot(label, num_classes).movedim(-1, 1).float()
            total = total + (one_hot if weight is None else _align(weight, one_hot) * one_hot)
        return total * (1 - self.smoothing) + self.smoothing / num_classes

    def loss(
        self,
        function: Callable[..., Tensor],
        input: Tensor,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Evaluate a loss on the mixture and mark it as consumed.

        The value is the weighted sum of the components' losses; with ``reduction="mean"`` it is
        divided by what torch divides by for class indices, the weights of the counted examples.

        Args:
            function: The loss, one of :func:`known_losses`.
            input: Prediction, as the loss takes it.
            args: What follows input and target in the call.
            kwargs: Keyword arguments of the call.

        Raises:
            UnsupportedError: If smoothing is asked of a loss without classes, or per-example
                weights of a loss without ``reduction="none"``.
        """
        self.receipt.consumed = True
        return _LOSSES[function](self, function, input, args, dict(kwargs or {}))


def _times(a: Tensor, b: Tensor | None) -> Tensor:
    if b is None:
        return a
    return a * b if a.dim() == 0 else _align(a, b) * _align(b, a)


def _align(weight: Tensor, like: Tensor) -> Tensor:
    """Append dimensions of size 1, so that a weight broadcasts from the left."""
    return weight.reshape(weight.shape + (1,) * max(0, like.dim() - weight.dim()))


def _select(weight: Tensor | None, indices: Tensor) -> Tensor | None:
    return weight if weight is None or weight.dim() == 0 else weight[indices]


def _map_weight(
    function: Callable[[Tensor], Any], label: Tensor, weight: Tensor | None
) -> Tensor | None:
    if weight is None or weight.dim() == 0:
        return weight
    weight = _align(weight, label).expand_as(label)
    moved: Tensor = function(weight)
    # A change of dtype is meant for the label: the weight keeps its precision.
    return moved if moved.dtype == weight.dtype else weight.to(moved.device)


# What a mixture means for each kind of loss.

_Handler = Callable[
    [Mixture, Callable[..., Tensor], Tensor, tuple[Any, ...], dict[str, Any]], Tensor
]


def _over_classes(
    mixture: Mixture,
    function: Callable[..., Tensor],
    input: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """Evaluate F.cross_entropy or F.nll_loss: one log-softmax serves all components."""
    options = _named(args, kwargs, ("weight", "size_average", "ignore_index", "reduce"))
    class_weight, reduction = options.get("weight"), options.get("reduction", "mean")
    ignore_index = options.get("ignore_index", -100)
    if options.get("size_average") is not None or options.get("reduce") is not None:
        raise UnsupportedError(
            f"{function.__name__}: size_average and reduce are not known for a mixture of labels;"
            " use reduction"
        )
    smoothing = mixture.smooth(options.get("label_smoothing", 0.0)).smoothing
    label, only_weight = mixture.components[0]
    is_cross_entropy = function is F.cross_entropy

    if is_cross_entropy and label.is_floating_point():
        return _over_dense_classes(mixture, input, class_weight, reduction, smoothing)
    if is_cross_entropy and len(mixture.components) == 1 and only_weight is None:
        # A single label needs nothing but torch's fused smoothing.
        return function(
            input,
            label,
            weight=class_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=smoothing,
        )

    if torch.is_autocast_enabled(input.device.type):
        input = input.float()  # as autocast does for F.cross_entropy
    class_dim = 0 if input.dim() == 1 else 1
    log_prob = input.log_softmax(class_dim) if is_cross_entropy else input
    if class_weight is None:
        uniform = -log_prob.mean(class_dim) if smoothing else None
    else:
        class_weight = class_weight.to(log_prob.dtype)
        shape = (-1,) + (1,) * (log_prob.dim() - class_dim - 1)
        uniform = -(log_prob * class_weight.view(shape)).mean(class_dim) if smoothing else None

    total, norm = torch.zeros((), device=input.device), torch.zeros((), device=input.device)
    for label, weight in mixture.components:
        counted = (label != ignore_index).to(log_prob.dtype)
        loss = F.nll_loss(
            log_prob, label, class_weight, ignore_index=ignore_index, reduction="none"
        )
        if uniform is not None:
            loss = (1 - smoothing) * loss + smoothing * counted * uniform
        if class_weight is not None:
            # Masked labels may lie outside the classes, so they are looked up as class 0.
            counted = counted * class_weight[label.where(counted > 0, 0)]
        if weight is not None:
            loss, counted = _align(weight, loss) * loss, _align(weight, loss) * counted
        total, norm = total + loss, norm + counted
    return _reduced(total, norm, reduction).to(log_prob.dtype)  # float32 weights promote bfloat16


def _over_dense_classes(
    mixture: Mixture, input: Tensor, class_weight: Tensor | None, reduction: str, smoothing: float
) -> Tensor:
    """Evaluate F.cross_entropy, which is linear in a dense target, once, on the blended target."""
    target = _blend(mixture)
    if not _per_example(mixture):  # the weights add up to one
        return F.cross_entropy(
            input, target, class_weight, reduction=reduction, label_smoothing=smoothing
        )
    share = torch.zeros_like(target)
    for _, weight in mixture.components:
        share = share + (1 if weight is None else _align(weight, target))
    classes = target.shape[0 if input.dim() == 1 else 1]
    target = target * (1 - smoothing) + share * (smoothing / classes)
    if reduction != "mean":
        return F.cross_entropy(input, target, class_weight, reduction=reduction)
    total = F.cross_entropy(input, target, class_weight, reduction="sum")
    return total * classes / share.sum()


def _linear(
    mixture: Mixture,
    function: Callable[..., Tensor],
    input: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """Evaluate a loss that is affine in a dense target, once, on the blended target."""
    if mixture.smoothing:
        shape, smoothing = mixture.label.shape, mixture.smoothing
        if len(shape) < 2 or shape[1] < 2:
            raise UnsupportedError(
                f"{function.__name__}: label smoothing needs targets of shape (N, C, ...) with at"
                f" least 2 classes, got {tuple(shape)}; take LabelSmoothing out of the recipe"
            )
        smoothed = tuple(
            (label * (1 - smoothing) + smoothing / shape[1], weight)
            for label, weight in mixture.components
        )
        mixture = replace(mixture, components=smoothed, smoothing=0.0)
    if _per_example(mixture):  # the weights need not add up to one
        return _interpolated(mixture, function, input, args, kwargs)
    return function(input, _blend(mixture), *args, **kwargs)


def _interpolated(
    mixture: Mixture,
    function: Callable[..., Tensor],
    input: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """Evaluate any loss once per component and add up."""
    if mixture.smoothing:
        raise UnsupportedError(
            f"{_name(function)}: label smoothing is defined for F.cross_entropy, F.nll_loss and"
            " F.binary_cross_entropy(_with_logits); take LabelSmoothing out of the recipe"
        )
    if not _per_example(mixture):
        losses = [
            _scaled(function(input, label, *args, **kwargs), weight)
            for label, weight in mixture.components
        ]
        return torch.stack(losses).sum(0) if len(losses) > 1 else losses[0]

    reduction = kwargs.pop("reduction", "mean")
    total, norm = torch.zeros((), device=input.device), torch.zeros((), device=input.device)
    try:
        for label, weight in mixture.components:
            loss = function(input, label, *args, reduction="none", **kwargs)
            if loss.shape[:1] != label.shape[:1]:
                raise TypeError(f"expected a loss of shape (N, ...), got {tuple(loss.shape)}")
            share = torch.ones_like(loss) if weight is None else _align(weight, loss)
            total, norm = total + share * loss, norm + share.expand_as(loss)
    except TypeError as error:
        raise UnsupportedError(
            f"{_name(function)}: labels mixed with a weight per example need a loss that takes"
            ' reduction="none"'
        ) from error
    return _reduced(total, norm, reduction).to(loss.dtype)


def _reduced(total: Tensor, norm: Tensor, reduction: str) -> Tensor:
    if reduction in ("none", "sum"):
        return total if reduction == "none" else total.sum()
    if reduction not in ("mean", "batchmean"):
        raise ValueError(f"{reduction} is not a valid value for reduction")  # in torch's words
    mean = total.sum() / norm.sum()
    return mean * total[0].numel() if reduction == "batchmean" else mean


def _per_example(mixture: Mixture) -> bool:
    """Tell whether a weight differs between examples."""
    return any(weight is not None and weight.dim() > 0 for _, weight in mixture.components)


def _blend(mixture: Mixture) -> Tensor:
    """Add dense labels up."""
    total = _scaled(*mixture.components[0])
    for label, weight in mixture.components[1:]:
        total = total + _scaled(label, weight)
    return total


def _scaled(value: Tensor, weight: Tensor | None) -> Tensor:
    return value if weight is None else value * _align(weight, value).to(value.dtype)


def _named(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], names: tuple[str, ...]
) -> dict[str, Any]:
    """Give the positional options of a torch loss their names."""
    return {**dict(zip((*names, "reduction", "label_smoothing"), args, strict=False)), **kwargs}


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


_LOSSES: dict[Callable[..., Tensor], _Handler] = {
    F.cross_entropy: _over_classes,
    F.nll_loss: _over_classes,
    F.binary_cross_entropy: _linear,
    F.binary_cross_entropy_with_logits: _linear,
    F.mse_loss: _interpolated,
    F.l1_loss: _interpolated,
    F.smooth_l1_loss: _interpolated,
    F.huber_loss: _interpolated,
    F.kl_div: _interpolated,
}


def known_losses() -> dict[Callable[..., Tensor], str]:
    """Return the losses that compute a mixture, with their names."""
    return {function: _name(function) for function in _LOSSES}


def is_known_loss(function: Callable[..., Any]) -> bool:
    """Tell whether a loss computes a mixture."""
    return function in _LOSSES


def register_loss_function(function: Callable[..., Tensor]) -> None:
    """Add a loss ``function(input, target, ...)``, evaluated once per component."""
    _LOSSES.setdefault(function, _interpolated)
