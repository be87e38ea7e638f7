"""What a mixture of labels means for each kind of loss, and which losses are known.

The value is the weighted sum of the losses of the components; with ``reduction="mean"`` it is
divided by what torch divides by for class indices, the weights of the counted examples.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic_core.errors import UnsupportedError
from mosaic_core.mixture import Mixture, align, compose

__all__ = ["evaluate", "is_known_loss", "known_losses", "register_loss_function"]

_Handler = Callable[
    [Mixture, Callable[..., Tensor], Tensor, tuple[Any, ...], dict[str, Any]], Tensor
]


def evaluate(
    mixture: Mixture,
    function: Callable[..., Tensor],
    input: Tensor,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Evaluate a loss on a mixture and mark the mixture as consumed.

    Args:
        mixture: The mixture.
        function: The loss, one of :func:`known_losses`.
        input: Prediction, as the loss takes it.
        args: What follows input and target in the call.
        kwargs: Keyword arguments of the call.

    Raises:
        UnsupportedError: If smoothing is asked of a loss without classes, or per-example weights
            of a loss without ``reduction="none"``.
    """
    mixture.receipt.consumed = True
    value = _LOSSES[function](mixture, function, input, args, dict(kwargs or {}))
    if mixture.receipt.values is not None:
        mixture.receipt.values.append(value)
    if mixture.receipt.elements is not None:
        mixture.receipt.elements.append(_elements(mixture.label, function, input, args, kwargs))
    return value


def _elements(
    label: Tensor,
    function: Callable[..., Tensor],
    input: Tensor,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
) -> tuple[Tensor, Tensor]:
    """Evaluate a loss on plain labels without its reduction; tell which elements count."""
    call = inspect.signature(function).bind(input, label, *args, **(kwargs or {}))
    if "reduction" not in call.signature.parameters:
        raise UnsupportedError(
            f'{_name(function)}: the losses of single examples need reduction="none", which it'
            " does not take"
        )
    call.arguments["reduction"] = "none"
    loss = function(*call.args, **call.kwargs)
    counted = torch.ones_like(loss)
    if function in (F.cross_entropy, F.nll_loss) and not label.is_floating_point():
        counted = (label != call.arguments.get("ignore_index", -100)).to(loss.dtype)
    return loss, counted


def _cross_entropy(
    mixture: Mixture,
    function: Callable[..., Tensor],
    input: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """Evaluate F.cross_entropy: a single label needs nothing but torch's fused smoothing."""
    label, weight = mixture.components[0]
    if weight is not None or len(mixture.components) > 1 or label.is_floating_point():
        return _over_classes(mixture, function, input, args, kwargs)
    options = _named(args, kwargs) if args else kwargs
    options["label_smoothing"] = compose(mixture.smoothing, options.get("label_smoothing", 0.0))
    return function(input, label, **options)


def _over_classes(
    mixture: Mixture,
    function: Callable[..., Tensor],
    input: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """Evaluate F.cross_entropy or F.nll_loss: one log-softmax serves all components."""
    options = _named(args, kwargs)
    class_weight, reduction = options.get("weight"), options.get("reduction", "mean")
    ignore_index = options.get("ignore_index", -100)
    if options.get("size_average") is not None or options.get("reduce") is not None:
        raise UnsupportedError(
            f"{function.__name__}: size_average and reduce are not known for a mixture of labels;"
            " use reduction"
        )
    smoothing = compose(mixture.smoothing, options.get("label_smoothing", 0.0))
    is_cross_entropy = function is F.cross_entropy
    if is_cross_entropy and mixture.label.is_floating_point():
        return _over_dense_classes(mixture, input, class_weight, reduction, smoothing)

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
            loss, counted = align(weight, loss) * loss, align(weight, loss) * counted
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
        share = share + (1 if weight is None else align(weight, target))
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
            share = torch.ones_like(loss) if weight is None else align(weight, loss)
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
    return value if weight is None else value * align(weight, value).to(value.dtype)


_OPTIONS = ("weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Give the positional options of F.cross_entropy and F.nll_loss their names."""
    return {**dict(zip(_OPTIONS[: len(args)], args, strict=True)), **kwargs}


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


_LOSSES: dict[Callable[..., Tensor], _Handler] = {
    F.cross_entropy: _cross_entropy,
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
