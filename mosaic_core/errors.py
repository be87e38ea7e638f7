"""The errors and warnings that are mosaic's own.

Bad arguments raise ValueError, TypeError or LookupError.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "BatchError",
    "ConflictError",
    "LossError",
    "NoEffectWarning",
    "UnsupportedError",
    "nearest",
]


class UnsupportedError(RuntimeError):
    """A combination that would not be exact; the message names the reason and the alternative."""


class ConflictError(ValueError):
    """Two members of a recipe, or a recipe and a trainer's own feature, contradict each other."""


class BatchError(LookupError):
    """The input or the target was not found in a batch."""


class LossError(RuntimeError):
    """A loss did not compute the mixture of labels that the batch was trained on."""


class NoEffectWarning(UserWarning):
    """An algorithm found nothing to change."""


def nearest(name: object, known: Iterable[str]) -> str:
    """Return the end of an "unknown name" message: the nearest known name, then all of them."""
    known = sorted(known)
    lowered = {k.lower(): k for k in known}
    close = difflib.get_close_matches(str(name).lower(), lowered, n=1, cutoff=0.5)
    hint = f"; did you mean {lowered[close[0]]!r}?" if close else "."
    return f"{hint} Known: {', '.join(known) or 'none'}"
