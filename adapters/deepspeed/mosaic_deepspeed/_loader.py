"""A training loader that gives each batch to the recipe just before the user gets it."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mosaic_deepspeed._handle import Handle

__all__ = ["Loader", "to_device"]


class Loader:
    """Yields the batches of a loader, on the engine's device and transformed by the recipe.

    The micro-batches of a window that is run twice come twice: the first pass ends with an
    ``engine.step()`` that moves the weights, the second with the one that counts. ``len`` is that
    of the loader and does not count them; all other attributes are those of the loader.

    Args:
        handle: Where they are transformed.
        loader: The loader.
    """

    def __init__(self, handle: "Handle", loader: Iterable[Any]) -> None:
        self._handle, self._loader = handle, loader

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_handle", "_loader"):  # while it is being copied
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]  # its own error where it has none

    def __iter__(self) -> Iterator[Any]:
        """Go through the loader once, which is an epoch."""
        for batch in self._loader:  # one iter(): DeepSpeed's loader starts anew at every iter()
            yield self._handle._next(batch)
            yield from self._handle._again()
        self._handle.end_epoch()


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch of any structure with its tensors on a device."""
    if hasattr(batch, "to"):  # a tensor, or a batch that moves itself
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
