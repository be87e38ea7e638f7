"""The two carriers that bring a mixture of labels to the user's own loss.

Where the loss is out of reach, the target itself carries the mixture: :class:`MixedTarget` is the
plain label for everything but losses. Where a trainer holds the loss, :class:`LossProxy` stands in
for it. Both leave the user's loss, metrics and model as they are.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mosaic_core.errors import LossError, UnsupportedError
from mosaic_core.losses import evaluate, is_known_loss, known_losses, register_loss_function
from mosaic_core.mixture import Mixture, Receipt, compose

__all__ = ["LossProxy", "MixedTarget", "register_loss", "unconsumed"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Operations that reshape, index, convert or move labels: the mixture goes along. A dictionary, as
# torch.compile up to torch 2.9 can't look into a set.
_CARRIED = dict.fromkeys(
    {
        *(Tensor.view, Tensor.reshape, Tensor.flatten, Tensor.squeeze, Tensor.unsqueeze),
        *(Tensor.ravel, Tensor.view_as, Tensor.reshape_as, Tensor.expand_as, Tensor.select),
        *(Tensor.permute, Tensor.transpose, Tensor.movedim, Tensor.expand, Tensor.narrow),
        *(Tensor.contiguous, Tensor.clone, Tensor.detach, Tensor.pin_memory),
        *(Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.type, Tensor.type_as),
        *(Tensor.long, Tensor.int, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16),
        *(Tensor.__getitem__, Tensor.index_select, Tensor.masked_select),
        *(Tensor.chunk, Tensor.split, Tensor.unbind),
        *(torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze, torch.permute),
        *(torch.transpose, torch.movedim, torch.narrow, torch.clone, torch.detach),
        *(torch.index_select, torch.masked_select, torch.chunk, torch.split, torch.unbind),
        F.pad,
    }
)

# Operations that write into the labels. A write computed from one label, such as
# ``y[y == 255] = -100``, is wrong for the labels mixed with it: the carrier becomes a plain label,
# and a loss that is given it leaves the mixture unconsumed, which is an error.
_IN_PLACE = dict.fromkeys(
    getattr(Tensor, name)
    for name in dir(Tensor)
    if (name.endswith("_") and not name.startswith("_"))
    or (name.startswith("__i") and hasattr(Tensor, f"__{name[3:]}"))  # __iadd__ beside __add__
    or name == "__setitem__"
    if name not in ("requires_grad_", "share_memory_")
)


class MixedTarget(Tensor):
    """A label that carries a mixture to the loss.

    Metrics, comparisons and arithmetic see the plain label and return plain tensors; views,
    indexing, conversions and moves keep the mixture; the losses of
    :func:`mosaic_core.losses.known_losses` compute it. Pickled, deep-copied or written into, it
    is the plain label.

    Example:
        >>> import torch.nn.functional as F
        >>> mixture = Mixture.of(torch.tensor([0, 1])).smooth(0.1)
        >>> target = MixedTarget.of(mixture)
        >>> bool((target == torch.tensor([0, 1])).all())
        True
        >>> loss = F.cross_entropy(torch.zeros(2, 3), target)
        >>> mixture.receipt.consumed
        True
    """

    mixture: Mixture

    @staticmethod
    def of(mixture: Mixture) -> "MixedTarget":
        """Return the carrier of a mixture; it shares the memory of the plain label."""
        # Not Tensor.as_subclass: a trainer may replace it by one that shares the attributes.
        target = torch._C.TensorBase.as_subclass(mixture.label, MixedTarget)
        target.mixture = mixture
        return target

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Compute losses on the mixture, carry it through views, act on the label otherwise."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if is_known_loss(func):
                options = dict(kwargs)
                target = options.pop("target") if "target" in options else args[1]
                if isinstance(target, MixedTarget):
                    input = options.pop("input") if "input" in options else args[0]
                    return evaluate(target.mixture, func, _plain(input), args[2:], options)
            elif func in _CARRIED and args and isinstance(args[0], MixedTarget):
                rest, options = _plain(args[1:]), _plain(kwargs)
                return _carry(args[0].mixture, lambda label: func(label, *rest, **options))
            elif func in _IN_PLACE and isinstance(args[0], MixedTarget):
                args[0].mixture = Mixture.of(args[0].mixture.label)
            return func(*_plain(args), **_plain(kwargs))


# Tuples of classes, as torch.compile up to torch 2.9 can't trace a union of them.
_SEQUENCES, _MAYBE_MIXED = (tuple, list), (MixedTarget, list)


def _carry(mixture: Mixture, function: Callable[[Tensor], Any]) -> Any:
    result = function(mixture.label)
    if isinstance(result, Tensor):
        return MixedTarget.of(mixture.map(function))
    if isinstance(result, _SEQUENCES):
        parts = (mixture.map(_part(function, i)) for i in range(len(result)))
        return type(result)(map(MixedTarget.of, parts))
    return result  # such as the name that Tensor.type() returns


def _part(function: Callable[[Tensor], Any], i: int) -> Callable[[Tensor], Any]:
    return lambda label: function(label)[i]


def _plain(value: Any) -> Any:
    if isinstance(value, MixedTarget):
        return value.mixture.label
    if isinstance(value, _SEQUENCES) and any(isinstance(v, _MAYBE_MIXED) for v in value):
        return type(value)(_plain(v) for v in value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def unconsumed(mixture: Mixture) -> LossError:
    """Return the error for a step whose loss did not compute the mixture."""
    smoothed = " (but label smoothing needs a cross entropy)" if mixture.smoothing else ""
    names = ", ".join(sorted(set(known_losses().values())))
    return LossError(
        "mosaic: the loss of this step ignored the mixed labels of the batch, so training would be"
        " silently wrong. Labels changed after the batch was mixed, other than by indexing,"
        f" reshaping and moving, are plain. Losses that compute a mixture: {names}, and the"
        " torch.nn modules made of them. For another loss(input, target): decorate it with"
        f" @mosaic_core.register_loss{smoothed}, or take the algorithms that need the loss out of"
        " the recipe"
    )


def register_loss(function: _Function) -> _Function:
    """Make a loss ``function(input, target, ...)`` compute mixtures, once per component.

    For torch's own functions the call is enough; any other function or module must be used
    through the returned callable, so it serves as a decorator.

    Example:
        >>> @register_loss
        ... def hinge(input, target):
        ...     return F.multi_margin_loss(input, target)
    """
    register_loss_function(function)

    @functools.wraps(function)
    def loss(input: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(target, MixedTarget):
            return evaluate(target.mixture, function, input, args, kwargs)
        return function(input, target, *args, **kwargs)

    return loss  # type: ignore[return-value]  # same signature, by construction


class LossProxy:
    """Stands in for a trainer's loss function and computes the mixture with it.

    A loss that returns what a known loss such as ``F.cross_entropy`` returns is called once, with
    a :class:`MixedTarget`, and gives what it gives in a plain loop. Any other loss is called once
    per component and interpolated; smoothing sets ``label_smoothing`` of a cross entropy for the
    call, also of one that the loss calls inside. Attributes are those of the loss.

    Args:
        loss: The user's loss, ``loss(prediction, target, ...)``.
        mixture: Returns the mixture of the current batch, or None for a plain one.
    """

    def __init__(self, loss: Callable[..., Tensor], mixture: Callable[[], Mixture | None]) -> None:
        # A wrapper that keeps the module it calls in `func` may strip the target's class.
        direct = False if hasattr(loss, "func") else None  # None until it is known
        vars(self).update(_loss=loss, _mixture=mixture, _direct=direct)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_loss", "_mixture"):  # while it is being copied
            raise AttributeError(name)
        return getattr(self._loss, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._loss, name, value)

    def __call__(self, prediction: Any, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of the current mixture."""
        mixture = self._mixture()
        if mixture is None or mixture.trivial:
            return self._evaluate(0.0, prediction, target, *args, **kwargs)
        mixture.receipt.consumed = True
        if self._direct is not False:
            receipt = Receipt(values=[])
            carrier = MixedTarget.of(replace(mixture, receipt=receipt))
            value: Tensor = self._loss(prediction, carrier, *args, **kwargs)
            if any(value is known for known in receipt.values or ()):
                vars(self)["_direct"] = True
                return value
            # It computes something more, perhaps on plain labels; perhaps this once.
            vars(self)["_direct"] = self._direct or False
        total: Tensor | None = None
        for label, weight in mixture.components:
            typed = label.as_subclass(type(target))  # a trainer's own tensor type, if it has one
            loss = self._evaluate(mixture.smoothing, prediction, typed, *args, **kwargs)
            if weight is not None:
                if weight.dim() and loss.shape[:1] != weight.shape:
                    raise UnsupportedError(
                        "mosaic: labels mixed with a weight per example need a loss of shape"
                        f' (N, ...), as with reduction="none", got {tuple(loss.shape)}'
                    )
                loss = loss * weight.reshape(weight.shape + (1,) * (loss.dim() - weight.dim()))
            total = loss if total is None else total + loss
        return total  # type: ignore[return-value]  # a mixture has at least one component

    def _evaluate(self, smoothing: float, *args: Any, **kwargs: Any) -> Tensor:
        loss: Callable[..., Tensor] = self._loss
        if not smoothing:
            return loss(*args, **kwargs)
        module = getattr(loss, "func", loss)
        if not isinstance(module, nn.CrossEntropyLoss):
            return self._carry(smoothing, *args, **kwargs)
        own = module.label_smoothing
        module.label_smoothing = compose(own, smoothing)
        try:
            return loss(*args, **kwargs)
        finally:
            module.label_smoothing = own

    def _carry(
        self, smoothing: float, prediction: Any, target: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Let the label carry the smoothing to the cross entropy that a loss calls inside."""
        mixture = Mixture.of(target).smooth(smoothing)
        value: Tensor = self._loss(prediction, MixedTarget.of(mixture), *args, **kwargs)
        if not mixture.receipt.consumed:
            raise UnsupportedError(
                "mosaic: label smoothing is defined for a cross entropy, and the loss is"
                f" {self._loss!r}; take LabelSmoothing out of the recipe"
            )
        return value
