"""Changing a model's modules without losing its parameters, names or optimizer groups.

Surgery swaps the class of a module, or hangs a hook on it. It never wraps: every Parameter object
and every ``state_dict`` key stays, so optimizers, checkpoints, DDP and the user's own references
keep working. Because the names stay, a checkpoint of a changed model would load into the original
without a complaint and compute something else; :func:`sentinel` prevents that.
"""

import fnmatch
import functools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mosaic_core.errors import NoEffectWarning

__all__ = [
    "Mixin",
    "Report",
    "accept_sentinel",
    "is_sentinel",
    "matching",
    "original_class",
    "sentinel",
    "swap_class",
    "warn_no_effect",
]

_SENTINEL = "mosaic: "
_ORIGINAL = "mosaic_original_class"  # attribute of a module whose class was swapped
_STACK = "mosaic_stack"  # attribute of a class made of others


@dataclass
class Report:
    """What a recipe did to a run, for people.

    Attributes:
        changes: Names of the modules that each algorithm changed.
        notes: Other things worth knowing, such as where input and target were found.
    """

    changes: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def changed(self, algorithm: str, modules: Iterable[str]) -> None:
        """List modules that an algorithm changed."""
        new = self.changes.setdefault(algorithm, [])
        new.extend(name for name in modules if name not in new)

    def __str__(self) -> str:
        lines = [
            f"{name} changed {', '.join(module or 'the model itself' for module in modules)}"
            for name, modules in self.changes.items()
            if modules
        ]
        return "\n".join(lines + self.notes)


def matching(model: nn.Module, patterns: str | Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules whose name matches a shell-style pattern, such as ``"layer4.*"``."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for name, module in model.named_modules():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            yield name, module


class Mixin(nn.Module):
    """Behaviour that :func:`swap_class` adds to modules of any class.

    Example:
        >>> class Loud(Mixin):
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> layer = nn.Identity()
        >>> swap_class(layer, Loud)
        >>> layer(3), type(layer).__name__
        (6, 'Identity')
    """


def swap_class(module: nn.Module, new: type[nn.Module], **attributes: Any) -> None:
    """Turn a module into one of a class that behaves otherwise, in place.

    Swaps stack: on a subclass of ``new``'s base, also on one that another swap put there, a class
    is made that derives from both, ``new`` first. It copies and pickles, and is named like the
    class at its bottom, as trainers choose layers by name; printed, it shows all of its classes. A
    mixin that is there already stays.

    Args:
        module: The module; its parameters, buffers, hooks and name stay.
        new: A class that adds behaviour and no parameters, and calls ``super()``. It extends the
            module's class, a base of it other than ``nn.Module``, or :class:`Mixin`.
        attributes: Attributes the subclass reads; tensors become buffers outside the state dict.

    Raises:
        TypeError: If ``new`` extends nothing that the module is.
    """
    old, swapped = type(module), new
    if issubclass(new, Mixin) and issubclass(old, new):
        swapped = old
    elif issubclass(new, old):
        pass
    elif any(
        base is Mixin or issubclass(old, base) for base in set(new.__bases__) - {nn.Module, object}
    ):
        swapped = _stacked((new, *vars(old).get(_STACK, (old,))))
    else:
        raise TypeError(f"swap_class: {new.__name__} is no subclass of {old.__name__}")
    module.__dict__.setdefault(_ORIGINAL, old)
    module.__class__ = swapped
    for name, value in attributes.items():
        if isinstance(value, torch.Tensor):
            module.register_buffer(name, value, persistent=False)
        else:
            setattr(module, name, value)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before its first swap."""
    original: type[nn.Module] = module.__dict__.get(_ORIGINAL, type(module))
    return original


@functools.cache
def _stacked(stack: tuple[type[nn.Module], ...]) -> type[nn.Module]:
    """Return the class that derives from some others, the first of which acts first."""
    names = {n: getattr(stack[-1], n) for n in ("__module__", "__qualname__")}
    shown = "".join(cls.__name__.lstrip("_") for cls in stack)  # when a model is printed
    own = {_STACK: stack, "__reduce_ex__": _reduce, "_get_name": lambda module: shown}
    return type(stack[-1].__name__, stack, {**names, **own})


def _reduce(module: Any, protocol: Any) -> tuple[Any, ...]:
    """Pickle a module whose class cannot be found by its name."""
    return _empty, getattr(type(module), _STACK), module.__getstate__()


def _empty(*stack: type[nn.Module]) -> nn.Module:
    cls = _stacked(stack)
    return cls.__new__(cls)


def warn_no_effect(algorithm: str, looked_for: str, stacklevel: int = 3) -> None:
    """Warn that an algorithm found nothing to change."""
    message = f"{algorithm}: the model has no {looked_for}; nothing was changed"
    warnings.warn(message, NoEffectWarning, stacklevel=stacklevel)


def sentinel(report: Report, load_with: str) -> dict[str, torch.Tensor]:
    """Return the entry to add to a saved state dict, empty where no module was changed.

    Its name is a message: loading it strictly into a model without the recipe prints it.

    Args:
        report: What was changed.
        load_with: What a person has to do to load the checkpoint.
    """
    names = [name for name, modules in report.changes.items() if modules]
    if not names:
        return {}
    message = f"{_SENTINEL}these weights belong to a model changed by {', '.join(names)}, and would"
    return {f"{message} silently compute something else in this one; {load_with}": torch.zeros(())}


def is_sentinel(key: str) -> bool:
    """Tell whether a state dict key is the message of :func:`sentinel`."""
    return key.startswith(_SENTINEL)


def accept_sentinel(model: nn.Module) -> None:
    """Let a changed model load state dicts that carry the sentinel."""
    model.register_load_state_dict_pre_hook(_drop_sentinel)


def _drop_sentinel(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    for key in [key for key in state_dict if is_sentinel(key.removeprefix(prefix))]:
        del state_dict[key]
