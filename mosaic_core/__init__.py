"""Training algorithms that plug into the trainer you already use.

The recipe and its algorithms live here; ``mosaic_lightning`` and its siblings bring them to a
trainer. For a plain PyTorch loop, see :class:`Run`.
"""

from mosaic_core.algorithm import Algorithm, Card, Need, Place
from mosaic_core.errors import (
    BatchError,
    ConflictError,
    LossError,
    NoEffectWarning,
    UnsupportedError,
)
from mosaic_core.recipe import Recipe
from mosaic_core.run import Run
from mosaic_core.target import register_loss

__all__ = [
    "Algorithm",
    "BatchError",
    "Card",
    "ConflictError",
    "LossError",
    "Need",
    "NoEffectWarning",
    "Place",
    "Recipe",
    "Run",
    "UnsupportedError",
    "register_loss",
]

__version__ = "0.1.0"
