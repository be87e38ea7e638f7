"""Replacing attributes of a trainer's objects for the time of a run, and putting them back.

An adapter never patches a class: it hangs its own function on one instance, where it shadows the
method of the class, and takes it away again.
"""

from collections.abc import Callable
from typing import Any

__all__ = ["Shadows"]


class Shadows:
    """What was put in the place of something else, and how to undo it.

    Example:
        >>> class Trainer:
        ...     def step(self):
        ...         return "step"
        >>> trainer, shadows = Trainer(), Shadows()
        >>> shadows.put(trainer, "step", lambda: "ours")
        >>> trainer.step()
        'ours'
        >>> shadows.undo()
        >>> trainer.step()
        'step'
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of an instance, or an entry of its dictionary that a method fills."""
        own = vars(owner)
        if name in own:
            before = own[name]
            self._undo.append(lambda: own.__setitem__(name, before))
        else:
            self._undo.append(lambda: own.pop(name, None))
        own[name] = value

    def on_undo(self, function: Callable[[], Any]) -> None:
        """Call a function when everything is put back, such as the ``remove`` of a hook."""
        self._undo.append(function)

    def undo(self) -> None:
        """Put everything back, the latest first; a second call does nothing."""
        while self._undo:
            self._undo.pop()()
