"""MosaicCallback: translates Lightning's hooks into calls of one :class:`mosaic_core.Run`.

Facts about Lightning 2.5 to 2.6 that shape it: no callback hook lies between ``configure_model``
and the wrapping of the model, none can replace a batch, and a file with weights only is saved
without calling callbacks. So four methods are shadowed by instance attributes, and put back in
``teardown`` and on exceptions.
"""

import functools
from collections.abc import Iterable
from typing import Any

from mosaic_core import Algorithm, Need, Recipe, Run
from mosaic_core.batch import Key
from mosaic_core.shadow import Shadows
from mosaic_core.stepped import Stepped
from mosaic_lightning import _second_pass, _transfer
from mosaic_lightning._checkpoint import write
from mosaic_lightning._muted import forward
from mosaic_lightning._refusals import refuse_on_setup, refuse_on_start
from mosaic_lightning._roots import Callback

__all__ = ["MosaicCallback"]


class MosaicCallback(Callback):
    """Train with a recipe; the LightningModule, its data and the Trainer stay as they are.

    Args:
        recipe: Algorithms, in any order, or a recipe.
        seed: Seed of all that the algorithms draw.
        input_key: Where the input lies in a training batch: an index, a name, or a pair
            ``(get(batch), set(batch, value) -> batch)``; None finds it by convention.
        target_key: The same of the target.

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
    ) -> None:
        self.recipe = recipe if isinstance(recipe, Recipe) else Recipe(recipe)
        self.seed, self.input_key, self.target_key = seed, input_key, target_key
        self.run: Run | None = None
        self._shadows = Shadows()
        self._resume: dict[str, Any] | None = None
        self._stepped, self._epoch_open = Stepped(), False
        self._steps = 0

    # Before training.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what would not be exact, and arrange for surgery."""
        refuse_on_setup(self.recipe, trainer, pl_module, stage)
        configure = pl_module.configure_model

        def configure_model() -> None:  # no functools.wraps: it must count as overridden
            configure()
            if self.run is None or self.run.model is not pl_module:
                self.run = Run(
                    self.recipe,
                    model=pl_module,
                    seed=self.seed,
                    rank=trainer.global_rank,
                    world_size=trainer.world_size,
                    input_key=self.input_key,
                    target_key=self.target_key,
                    forward=functools.partial(forward, trainer, pl_module),
                )

        self._shadows.put(pl_module, "configure_model", configure_model)
        save = pl_module.on_save_checkpoint

        @functools.wraps(save)
        def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
            save(checkpoint)
            self.on_save_checkpoint(trainer, pl_module, checkpoint)

        self._shadows.put(pl_module, "on_save_checkpoint", on_save_checkpoint)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the recipe between the transfer of a batch and the training step."""
        if len(self.recipe):
            self._shadows.put(*_transfer.shadow(self._live, trainer))
        if any(Need.SECOND_PASS in algorithm.needs() for algorithm in self.recipe):
            for shadow in _second_pass.shadows(self._live, trainer, pl_module):
                self._shadows.put(*shadow)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the run, or go on from a checkpoint."""
        refuse_on_start(self.recipe, trainer)
        run, fresh = self._live, not self._live.started
        total, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
        finite = batches not in (0, float("inf"))
        run.start(
            trainer.optimizers,
            total_steps=int(total) if 0 < total < float("inf") else None,
            steps_per_epoch=-(-batches // trainer.accumulate_grad_batches) if finite else None,
        )
        if self._resume is not None:
            run.load_state_dict(self._resume)
        elif fresh:  # perhaps from a checkpoint that was written without mosaic
            run.progress.step, run.progress.epoch = trainer.global_step, trainer.current_epoch
        if run.progress.total_steps is not None:  # of this fit, and of those by other Trainers
            run.progress.total_steps += max(0, run.progress.step - trainer.global_step)
        self._resume, self._steps = None, trainer.global_step
        for optimizer in trainer.optimizers:
            self._shadows.on_undo(self._stepped.watch(optimizer))

    # Training.

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Open an epoch."""
        self._epoch_open = True

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Check that the loss computed the mixture; manual optimisation may have other losses."""
        if pl_module.automatic_optimization:
            self._live.check_loss()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Let the algorithms act on full, unscaled gradients; Lightning clips afterwards."""
        self._live.on_gradients()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a step if there was one, and close the epoch before it is validated."""
        run = self._live
        if not pl_module.automatic_optimization:
            run.check_loss()
        if trainer.global_step != self._steps:
            self._steps = trainer.global_step
            run.end_step(self._stepped.take())
            if run.metrics and trainer.global_step % trainer.log_every_n_steps == 0:
                step = trainer.fit_loop.epoch_loop._batches_that_stepped
                values = {name: float(value) for name, value in run.metrics.items()}
                for logger in trainer.loggers:
                    logger.log_metrics(values, step=step)
        if trainer.is_last_batch:
            self._close_epoch()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Close an epoch that ended early."""
        self._close_epoch()

    def _close_epoch(self) -> None:
        if self._epoch_open:
            self._epoch_open = False
            self._live.end_epoch()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the averaged weights; another fit goes on from the training weights."""
        self._live.enter_evaluation()

    # Evaluation and checkpoints.

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the averaged weights in while validating inside a fit."""
        if trainer.state.fn == "fit":
            self._live.enter_evaluation()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Put the training weights back; checkpoint callbacks come later."""
        if trainer.state.fn == "fit":
            self._live.leave_evaluation()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write averaged weights, and beside them what training needs."""
        write(self._live, trainer, checkpoint)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the state of the run until training starts."""
        if trainer.state.fn == "fit":
            self._resume = checkpoint.get("mosaic", {}).get("run")
            self._live.reset()

    # After it.

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Put back everything that was shadowed."""
        self._shadows.undo()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put back everything that was shadowed, and the training weights."""
        self.teardown(trainer, pl_module, "fit")
        if self.run is not None:
            self.run.leave_evaluation()

    @property
    def _live(self) -> Run:
        if self.run is None:  # a hook came before configure_model
            raise RuntimeError("MosaicCallback: Lightning has not set the model up yet")
        return self.run
