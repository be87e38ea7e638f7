"""Where the time of a training step goes, in any trainer.

Adapters talk to :class:`mosaic_core.run.Run` alone, so its methods, the model's forward and torch's
optimizer mark the events of a step in every trainer. The time between two events belongs to the
phase that the first of them began:

- ``data``: from the end of a step to the first forward, without what algorithms do there: loading
  and moving the batch, and what the trainer does between steps;
- ``forward``: the model's forward, with what surgery changed in it;
- ``backward``: from there to the gradients: the loss and backward;
- ``algorithm``: all that mosaic does outside of the model, with the second pass where the run
  makes it; a loop that makes it itself shows it as forward and backward;
- ``optimizer``: from the gradients to the end of the optimizer's step.
"""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from mosaic_core.run import Run
from mosaic_core.training import WARM_UP

__all__ = ["PHASES", "measure", "watched"]

PHASES = ("data", "forward", "backward", "algorithm", "optimizer")

# Methods of a run that adapters call in a step, and the phase that begins when each returns; None
# goes on with the one before.
_NEXT = {
    "on_batch": "data",
    "check_loss": None,
    "second_pass": None,
    "on_gradients": "optimizer",
    "end_step": "data",
}


class _Timeline:
    """Books the time between two events to a phase."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._sums = dict.fromkeys(PHASES, 0.0)
        self._phase, self._last = "data", _now()
        self._nested = 0  # calls of the run that have not returned

    def event(self, phase: str) -> None:
        """End the phase that goes on and begin another one; inside of a call nothing does."""
        if self._nested:
            return
        now = _now()
        self._sums[self._phase] += now - self._last
        self._phase, self._last = phase, now

    def end_step(self) -> None:
        """Close the sums of a step."""
        self.steps.append(self._sums)
        self._sums = dict.fromkeys(PHASES, 0.0)

    @contextlib.contextmanager
    def call(self, then: str | None) -> Iterator[None]:
        """Book what happens inside to the algorithms."""
        before = self._phase
        self.event("algorithm")
        self._nested += 1
        try:
            yield
        finally:
            self._nested -= 1
            self.event(before if then is None else then)


@contextlib.contextmanager
def watched() -> Iterator[list[dict[str, float]]]:
    """Watch all runs that train inside; yields a list that gets the seconds of each step's phases.

    It changes ``Run`` for the time being, so nothing else should train in this process.
    """
    timeline = _Timeline()
    with contextlib.ExitStack() as stack:

        def forward(phase: str) -> Callable[..., None]:
            def hook(model: torch.nn.Module, *_: Any) -> None:
                if model.training:  # evaluation is no part of a step
                    timeline.event(phase)

            return hook

        def wrap(name: str, then: str | None) -> Callable[..., Any]:
            method = getattr(Run, name)

            @functools.wraps(method)
            def wrapped(run: Run, *args: Any, **kwargs: Any) -> Any:
                with timeline.call(then):
                    result = method(run, *args, **kwargs)
                if name == "end_step":
                    timeline.end_step()
                return result

            return wrapped

        start = Run.start

        @functools.wraps(start)
        def started(run: Run, *args: Any, **kwargs: Any) -> None:
            start(run, *args, **kwargs)
            for handle in (
                run.model.register_forward_pre_hook(forward("forward")),
                run.model.register_forward_hook(forward("backward")),
            ):
                stack.callback(handle.remove)
            timeline.event("data")

        stack.enter_context(mock.patch.object(Run, "start", started))
        for name, then in _NEXT.items():
            stack.enter_context(mock.patch.object(Run, name, wrap(name, then)))
        before = register_optimizer_step_pre_hook(lambda *_: timeline.event("optimizer"))
        after = register_optimizer_step_post_hook(lambda *_: timeline.event("data"))
        stack.callback(before.remove)
        stack.callback(after.remove)
        yield timeline.steps


def measure(function: Callable[[], object]) -> dict[str, float]:
    """Call a function that trains, and return the median time of each phase of a step.

    Args:
        function: What to run; its first steps warm up and don't count.

    Returns:
        Milliseconds by phase, in the order of ``PHASES``. On a GPU every event waits for the
        device, so their sum is more than a step takes otherwise.
    """
    with watched() as seen:
        function()
    steady = seen[WARM_UP:] or seen
    return {phase: 1e3 * statistics.median(step[phase] for step in steady) for phase in PHASES}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
