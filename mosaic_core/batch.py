"""Finding and replacing the input and the target in whatever structure a loader yields."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from mosaic_core.errors import BatchError
from mosaic_core.mixture import Mixture

__all__ = ["Batch", "Key", "Locator", "describe", "select_examples"]

Key = int | str | tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]
"""Where a value lies: an index, a name, or a pair ``(get(batch), set(batch, value) -> batch)``."""

_INPUT_NAMES = (
    *("input", "inputs", "image", "images", "img", "pixel_values", "input_values"),
    *("input_features", "input_ids", "inputs_embeds", "x", "data", "features"),
)
_TARGET_NAMES = ("label", "labels", "target", "targets", "y")
_SHOWN = 4  # items of a list that an error message shows


class Batch:
    """What an algorithm sees of a micro-batch; :meth:`replace` makes the next one.

    Args:
        input: The input, shape ``(N, ...)``, on the device of training.
        labels: The mixture of labels so far; None in a recipe that never touches labels.
        kept: Which examples of the trainer's batch are left, int64; None for all.
    """

    __slots__ = ("_labels", "input", "kept")

    def __init__(
        self,
        input: torch.Tensor,
        labels: Mixture | None = None,
        kept: torch.Tensor | None = None,
    ) -> None:
        self.input, self._labels, self.kept = input, labels, kept

    @property
    def labels(self) -> Mixture:
        """The mixture of labels so far.

        Raises:
            TypeError: If the algorithm that asks declares neither ``changes_labels`` nor
                ``reads_labels``.
        """
        if self._labels is None:
            raise TypeError(
                "Batch: an algorithm that touches labels must set changes_labels = True where it"
                " mixes them, or return True from reads_labels"
            )
        return self._labels

    def replace(self, input: torch.Tensor | None = None, labels: Mixture | None = None) -> "Batch":
        """Return a batch with another input, other labels, or both."""
        return Batch(
            self.input if input is None else input,
            self._labels if labels is None else labels,
            self.kept,
        )

    def select(self, indices: torch.Tensor) -> "Batch":
        """Return a batch of some of the examples, int64 indices of shape ``(n,)``.

        Whatever else the trainer's batch holds for each example is selected alike.
        """
        labels = None if self._labels is None else self._labels.select(indices)
        kept = indices if self.kept is None else self.kept[indices]
        return Batch(self.input[indices], labels, kept)


class Locator:
    """Reads the input and the target of a batch and writes them into a copy of it.

    Without keys it goes by convention: positions 0 and 1 of a tuple or list; in a mapping, a
    dataclass or a named tuple, the first usual name (``pixel_values``, ``input_ids``, ``x``, ...;
    ``labels``, ``target``, ``y``, ...). What it settled on is in ``found``.

    Args:
        input_key: Index, name, or ``(getter, setter)`` pair of the input; None for convention.
        target_key: The same of the target.
    """

    def __init__(self, input_key: Key | None = None, target_key: Key | None = None) -> None:
        for name, key in (("input_key", input_key), ("target_key", target_key)):
            pair = isinstance(key, tuple) and len(key) == 2 and all(map(callable, key))
            plain = isinstance(key, int | str) and not isinstance(key, bool)
            if not (key is None or pair or plain):
                raise TypeError(
                    f"Locator: {name} must be an index, a name or a (getter, setter) pair,"
                    f" got {key!r}"
                )
        self.found: dict[str, Key] = {}
        self._keys = {"input": input_key, "target": target_key}

    def read(self, batch: Any, role: str) -> torch.Tensor:
        """Return the ``"input"`` or the ``"target"`` of a batch.

        Raises:
            BatchError: If it is not there, or is not a tensor; the message shows the batch and
                names the argument to set.
        """
        key = self._keys[role]
        if key is None:
            key = self.found.get(role)
        if key is None:
            key = _by_convention(batch, role)
        pair = isinstance(key, tuple)
        try:
            value = _get(batch, key)
        except (LookupError, AttributeError, TypeError) as error:
            reason = f"its getter raised {error!r}" if pair else f"{key!r} is not in it"
            raise _not_found(batch, role, reason) from error
        if not isinstance(value, torch.Tensor):
            holds = "its getter returned" if pair else f"{key!r} holds"
            raise _not_found(batch, role, f"{holds} {describe(value)}, not a tensor")
        self.found[role] = key
        return value

    def write(self, batch: Any, values: Mapping[str, Any]) -> Any:
        """Return a copy of a batch with another input or target; the batch itself is untouched.

        Args:
            batch: The batch that was read.
            values: New values under ``"input"`` and ``"target"``.

        Raises:
            BatchError: If a batch of this type can't be copied with another value.
        """
        new = batch
        for role, value in values.items():
            try:
                new = _set(new, self.found[role], value)
            except (TypeError, AttributeError) as error:
                raise BatchError(
                    f"mosaic: the {role} of a copy of the batch could not be replaced: {error}. The"
                    f" batch is {describe(batch)}. Set {role}_key to a pair (get(batch),"
                    " set(batch, value) -> batch)."
                ) from error
            if new is None:
                raise TypeError(
                    f"Locator: the setter of {role}_key must return the new batch, got None"
                )
        return new


def select_examples(value: Any, indices: torch.Tensor, count: int) -> Any:
    """Return a copy of a batch with some of its examples.

    Args:
        value: A batch of tensors in mappings, sequences and dataclasses; what is no tensor of
            ``count`` rows stays.
        indices: The examples to keep, int64, shape ``(n,)``.
        count: Number of examples in it.
    """
    if isinstance(value, torch.Tensor):
        examples = value.dim() and len(value) == count
        return value[indices.to(value.device)] if examples else value
    keys: Any = _fields(value)
    if keys is None and isinstance(value, list | tuple):
        keys = range(len(value))
    new = value
    for key in () if keys is None else keys:
        item = _get(value, key)
        selected = select_examples(item, indices, count)
        if selected is not item:
            new = _set(new, key, selected)
    return new


def describe(value: Any) -> str:
    """Say in a few words what a batch looks like: types, keys, dtypes and shapes."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
    fields = _fields(value)
    if fields is not None:
        inside = ", ".join(f"{name}: {describe(item)}" for name, item in fields.items())
        return f"{type(value).__name__}({inside})"
    if isinstance(value, list | tuple):
        shown = [*map(describe, value[:_SHOWN]), *(["..."] if len(value) > _SHOWN else [])]
        return f"{type(value).__name__} of {len(value)} [{', '.join(shown)}]"
    return type(value).__name__


def _fields(batch: Any) -> dict[Any, Any] | None:
    """The named values of a mapping, a dataclass or a named tuple; None for anything else."""
    if isinstance(batch, Mapping):
        return dict(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return dict(zip(batch._fields, batch, strict=True))
    return None


def _by_convention(batch: Any, role: str) -> Key:
    fields = _fields(batch)
    if fields is not None:
        names = _INPUT_NAMES if role == "input" else _TARGET_NAMES
        for name in names:
            if isinstance(fields.get(name), torch.Tensor):
                return name
        if not isinstance(batch, tuple):
            raise _not_found(batch, role, f"none of the usual names {', '.join(names)} is in it")
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return 0 if role == "input" else 1
    if role == "input" and isinstance(batch, torch.Tensor):
        return (lambda b: b), (lambda b, value: value)
    raise _not_found(batch, role, "it is no tuple, list, mapping, named tuple or dataclass")


def _get(batch: Any, key: Key) -> Any:
    if isinstance(key, tuple):
        return key[0](batch)
    if isinstance(batch, Mapping):
        if key not in batch:  # some mappings also take positions, which can't be written
            raise KeyError(key)
        return batch[key]
    return getattr(batch, key) if isinstance(key, str) else batch[key]


def _set(batch: Any, key: Key, value: Any) -> Any:
    if isinstance(key, tuple):
        return key[1](batch, value)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        named: Any = batch
        name = key if isinstance(key, str) else named._fields[key]
        return named._replace(**{name: value})
    if isinstance(batch, tuple) and isinstance(key, int):
        items = list(batch)
        items[key] = value
        return type(batch)(items)
    if isinstance(batch, Mapping) and not _copies_entries(batch):
        return type(batch)({**batch, key: value})  # type: ignore[call-arg]  # Mapping has no __init__
    new = copy.copy(batch)
    if isinstance(batch, Mapping) or isinstance(key, int):
        new[key] = value
        return new
    try:
        setattr(new, key, value)
    except AttributeError:  # a frozen dataclass
        object.__setattr__(new, key, value)
    if getattr(batch, key) is value:
        raise TypeError("its shallow copy shares its values, so both were changed")
    return new


def _copies_entries(batch: Mapping[Any, Any]) -> bool:
    """Tell whether ``copy.copy`` gives a mapping entries of its own that can be set."""
    copies = isinstance(batch, MutableMapping) and hasattr(batch, "__copy__")
    return copies or isinstance(batch, dict)


def _not_found(batch: Any, role: str, reason: str) -> BatchError:
    return BatchError(
        f"mosaic: the {role} of the batch was not found: {reason}. The batch is {describe(batch)}."
        f" Set {role}_key to an index, a name, or a pair (get(batch), set(batch, value) -> batch)."
    )
