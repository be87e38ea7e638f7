"""MosaicCallback: translates the Trainer's events into calls of one :class:`mosaic_core.Run`.

Facts about transformers 5.0 to 5.24 that shape it: a callback is given neither the Trainer nor the
batch, no event lies between the gradients and their clipping, and none comes after an exception.
So methods of the Trainer are shadowed by instance attributes while it trains, and put back at the
end of training and on exceptions.
"""

import functools
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import TrainerCallback

from mosaic_core import Algorithm, Recipe, Run, UnsupportedError
from mosaic_core.batch import Key
from mosaic_core.shadow import Shadows
from mosaic_hf import _checkpoint, _deepspeed, _evaluation, _reach
from mosaic_hf._engines import start
from mosaic_hf._refusals import refuse
from mosaic_hf._step import Steps

__all__ = ["MosaicCallback"]


class MosaicCallback(TrainerCallback):
    """Train with a recipe; the model, its loss, the data and the Trainer stay as they are.

    Args:
        recipe: Algorithms, in any order, or a recipe.
        seed: Seed of all that the algorithms draw.
        input_key: Where the input lies in a training batch: a name, or a pair
            ``(get(batch), set(batch, value) -> batch)``; None finds it by convention.
        target_key: The same of the target.
        trainer: A Trainer that already exists, see :meth:`attach`; None for one that gets the
            callback in ``Trainer(callbacks=[...])``.

    Example:
        >>> from mosaic_core.algorithms import EMA, MixUp
        >>> callback = MosaicCallback([MixUp(alpha=0.2), EMA("100ba")])
    """

    def __init__(
        self,
        recipe: Iterable[Algorithm] | Recipe | None = None,
        seed: int = 0,
        input_key: Key | None = None,
        target_key: Key | None = None,
        trainer: Any = None,
    ) -> None:
        self.recipe = recipe if isinstance(recipe, Recipe) else Recipe(recipe)
        self.seed, self.input_key, self.target_key = seed, input_key, target_key
        self.run: Run | None = None
        self._trainer: Any = None
        self._steps: Steps | None = None
        self._shadows = Shadows()
        self._guarded = self._epoch_open = False
        if trainer is not None:
            self.attach(trainer)

    # Before training.

    def attach(self, trainer: Any) -> None:
        """Put the recipe on a Trainer: refuse what would not be exact, and change the model.

        Args:
            trainer: A Trainer; this callback is added to its list, if it is not in it.

        Raises:
            ConflictError: If the recipe contradicts a feature of the Trainer.
            UnsupportedError: For everything else that would not be exact.
        """
        self._release()
        refuse(self.recipe, trainer, self)
        if not any(item is self for item in trainer.callback_handler.callbacks):
            trainer.add_callback(self)
        self._trainer = trainer
        self._change(trainer.model, trainer.optimizer is not None)
        self._guard(trainer, "_inner_training_loop")
        self._guarded = True
        if _deepspeed.trains(self.recipe, trainer):
            _deepspeed.prepare(trainer, self._shadows, lambda: self._live)
        if trainer.model_init is not None:
            change = functools.partial(self._change, has_optimizer=False)
            self._shadows.put(trainer, "model_init", _reach.changed(trainer.model_init, change))

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Change the model, before the optimizer exists and before the model is wrapped."""
        self.attach(_reach.calling_trainer(self))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the run, or go on from a checkpoint."""
        trainer = _reach.calling_trainer(self, self._trainer)
        refuse(self.recipe, trainer, self)
        if not self._guarded or trainer is not self._trainer:
            _deepspeed.refuse_late(self.recipe, trainer)
            # Added late, or training again: the loop is running, so what it calls is guarded.
            self._release()
            self._trainer = trainer
            for owner, name in _reach.called_by(trainer, self):
                self._guard(owner, name)
        self._change(trainer.model, True)
        steps = start(self._live, trainer, kwargs.get("train_dataloader"))
        if len(self.recipe):
            self._steps = steps
            steps.install(self._shadows)
            for shadow in _evaluation.shadows(self._live, trainer, steps):
                self._shadows.put(*shadow)

    def _change(self, model: nn.Module, has_optimizer: bool) -> None:
        """Make the run of a model, and with it the surgery, unless it has been made."""
        if self.run is not None and self.run.model is model:
            return
        before = set(map(id, model.parameters()))
        run = Run(
            self.recipe,
            model=model,
            seed=self.seed,
            rank=self._trainer.args.process_index,
            world_size=self._trainer.args.world_size,
            input_key=self.input_key,
            target_key=self.target_key,
            forward=self._forward,
            parameters=_deepspeed.parameters(self._trainer),
        )
        late = set(map(id, model.parameters())) - before
        if self._trainer.model_wrapped is self._trainer.model:  # they join the optimizer's groups
            late -= run.new_parameters.added
        if has_optimizer and late:
            raise UnsupportedError(
                "mosaic: the recipe makes new parameters, and the optimizer exists already; give"
                " MosaicCallback to Trainer(callbacks=[...]), and let the Trainer make the"
                " optimizer (optimizer_cls_and_kwargs) instead of giving it one"
            )
        _checkpoint.note(run)
        self.run = run

    def _forward(self, batch: Any) -> None:
        if self._steps is not None:  # only training keeps batches
            self._steps.forward(batch)

    # Training.

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open an epoch."""
        self._epoch_open = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the algorithms act on the gradients, unless clipping has already led to it."""
        if self._steps is not None:
            self._steps.before_optimizer()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step, and close an epoch before it is evaluated or saved."""
        if self._steps is None:
            self._live.end_step()
        else:
            self._steps.end()
        if state.epoch == int(state.epoch):  # the last step of an epoch
            self._close_epoch()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close an epoch that ended early; one that training stops in may be gone on with."""
        if not control.should_training_stop:
            self._close_epoch()

    def _close_epoch(self) -> None:
        if self._epoch_open:
            self._epoch_open = False
            self._live.end_epoch()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the averaged weights; another training goes on from the training weights."""
        self._live.enter_evaluation()
        self._release()

    # After it.

    def _release(self) -> None:
        """Put back everything that was shadowed."""
        self._shadows.undo()
        self._guarded, self._steps = False, None

    def _abort(self) -> None:
        """Put back the training weights as well."""
        self._release()
        if self.run is not None:
            self.run.leave_evaluation()

    def _guard(self, owner: Any, name: str) -> None:
        """Shadow a method so that an exception in it puts everything back."""
        self._shadows.put(owner, name, _reach.guarded(getattr(owner, name), self._abort))

    @property
    def _live(self) -> Run:
        if self.run is None:
            raise RuntimeError("MosaicCallback: the Trainer has not begun to train yet")
        return self.run
