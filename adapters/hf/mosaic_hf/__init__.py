"""mosaic for the Hugging Face Trainer: ``Trainer(callbacks=[MosaicCallback(recipe)])``."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mosaic_hf._callback import MosaicCallback
    from mosaic_hf._checkpoint import load_pretrained

__all__ = ["MosaicCallback", "load_pretrained"]

_HOMES = {"MosaicCallback": "_callback", "load_pretrained": "_checkpoint"}


def __getattr__(name: str) -> Any:
    """Import transformers only when something is used, so that listing plugins stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
