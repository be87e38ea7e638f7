"""What the adapter refuses before the first step, because it would not be exact."""

import inspect
from typing import Any

from mosaic_core import Need, Recipe, UnsupportedError
from mosaic_lightning.plugin import mosaic_adapter

__all__ = ["refuse_on_setup", "refuse_on_start"]

_SINGLE_OR_DDP = {"SingleDeviceStrategy", "DDPStrategy"}
_AVERAGING = {"WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging"}
_RUNS_STEPS = {Need.SECOND_PASS, Need.SELECTION}


def refuse_on_setup(recipe: Recipe, trainer: Any, module: Any, stage: str) -> None:
    """Refuse what the Trainer and the module already show when they are set up.

    Raises:
        ConflictError: If the recipe contradicts a callback.
        UnsupportedError: For everything else.
    """
    mosaic_adapter().check(recipe)
    names = [{base.__name__ for base in type(c).__mro__} for c in trainer.callbacks]
    if sum("MosaicCallback" in bases for bases in names) > 1:
        raise UnsupportedError(
            "mosaic: a Trainer takes one MosaicCallback, as the order of two recipes would be"
            " undefined; put all algorithms into one recipe"
        )
    for callback, bases in zip(trainer.callbacks, names, strict=True):
        if bases & _AVERAGING:
            recipe.check({"trainer weight averaging": f"the callback {type(callback).__name__}"})
    if type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher":
        raise UnsupportedError(
            "mosaic: a strategy that spawns or forks processes loses surgery and averaged weights"
            ' when they end; use strategy="ddp"'
        )
    strategy = type(trainer.strategy).__name__
    if len(recipe) and strategy not in _SINGLE_OR_DDP:
        raise UnsupportedError(
            f"mosaic: {strategy} is not supported, because it shards parameters or is untried; use"
            ' one device or strategy="ddp"'
        )
    if stage != "fit":
        return
    step = inspect.signature(module.training_step).parameters
    reads = any(need in (Need.BATCH, Need.SECOND_PASS) for a in recipe for need in a.needs())
    if "dataloader_iter" in step and (reads or any(a.replays() for a in recipe)):
        raise UnsupportedError(
            "mosaic: training_step(dataloader_iter) fetches its own batches, which the recipe must"
            " see; use training_step(batch, batch_idx)"
        )
    again = [a.name for a in recipe if a.needs() & _RUNS_STEPS or a.replays()]
    if again and not module.automatic_optimization:
        raise UnsupportedError(
            f"mosaic: {again[0]} runs a training step another time, and with manual optimisation"
            " that would also update the weights; set automatic_optimization = True"
        )


def refuse_on_start(recipe: Recipe, trainer: Any) -> None:
    """Refuse what shows when the optimizers exist.

    Raises:
        UnsupportedError: If gradients would reach the algorithms scaled.
    """
    if getattr(trainer.precision_plugin, "scaler", None) is None:
        return
    reads = [a.name for a in recipe if a.needs() & {Need.GRADIENTS, Need.SECOND_PASS}]
    fused = [o for o in trainer.optimizers if getattr(o, "_step_supports_amp_scaling", False)]
    if reads and fused:
        raise UnsupportedError(
            f"mosaic: {reads[0]} acts on gradients, which {type(fused[0]).__name__}(fused=True)"
            ' unscales only inside its step; use fused=False or precision="bf16-mixed"'
        )
