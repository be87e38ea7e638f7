"""Training with the Trainer's own DeepSpeed integration, ``TrainingArguments(deepspeed=...)``.

An engine takes the gradients and the optimizer step out of the Trainer's hands: both happen inside
``backward``. So mosaic-deepspeed puts the recipe on the engine as soon as Accelerate has made it,
which is before the Trainer loads a checkpoint into it. What remains for this side is to transform
the batches and to run a window again, and, as ever, to close epochs and to hold the averaged
weights while the Trainer evaluates or saves.
"""

import contextlib
from collections.abc import Callable
from typing import Any

from mosaic_core import Need, Recipe, Run, UnsupportedError
from mosaic_core.parameters import ReplicatedParameters
from mosaic_core.shadow import Shadows
from mosaic_hf import _reach
from mosaic_hf._step import Steps

__all__ = ["EngineSteps", "parameters", "prepare", "refuse_deepspeed", "refuse_late", "trains"]


def trains(recipe: Recipe, trainer: Any) -> bool:
    """Tell whether an engine will train with a recipe; an empty one leaves it alone."""
    return len(recipe) > 0 and trainer.is_deepspeed_enabled


def parameters(trainer: Any) -> ReplicatedParameters | None:
    """Return the view of a model for which there is no engine yet, None for the usual one."""
    return ReplicatedParameters(trainer.model) if trainer.is_deepspeed_enabled else None


def prepare(trainer: Any, shadows: Shadows, run: Callable[[], Run]) -> None:
    """Let the engine that Accelerate will make train with the recipe.

    Args:
        trainer: The Trainer.
        shadows: Where to shadow its accelerator's ``prepare``, and what undoes the engine's.
        run: Returns the run, which ``model_init`` makes anew.
    """
    from mosaic_deepspeed import attach, plain_layout

    prepare = trainer.accelerator.prepare

    def prepare_with_recipe(*args: Any, **kwargs: Any) -> Any:
        if not trainer.is_in_train or not any(item is trainer.model for item in args):
            return prepare(*args, **kwargs)  # a loader, or an evaluation without training
        with plain_layout(trainer.model):
            prepared = prepare(*args, **kwargs)
        loader, window = _reach.training_loader(trainer), trainer.args.gradient_accumulation_steps
        handle = attach(
            prepared[0],
            run=run(),
            total_steps=trainer.state.max_steps,
            steps_per_epoch=_reach.steps_per_epoch(loader, window),
        )
        shadows.on_undo(handle.release)
        return prepared

    shadows.put(trainer.accelerator, "prepare", prepare_with_recipe)


class EngineSteps(Steps):
    """What stands in for methods of a Trainer whose engine takes the steps."""

    def __init__(self, run: Run, trainer: Any) -> None:
        super().__init__(run, trainer)
        self._handle = trainer.deepspeed.mosaic
        self._handle.replay = self._run_again
        # After a checkpoint without mosaic; one with it has told the run.
        run.progress.epoch = run.progress.epoch or int(trainer.state.epoch or 0)

    def install(self, shadows: Shadows) -> None:
        """Put everything where the Trainer calls it."""
        self._install(shadows)

    def _transform(self, inputs: Any) -> Any:
        return self._handle.batch(inputs)

    def _in_window(self, model: Any, last: bool) -> contextlib.AbstractContextManager[Any]:
        # By this, Accelerate tells the engine in backward where a window ends.
        self._trainer.accelerator.gradient_state._set_sync_gradients(last)
        return contextlib.nullcontext()

    def before_optimizer(self) -> None:
        """Do nothing: the engine has acted on the gradients and stepped."""

    def end(self) -> None:
        """Forget the window, whose step the engine has counted."""
        self._window.clear()


def refuse_deepspeed(recipe: Recipe, trainer: Any) -> None:
    """Refuse what shows before there is an engine.

    Raises:
        UnsupportedError: Naming what would not be exact, and what to use instead.
    """
    try:
        from mosaic_deepspeed import refuse_config
        from mosaic_deepspeed.plugin import mosaic_adapter
    except ImportError as error:
        raise UnsupportedError(
            "mosaic: a recipe with TrainingArguments(deepspeed=...) needs the adapter of DeepSpeed;"
            " pip install mosaic-deepspeed"
        ) from error
    mosaic_adapter().check(recipe)
    refuse_config(recipe, {"config": trainer.accelerator.state.deepspeed_plugin.deepspeed_config})
    if trainer.args.torch_compile:
        raise UnsupportedError(
            "mosaic: torch_compile of a DeepSpeed engine is untried; set torch_compile=False"
        )
    if trainer.deepspeed is not None:  # what follows was looked at before there was an engine
        return
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise UnsupportedError(
            "mosaic: with DeepSpeed the Trainer ignores optimizers=(...) and makes its own; give"
            " optimizer_cls_and_kwargs, override create_optimizer and create_scheduler, or put"
            ' "optimizer" and "scheduler" into the DeepSpeed configuration'
        )
    surgery = [a.name for a in recipe if Need.SURGERY in a.needs()]
    if surgery and any(hasattr(p, "ds_id") for p in trainer.model.parameters()):
        raise UnsupportedError(
            f"mosaic: {surgery[0]} changes the model, and this one was built inside"
            " deepspeed.zero.Init, where it sees empty parameters; make the model before the"
            " TrainingArguments, as only those that ask for ZeRO-3 let from_pretrained partition it"
        )


def refuse_late(recipe: Recipe, trainer: Any) -> None:
    """Refuse to begin when the engine exists.

    Raises:
        UnsupportedError: If there is one.
    """
    if trains(recipe, trainer):
        raise UnsupportedError(
            "mosaic: the DeepSpeed engine of this training exists already; give MosaicCallback to a"
            " new Trainer(callbacks=[...]), or MosaicCallback(recipe, trainer=trainer) before its"
            " first train()"
        )
