"""mosaic for PyTorch Lightning: ``Trainer(callbacks=[MosaicCallback(recipe)])``."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mosaic_lightning._callback import MosaicCallback
    from mosaic_lightning._checkpoint import load_from_checkpoint

__all__ = ["MosaicCallback", "load_from_checkpoint"]

_HOMES = {"MosaicCallback": "_callback", "load_from_checkpoint": "_checkpoint"}


def __getattr__(name: str) -> Any:
    """Import Lightning only when something of it is used, so that listing plugins stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
