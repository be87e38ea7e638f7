"""Running a window of micro-batches again, for algorithms that take two passes a step.

Each micro-batch is run as :meth:`fastai.learner.Learner._do_one_batch` does, with the events from
forward to backward, in which callbacks change prediction and loss: accumulation and the gradient
scaler divide and multiply there, regularisers add. Recorder and metrics count in
``after_batch``, which comes once.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from fastai.callback.core import CancelBackwardException
from fastai.callback.fp16 import MixedPrecision

from mosaic_core import Run
from mosaic_core.shadow import Shadows

__all__ = ["Window", "precision"]

_OF_A_BATCH = ("xb", "yb", "pred", "loss", "loss_grad")


@contextlib.contextmanager
def precision(learn: Any) -> Iterator[None]:
    """Compute in the precision of the Learner's MixedPrecision, while it fits."""
    with contextlib.ExitStack() as stack:
        for callback in learn._grab_cbs(MixedPrecision):
            autocast = vars(callback).get("autocast")  # elsewhere, attributes are the model's
            if autocast is not None:
                stack.enter_context(autocast)
        yield


class Window:
    """The micro-batches whose gradients the next step applies.

    With a gradient scaler the second pass comes in front of ``scaler.step``, which unscales, so
    that the scaler sees the gradients of the second pass and skips a step that overflows in it.

    Args:
        run: The run, which has started.
        learn: The Learner, which fits.
    """

    def __init__(self, run: Run, learn: Any) -> None:
        self._run, self._learn = run, learn
        self._noted: list[tuple[Any, Any, Any]] = []
        self._shadows = Shadows()
        self._running = False
        scaler = vars(learn).get("scaler") if learn._grab_cbs(MixedPrecision) else None
        self._unscales = scaler is not None and scaler.is_enabled()
        if scaler is not None and self._unscales:
            step = scaler.step

            def second_pass_and_step(*args: Any, **kwargs: Any) -> Any:
                run.second_pass(self._run_again, scaler.get_scale())
                return step(*args, **kwargs)

            self._shadows.put(scaler, "step", second_pass_and_step)

    def note(self) -> None:
        """Keep the Learner's micro-batch, which has been run forward for the first time."""
        if not self._running:
            self._noted.append((self._learn.xb, self._learn.yb, self._run.mixture))

    def forget(self) -> None:
        """Drop the latest micro-batch, if it is the Learner's."""
        if not self._running and self._noted and self._noted[-1][0] is self._learn.xb:
            self._noted.pop()

    def clear(self) -> None:
        """Begin a new window."""
        self._noted.clear()

    def close(self) -> None:
        """Put back what was shadowed."""
        self._shadows.undo()

    def second_pass(self) -> None:
        """Take the second pass, unless it was taken before the gradients were unscaled."""
        if not self._unscales:
            self._run.second_pass(self._run_again)

    def _run_again(self) -> None:
        learn, run = self._learn, self._run
        kept = {name: vars(learn).get(name) for name in _OF_A_BATCH}
        mixture = run.mixture
        self._running = True
        try:
            for learn.xb, learn.yb, run.mixture in self._noted:
                self._forward()
                learn._with_events(learn._backward, "backward", CancelBackwardException)
        finally:
            self._running, run.mixture = False, mixture
            vars(learn).update(kept)

    def _forward(self) -> None:
        learn = self._learn
        mixed = learn._grab_cbs(MixedPrecision)
        for callback in mixed:
            callback("before_batch")  # enters autocast, which its after_loss leaves
        try:
            learn.pred = learn.model(*learn.xb)
            learn("after_pred")
            learn.loss_grad = learn.loss_func(learn.pred, *learn.yb)
            learn.loss = learn.loss_grad.clone()
        except BaseException:
            for callback in mixed:
                callback("after_loss")
            raise
        learn("after_loss")
