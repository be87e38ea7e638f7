"""Running a window of micro-batches twice, for algorithms that take two passes a step.

The user's loop knows the loss, so it is what runs the window again. The first ``engine.step()`` at
the end of a window moves the weights and drops the gradients; the loader then yields the same
micro-batches once more, and the second ``engine.step()`` is the one that DeepSpeed counts. A loop
without the loader hands in a closure instead.
"""

from collections.abc import Callable, Iterator
from typing import Any

from mosaic_core import Need, Run, UnsupportedError

__all__ = ["SecondPass"]


class SecondPass:
    """The window of an engine, and the pass over it that is going on.

    Args:
        engine: The engine.
        run: The run.
    """

    def __init__(self, engine: Any, run: Run) -> None:
        self._engine, self._run = engine, run
        self._names = [a.name for a in run.recipe if Need.SECOND_PASS in a.needs()]
        self._window: list[Any] = []  # as the loader yielded them
        self._latest: list[Any] = []  # the same, before its backward
        self._start: int | None = None  # micro-steps before the window
        self.running = False  # then the weights are moved
        self.in_closure = False

    def yielded(self, batch: Any) -> None:
        """Note what the loader yields."""
        if self._names:
            self._latest = [batch]

    def backward(self) -> None:
        """Note that a micro-batch goes backward; one that does not was skipped."""
        if self._start is None:
            self._start = self._engine.micro_steps
        if not self.running:
            self._window += self._latest
        self._latest = []

    def again(self) -> Iterator[Any]:
        """Yield the micro-batches of the window once more, if the first pass has just ended."""
        if self.running:
            yield from list(self._window)

    def begin(self) -> None:
        """End the first pass, whose gradients are complete, where the loader replays it.

        Raises:
            UnsupportedError: If the window did not come from the loader.
        """
        if not self._window:
            raise UnsupportedError(
                f"engine.step: {self._names[0]} runs each window of micro-batches twice; iterate"
                " over the loader of mosaic_deepspeed.initialize or engine.mosaic.loader(batches),"
                " which yields them again, or call engine.mosaic.step(closure)"
            )
        self._begin()

    def _begin(self) -> None:
        self._run.two_passes.begin()
        self.running = True
        # As if the window had not been: the engine counts micro-steps and tells by them where a
        # window ends, and a step that only moved the weights was not applied.
        self._engine.micro_steps = self._start
        self._engine._step_applied = False

    def end(self) -> None:
        """End the second pass, whose gradients are complete."""
        self.running = False
        self._run.two_passes.end()

    def abandon(self) -> None:
        """Go back to the weights from which the step began, if the second pass is going on."""
        if self.running:
            self.end()
            self._run.parameters.publish()
        self.clear()

    def run(self, closure: Callable[[], Any]) -> None:
        """Let a closure run the window again.

        Raises:
            RuntimeError: If it ran another number of micro-batches.
        """
        engine, end = self._engine, self._engine.micro_steps
        self._begin()
        self.in_closure = True
        try:
            closure()
        except BaseException:
            self.abandon()
            raise
        finally:
            self.in_closure = False
        self.end()
        if engine.micro_steps != end:
            raise RuntimeError(
                "engine.mosaic.step: closure must run every micro-batch of the window, each with"
                f" engine.backward and engine.step, got {engine.micro_steps - (self._start or 0)}"
                f" before the last of {end - (self._start or 0) + 1}"
            )

    def clear(self) -> None:
        """Forget the window: its step was taken."""
        self._window, self._latest, self._start = [], [], None
