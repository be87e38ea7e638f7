"""The Callback class for both import roots of Lightning, which hold the same code twice."""

import importlib
from importlib import metadata
from typing import TYPE_CHECKING

__all__ = ["Callback"]

_ROOTS = {"pytorch-lightning": "pytorch_lightning", "lightning": "lightning.pytorch"}

if TYPE_CHECKING:
    from pytorch_lightning import Callback
else:

    def _installed(distribution: str) -> bool:
        # By metadata: find_spec would also find a folder of that name.
        try:
            metadata.distribution(distribution)
        except metadata.PackageNotFoundError:
            return False
        return True

    _bases = [
        importlib.import_module(root).Callback for name, root in _ROOTS.items() if _installed(name)
    ]
    if not _bases:
        raise ImportError(
            "mosaic_lightning needs Lightning: pip install pytorch-lightning, or lightning"
        )

    class Callback(*_bases):
        """A callback of every installed root, as each Trainer asks for its own."""
