"""What the adapter refuses before the first step, because it would not be exact."""

from typing import Any

from fastai.callback.fp16 import ModelToHalf, NonNativeMixedPrecision
from fastai.callback.mixup import MixHandler
from fastai.callback.training import GradientAccumulation
from fastai.losses import FocalLoss, LabelSmoothingCrossEntropy
from fastai.optimizer import OptimWrapper
from torch.nn.parallel import DistributedDataParallel

from mosaic_core import Need, Recipe, Run, UnsupportedError
from mosaic_fastai.plugin import mosaic_adapter

__all__ = ["refuse_callbacks", "refuse_on_start"]


def refuse_callbacks(recipe: Recipe, learn: Any) -> None:
    """Refuse callbacks before a fit, as fastai's mixing replaces the loss when it begins to train.

    Raises:
        ConflictError: If the recipe contradicts a callback.
        UnsupportedError: For everything else.
    """
    if sum(type(callback).__name__ == "MosaicCallback" for callback in learn.cbs) > 1:
        raise UnsupportedError(
            "mosaic: a Learner takes one MosaicCallback, as the order of two recipes would be"
            " undefined; put all algorithms into one recipe"
        )
    mixing = [type(callback).__name__ for callback in learn._grab_cbs(MixHandler)]
    if mixing:
        recipe.check({"trainer mixing": f"fastai's callback {mixing[0]}"})
    changing = [algorithm.name for algorithm in recipe if algorithm.changes_labels]
    if mixing and changing:
        raise UnsupportedError(
            f"mosaic: {changing[0]} changes labels, and fastai's callback {mixing[0]} replaces the"
            " loss that is to compute them; use mosaic_core.algorithms for both"
        )
    selecting = [algorithm.name for algorithm in recipe if Need.SELECTION in algorithm.needs()]
    if selecting and learn._grab_cbs(GradientAccumulation):
        raise UnsupportedError(
            f"mosaic: {selecting[0]} drops examples, and fastai's GradientAccumulation counts them"
            " to tell when a window is full; use larger batches without it"
        )
    for callback in learn.cbs if len(recipe) else ():
        if isinstance(callback, ModelToHalf | NonNativeMixedPrecision):
            raise UnsupportedError(
                f"mosaic: {type(callback).__name__} trains copies of the weights, which the"
                " algorithms do not see; use to_fp16() or to_bf16()"
            )


def refuse_on_start(recipe: Recipe, learn: Any, run: Run) -> None:
    """Refuse what shows when the model is wrapped and the optimizer exists.

    Raises:
        ConflictError: If the recipe contradicts the loss.
        UnsupportedError: For everything else.
    """
    mosaic_adapter().check(recipe)
    loss = learn.loss_func
    module, name = getattr(loss, "func", loss), f"the loss {type(loss).__name__}"
    if isinstance(module, LabelSmoothingCrossEntropy):
        recipe.check({"trainer label smoothing": name})
    if isinstance(module, FocalLoss):  # it calls one inside, and is not linear in it
        recipe.check({"trainer label smoothing": f"{name}, which is no cross entropy"})
    wrapped = learn.model is not run.model
    if len(recipe) and wrapped and not isinstance(learn.model, DistributedDataParallel):
        raise UnsupportedError(
            f"mosaic: a model inside {type(learn.model).__name__} is not supported, because it"
            " shards parameters or is untried; use one device or to_distributed()"
        )
    changing = [algorithm.name for algorithm in recipe if Need.OPTIMIZER in algorithm.needs()]
    if changing and not isinstance(learn.opt, OptimWrapper):
        raise UnsupportedError(
            f"mosaic: {changing[0]} changes the optimizer, and fastai's own is no torch optimizer;"
            " use opt_func=partial(OptimWrapper, opt=torch.optim.AdamW) or the like"
        )
