"""What mosaic puts into a Lightning checkpoint, and how to load one without a trainer."""

import io
from pathlib import Path
from typing import Any, TypeVar

import torch

from mosaic_core import Recipe, Run
from mosaic_core.surgery import is_sentinel, sentinel

__all__ = ["load_from_checkpoint", "write"]

_Module = TypeVar("_Module", bound=torch.nn.Module)
_LOAD_WITH = (
    "load them with callbacks=[MosaicCallback(recipe)] or mosaic_lightning.load_from_checkpoint"
)


def write(run: Run, trainer: Any, checkpoint: dict[str, Any]) -> None:
    """Make the checkpoint's weights those to evaluate, and put what training needs beside them.

    ``state_dict`` holds the averaged weights, so that whoever loads the file evaluates them;
    ``checkpoint["mosaic"]`` holds the recipe and, unless only weights are saved, the state of the
    run with the weights training goes on from.
    """
    if "mosaic" in checkpoint:  # the callback's hook came before the module's
        return
    own: dict[str, Any] = {"recipe": run.recipe.to_yaml(), "changed": run.report.changes}
    weights = dict(checkpoint["state_dict"])
    if run.started:
        with run.evaluation():
            if run.in_evaluation:
                # Copied, because the live tensors go back to the training weights. Only names that
                # are there are replaced: a module may keep some of its weights out of the file.
                averaged = trainer.strategy.lightning_module_state_dict()
                for name in weights.keys() & averaged.keys():
                    value = averaged[name]
                    weights[name] = value.clone() if isinstance(value, torch.Tensor) else value
            if "optimizer_states" in checkpoint:
                own["run"] = run.state_dict()
    if weights:
        weights.update(sentinel(run.report, _LOAD_WITH))
    checkpoint["state_dict"], checkpoint["mosaic"] = weights, own


def load_from_checkpoint(
    cls: type[_Module],
    path: str | Path,
    recipe: Any = None,
    map_location: Any = "cpu",
    **kwargs: Any,
) -> _Module:
    """Load a LightningModule that was trained with a recipe, surgery included.

    Args:
        cls: The LightningModule's class.
        path: Checkpoint file, written with or without mosaic.
        recipe: The recipe; None takes the one in the file.
        map_location: Where to load the tensors, as for ``torch.load``.
        kwargs: Passed to ``cls.load_from_checkpoint``, such as hyper-parameters.

    Returns:
        The module with the weights to evaluate: averaged, where the recipe averages.
    """
    checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    own = checkpoint.get("mosaic", {})
    recipe = Recipe.from_yaml(own.get("recipe", "[]")) if recipe is None else Recipe(recipe)
    state = {k: v for k, v in checkpoint["state_dict"].items() if not is_sentinel(k)}
    checkpoint["state_dict"] = state

    # Surgery goes between making the module and loading its weights, where Lightning calls
    # on_load_checkpoint; it may add parameters.
    class Changed(cls):  # type: ignore[misc, valid-type]  # a class made from an argument
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            super().on_load_checkpoint(checkpoint)
            Run(recipe, model=self)

    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(0)
    module: Any = Changed.load_from_checkpoint(buffer, map_location=map_location, **kwargs)
    module.__class__ = cls
    loaded: _Module = module
    return loaded
