"""Knowing whether an optimizer has really stepped, which a gradient scaler may prevent."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

__all__ = ["Stepped"]


class Stepped:
    """Whether a watched optimizer has changed the weights since this was last asked.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer, stepped = torch.optim.SGD([weight], lr=0.1), Stepped()
        >>> stop = stepped.watch(optimizer)
        >>> optimizer.step()
        >>> stepped.take(), stepped.take()
        (True, False)
    """

    def __init__(self) -> None:
        self._applied = False

    def watch(self, optimizer: Optimizer) -> Callable[[], None]:
        """Watch an optimizer; returns the function that ends it."""
        return optimizer.register_step_post_hook(self._note).remove

    def _note(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # A gradient scaler calls optimizer.step only for finite gradients, except for fused
        # optimizers, which it tells on the device.
        found_inf = getattr(optimizer, "found_inf", None)
        self._applied = found_inf is None or not found_inf.item()

    def take(self) -> bool:
        """Tell, and forget."""
        applied, self._applied = self._applied, False
        return applied
