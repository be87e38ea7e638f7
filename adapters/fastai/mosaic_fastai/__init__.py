"""mosaic for fastai: ``Learner(dls, model, cbs=MosaicCallback(recipe))``."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mosaic_fastai._callback import MosaicCallback

__all__ = ["MosaicCallback"]

_HOMES = {"MosaicCallback": "_callback"}


def __getattr__(name: str) -> Any:
    """Import fastai only when something of it is used, so that listing plugins stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
