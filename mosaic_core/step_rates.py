"""Learning rates for one optimizer step, of which schedulers see nothing."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["StepRates"]


class StepRates:
    """Sets learning rates inside ``optimizer.step`` itself, and puts back what was there.

    Schedulers may compute the next learning rate from the last, and some trainers call them before
    ``on_step_end``, so there is no other time at which they do not look.
    """

    def __init__(self) -> None:
        self._hooks: list[Any] = []
        self._own: list[tuple[dict[str, Any], Any]] = []  # groups with what was in them
        self._depth = 0

    def set(self, run: "Run", rates: Sequence[float]) -> None:
        """Set the rates of all groups of all optimizers, for the step in which the run is now."""
        self.clear()
        groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
        step = run.progress.step

        def enter(*_: Any) -> None:
            if run.progress.step != step:  # that step was skipped, and this is left over
                return
            self._depth += 1
            if self._depth > 1:  # a class whose step calls that of its base has hooks on both
                return
            self._own = [(group, group["lr"]) for group in groups]
            for (group, own), rate in zip(self._own, rates, strict=True):
                # In a tensor where it was in one, as for compiled steps.
                group["lr"] = torch.full_like(own, rate) if isinstance(own, Tensor) else rate

        def leave(*_: Any) -> None:
            self._depth = max(0, self._depth - 1)
            if not self._depth:
                self._put_back()

        for optimizer in run.optimizers:  # some call step several times, for parts of the weights
            self._hooks.append(optimizer.register_step_pre_hook(enter))
            self._hooks.append(optimizer.register_step_post_hook(leave))

    def clear(self) -> None:
        """Leave the optimizers as they were, also if a step raised."""
        while self._hooks:
            self._hooks.pop().remove()
        self._depth = 0
        self._put_back()

    def _put_back(self) -> None:
        while self._own:
            group, own = self._own.pop()
            group["lr"] = own
