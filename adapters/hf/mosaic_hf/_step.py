"""The path of a micro-batch from the loader to the gradients, with a run in it.

The Trainer fetches a whole window of micro-batches ahead, so a batch is transformed as late as
possible: in a shadow of ``training_step``, after the move to the device and just before the model
runs on it. That is outside of autocast and torch.compile, which act inside the model's forward; a
subclass's own ``training_step``, ``compute_loss`` and ``_prepare_inputs`` are called as ever, and
``num_items_in_batch`` was counted before, on the loader's own labels.

The gradients are complete and not yet clipped where Accelerate unscales them for clipping and for
the norm that is logged: that is where the algorithms act on them. So ``max_grad_norm`` stays the
Trainer's, and ``grad_norm`` in its logs is that of the gradients the algorithms leave.
"""

import contextlib
import copy
from typing import Any

from torch import Tensor

from mosaic_core import LossError, Need, Run
from mosaic_core.shadow import Shadows
from mosaic_core.stepped import Stepped
from mosaic_hf._reach import bare_optimizer

__all__ = ["Steps"]

# torch 2.14, for one, calls its kernel directly for such a module, past every tensor subclass.
_COMPILED = (
    "With torch_compile, a torch.nn.CrossEntropyLoss that forward itself makes is computed past the"
    " labels: give Trainer a compute_loss_func, which is not compiled, or set torch_compile=False."
)


class Steps:
    """What stands in for methods of a Trainer and its accelerator while training.

    Args:
        run: The run.
        trainer: The Trainer; its methods are taken as they are now.

    Attributes:
        replaying: Whether a window is being run again, of which nothing is to be logged.
    """

    def __init__(self, run: Run, trainer: Any) -> None:
        self._run, self._trainer = run, trainer
        self._train, self._prepare = trainer.training_step, trainer._prepare_inputs
        self._unscale = trainer.accelerator.unscale_gradients
        self._two_pass = any(Need.SECOND_PASS in a.needs() for a in run.recipe)
        self._window: list[tuple[Any, Any, tuple[Any, ...]]] = []
        self._given: Any = None
        self._acted, self._stepped = False, Stepped()
        self.replaying = False

    def install(self, shadows: Shadows) -> None:
        """Put everything where the Trainer calls it."""
        self._install(shadows)
        shadows.put(self._trainer.accelerator, "unscale_gradients", self._unscale_gradients)
        shadows.on_undo(self._stepped.watch(bare_optimizer(self._trainer.optimizer)))

    def _install(self, shadows: Shadows) -> None:
        shadows.put(self._trainer, "training_step", self._training_step)
        shadows.put(self._trainer, "_prepare_inputs", self._prepare_inputs)

    def _training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        if not model.training:  # after an evaluation; training_step itself sets it later
            model.train()
        rest = (*rest, *named.values())  # num_items_in_batch, if anything
        inputs = self._prepare(inputs)
        batch = self._transform(inputs)
        if rest and rest[0] is not None:
            shifted = getattr(self._trainer, "_loss_shifts_labels", False)  # not in 5.0
            rest = (rest[0] * _kept_share(inputs, batch, shifted), *rest[1:])
        if self._two_pass:
            self._window.append((model, batch, rest))
        try:
            loss = self._run_on(model, batch, rest)
            self._run.check_loss()
        except LossError as error:
            if self._trainer.args.torch_compile:
                error.add_note(_COMPILED)
            raise
        return loss

    def _transform(self, inputs: Any) -> Any:
        return self._run.on_batch(inputs)

    def _run_on(self, model: Any, batch: Any, rest: tuple[Any, ...]) -> Any:
        self._given = copy.copy(batch)  # compute_loss takes the labels out of it
        try:
            return self._train(model, self._given, *rest)
        finally:
            self._given = None

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs if inputs is self._given else self._prepare(inputs)

    def _unscale_gradients(self, *args: Any, **kwargs: Any) -> None:
        if self._acted:
            self._unscale(*args, **kwargs)
            return
        self._acted = True
        if self._two_pass:
            scaler = self._trainer.accelerator.scaler
            scale = 1.0 if scaler is None else scaler.get_scale()
            self._run.second_pass(self._run_again, scale)
            self._window.clear()
        self._unscale(*args, **kwargs)
        self._run.on_gradients()

    def _run_again(self) -> None:
        self.replaying = True
        try:
            for i, (model, batch, rest) in enumerate(self._window):
                with self._in_window(model, last=i == len(self._window) - 1):
                    self._run_on(model, batch, rest)
        finally:
            self.replaying = False

    def _in_window(self, model: Any, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Reduce gradients over the processes for the last micro-batch alone."""
        accelerator = self._trainer.accelerator
        return contextlib.nullcontext() if last else accelerator.no_sync(model)

    def before_optimizer(self) -> None:
        """Act on the gradients where the Trainer neither clipped nor measured them."""
        if not self._acted:
            self._unscale_gradients()

    def end(self) -> None:
        """Count a step, which a gradient scaler may have skipped."""
        self._acted = False
        self._window.clear()
        self._run.end_step(applied=self._stepped.take())

    def forward(self, batch: Any) -> None:
        """Run the model on a training batch, as the Trainer does, and log nothing of it."""
        replaying, self.replaying = self.replaying, True
        try:
            self._trainer.compute_loss(self._trainer.model, copy.copy(batch))
        finally:
            self.replaying = replaying


def _kept_share(before: Any, after: Any, shifted: bool) -> Any:
    """Tell which share of the counted labels a recipe that drops examples has kept.

    With it each micro-batch keeps its weight in the window: what is left is summed, and divided by
    the count of it in place of the count of all.
    """
    try:
        old, new = before["labels"], after["labels"]
    except (KeyError, TypeError, IndexError):
        return 1
    if not (isinstance(old, Tensor) and isinstance(new, Tensor)) or old.shape == new.shape:
        return 1
    if shifted:
        old, new = old[..., 1:], new[..., 1:]
    return new.ne(-100).sum().clamp_min(1) / old.ne(-100).sum().clamp_min(1)
