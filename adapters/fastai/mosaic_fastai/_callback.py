"""MosaicCallback: translates a Learner's events into calls of one :class:`mosaic_core.Run`.

Facts about fastai 2.8 that shape it: ``before_fit`` and ``after_fit`` also come in validate,
get_preds and tta, so a run begins in ``before_train``; every ``Flat`` loss strips a target's
class, so ``loss_func`` is shadowed by a proxy while an epoch trains; ``after_step`` also comes
after a step that was cancelled; and only ``order`` counts among callbacks.
"""

from collections.abc import Iterable

from mosaic_core import Algorithm, Need, Recipe, Run
from mosaic_core.batch import Key
from mosaic_core.target import LossProxy
from mosaic_fastai._belonging import Belonging
from mosaic_fastai._refusals import refuse_callbacks
from mosaic_fastai._second_pass import Window
from mosaic_fastai._start import begin, transform

__all__ = ["MosaicCallback"]


class MosaicCallback(Belonging):
    """Train with a recipe; the model, its loss, the data and the Learner stay as they are.

    Args:
        recipe: Algorithms, in any order, or a recipe.
        seed: Seed of all that the algorithms draw.
        input_key: Where the input lies in a training batch ``(*inputs, *targets)``: an index, or a
            pair ``(get(batch), set(batch, value) -> batch)``; None takes the first input.
        target_key: The same of the target; None takes the first target.

    Attributes:
        run: The run, as ``learn.mosaic.run``; its ``metrics`` hold the ``mosaic/...`` values of
            the latest step.

    Example:
        >>> from mosaic_core.algorithms import EMA, MixUp
        >>> callback = MosaicCallback([MixUp(alpha=0.2), EMA("100ba")])
    """

    order = 10.5  # after MixedPrecision (10) has unscaled, before GradientClip (11) clips

    def __init__(
        self,
        recipe: Iterable[Algorithm] | Recipe | None = None,
        seed: int = 0,
        input_key: Key | None = None,
        target_key: Key | None = None,
    ) -> None:
        super().__init__(recipe, seed, input_key, target_key)
        self._mixes = any(a.changes_labels for a in self.recipe)
        self._labels = any(a.changes_labels or a.reads_labels for a in self.recipe)
        self._two_pass = any(Need.SECOND_PASS in algorithm.needs() for algorithm in self.recipe)

    # Before training.

    def before_fit(self) -> None:
        """Refuse what would not be exact; evaluations inside a fit are nested in it."""
        if self._depth == 0:
            if self._active:  # removed for good in the middle of the last fit
                self._release()
            if not self._learn.lock.locked():  # which an evaluation holds
                refuse_callbacks(self.recipe, self._learn)
        self._depth += 1

    def before_train(self) -> None:
        """Start the run or go on, with the training weights and a loss that takes mixtures."""
        if not self._active:
            self._begin()
        run, learn = self._live, self._learn
        run.leave_evaluation()
        self._epoch_open = True
        if self._mixes:
            # A validation in the middle of an epoch has labels of its own.
            proxy = LossProxy(learn.loss_func, lambda: run.mixture if learn.training else None)
            self._loss.put(learn, "loss_func", proxy)

    def _begin(self) -> None:
        begin(self._change(), self._learn, self._resume, self._made)
        self._resume, self._active, self._cancelled = None, True, False
        if self._two_pass and self._window is None:
            self._window = Window(self._live, self._learn)

    # Training; these events come for training batches only.

    def before_batch(self) -> None:
        """Transform a micro-batch."""
        self._inputs = len(self._learn.xb)
        transform(self._live, self._learn, self._labels)

    def after_cancel_batch(self) -> None:
        """Forget the labels of a batch whose loss was perhaps not computed."""
        self._live.skip_batch()

    def before_backward(self) -> None:
        """Check that the loss computed the mixture; keep the micro-batch for a second pass."""
        self._live.check_loss()
        if self._window is not None:
            self._window.note()

    def after_cancel_backward(self) -> None:
        """Forget a micro-batch that has no gradients."""
        if self._window is not None:
            self._window.forget()

    def before_step(self) -> None:
        """Let the algorithms act on full, unscaled gradients; GradientClip comes later."""
        if self._window is not None:
            self._window.second_pass()
        self._live.on_gradients()

    def after_cancel_step(self) -> None:
        """Note that the step is not applied, as after an overflow; ``after_step`` still comes."""
        self._cancelled = True

    def after_step(self) -> None:
        """Count a step."""
        applied, self._cancelled = not self._cancelled, False
        if self._window is not None:
            self._window.clear()
        self._live.end_step(applied)

    # Evaluation, and the end.

    def after_train(self) -> None:
        """Close the epoch before it is validated."""
        self._loss.undo()
        if self._epoch_open:
            self._epoch_open = False
            self._live.end_epoch()

    def after_cancel_epoch(self) -> None:
        """Close an epoch that ended early."""
        self.after_train()

    def before_validate(self) -> None:
        """Put the averaged weights in, until an epoch trains or goes on."""
        if self._active:
            self._live.enter_evaluation()

    def after_validate(self) -> None:
        """Put the training weights back in the middle of an epoch, for the batches to come."""
        if self._epoch_open:
            self._live.leave_evaluation()

    def after_fit(self) -> None:
        """Leave the averaged weights; another fit goes on from the training weights."""
        self._depth -= 1
        if self._active and self._depth <= 0:
            self._release()
            self._live.enter_evaluation()

    @property
    def _live(self) -> Run:
        if self.run is None:  # an event came before the callback was added
            raise RuntimeError("MosaicCallback: it does not belong to a Learner yet")
        return self.run
