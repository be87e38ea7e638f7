"""Learning rates for one optimizer step, of which schedulers see nothing."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["StepRates"]


class StepRates:
    """Sets learning rates inside ``optimizer.step`` itself, and puts back what was there.

    Schedulers may compute the next learning rate from the last, and some trainers call them before
    ``on_step_end``, so there is no other time at which they do not look.
    """

    def __init__(self) -> None:
        self._wanted: tuple[Run, int, list[dict[str, Any]], Sequence[float]] | None = None
        self._own: list[tuple[dict[str, Any], Any]] = []  # groups with what was in them
        self._depth = 0

    def watch(self, optimizer: Optimizer) -> None:
        """Look at the steps of an optimizer, for good; nothing happens but after :meth:`set`."""
        optimizer.register_step_pre_hook(self._enter)
        optimizer.register_step_post_hook(self._leave)

    def set(self, run: "Run", rates: Sequence[float]) -> None:
        """Set the rates of all groups of all optimizers, for the step in which the run is now."""
        groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
        self._wanted = run, run.progress.step, groups, rates
        if self._depth:  # gradients were computed in a closure inside the step
            self._apply()

    def clear(self) -> None:
        """End the step, also if it raised."""
        self._wanted, self._depth = None, 0
        self._put_back()

    def _enter(self, *_: Any) -> None:
        self._depth += 1  # a class whose step calls that of its base has hooks on both
        self._apply()

    def _leave(self, *_: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if not self._depth:  # some step several times, for parts of the weights
            self._put_back()

    def _apply(self) -> None:
        if self._own or self._wanted is None:
            return
        run, step, groups, rates = self._wanted
        if run.progress.step != step:  # that step was skipped, and this is left over
            return
        self._own = [(group, group["lr"]) for group in groups]
        for (group, own), rate in zip(self._own, rates, strict=True):
            # In a tensor where it was in one, as for compiled steps.
            group["lr"] = torch.full_like(own, rate) if isinstance(own, Tensor) else rate

    def _put_back(self) -> None:
        while self._own:
            group, own = self._own.pop()
            group["lr"] = own
