"""What the adapter refuses before the first step, because it would not be exact."""

from typing import Any

from transformers.training_args import ParallelMode

from mosaic_core import Need, Recipe, UnsupportedError
from mosaic_hf._engines import refuse_engine
from mosaic_hf.plugin import mosaic_adapter

__all__ = ["refuse"]

_ONE_PROCESS_OR_DDP = {ParallelMode.NOT_PARALLEL, ParallelMode.DISTRIBUTED}
_STEPS_IN_BACKWARD = ("lomo", "adalomo", "layerwise")


def refuse(recipe: Recipe, trainer: Any, callback: Any) -> None:
    """Refuse what the Trainer and its arguments show.

    Args:
        recipe: The recipe.
        trainer: The Trainer.
        callback: The callback that asks, in the Trainer's list or about to be added to it.

    Raises:
        ConflictError: If the recipe contradicts a feature of the Trainer.
        UnsupportedError: For everything else.
    """
    mosaic_adapter().check(recipe)
    others = [c for c in trainer.callback_handler.callbacks if c is not callback]
    if any(isinstance(other, type(callback)) for other in others):
        raise UnsupportedError(
            "mosaic: a Trainer takes one MosaicCallback, as the order of two recipes would be"
            " undefined; put all algorithms into one recipe"
        )
    if not len(recipe):
        return
    _refuse_features(recipe, trainer.args)
    if trainer.args.parallel_mode not in _ONE_PROCESS_OR_DDP:
        raise UnsupportedError(
            f"mosaic: {trainer.args.parallel_mode.value} is not supported: DataParallel copies the"
            " model in every forward and splits the batch after it was mixed; start one process"
            " for each device with torchrun, or make one device visible"
        )
    refuse_engine(recipe, trainer)


def _refuse_features(recipe: Recipe, args: Any) -> None:
    features = {}
    if args.label_smoothing_factor:
        features["trainer label smoothing"] = "TrainingArguments(label_smoothing_factor)"
    if args.neftune_noise_alpha is not None:
        features["trainer embedding noise"] = "TrainingArguments(neftune_noise_alpha)"
    recipe.check(features)
    needs = {need: [a.name for a in recipe if need in a.needs()] for need in Need}
    if args.label_smoothing_factor and needs[Need.LOSS]:
        raise UnsupportedError(
            f"mosaic: {needs[Need.LOSS][0]} needs the loss, and label_smoothing_factor takes the"
            " labels out of its reach; set it to 0 and put"
            f" LabelSmoothing({args.label_smoothing_factor}) into the recipe"
        )
    if args.auto_find_batch_size:
        raise UnsupportedError(
            "mosaic: auto_find_batch_size begins again, with weights that have moved, where memory"
            " runs out; set per_device_train_batch_size and auto_find_batch_size=False"
        )
    reads = needs[Need.GRADIENTS] + needs[Need.SECOND_PASS]
    optim = getattr(args.optim, "value", args.optim)
    if reads and any(word in optim for word in _STEPS_IN_BACKWARD):
        raise UnsupportedError(
            f"mosaic: {reads[0]} acts on gradients, and optim={optim!r} steps inside backward,"
            " before they are complete; use another optimizer, such as optim='adamw_torch'"
        )
