"""mosaic for DeepSpeed: ``engine, ... = mosaic_deepspeed.initialize(recipe, model=model, ...)``."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mosaic_deepspeed._handle import Handle
    from mosaic_deepspeed._initialize import attach, initialize
    from mosaic_deepspeed._layout import plain_layout
    from mosaic_deepspeed._refusals import refuse_config

__all__ = ["Handle", "attach", "initialize", "plain_layout", "refuse_config"]

_HOMES = {
    "Handle": "_handle",
    "attach": "_initialize",
    "initialize": "_initialize",
    "plain_layout": "_layout",
    "refuse_config": "_refusals",
}


def __getattr__(name: str) -> Any:
    """Import DeepSpeed only when something of it is used, so that listing plugins stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
