"""Every pure function under one name, for use in a loop of your own."""

import types as _types

from mosaic_core import algorithms as _algorithms
from mosaic_core.algorithms import *

__all__ = sorted(
    name for name, value in vars(_algorithms).items() if isinstance(value, _types.FunctionType)
)
