"""What mosaic puts into the Trainer's checkpoints, and how to load a model without a Trainer."""

import logging
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mosaic_core import Recipe, Run, UnsupportedError
from mosaic_core.surgery import is_sentinel, sentinel

__all__ = ["load_pretrained", "load_run", "note", "save_run", "saved_state"]

_Model = TypeVar("_Model", bound=nn.Module)
_RUN_FILE = "mosaic.pt"
_LOAD_WITH = "load them with mosaic_hf.load_pretrained, or put the recipe on the model first"


def save_run(run: Run, folder: str) -> None:
    """Write what training needs beside the weights to evaluate, which the folder holds."""
    torch.save(run.state_dict(), Path(folder) / _RUN_FILE)


def load_run(run: Run, folder: str | None) -> bool:
    """Give a run that has started what :func:`save_run` wrote, and tell whether there was any."""
    file = None if folder is None else Path(folder) / _RUN_FILE
    if file is None or not file.exists():
        return False
    run.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return True


def saved_state(run: Run, state: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict to save: contiguous, as safetensors asks, and with the sentinel."""
    contiguous = {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in state.items()}
    return {**contiguous, **sentinel(run.report, _LOAD_WITH)}


def note(run: Run) -> None:
    """Write into the model's configuration what was changed, so that every save of it says so.

    Raises:
        UnsupportedError: If it notes already that its weights belong to another model.
    """
    config = getattr(run.model, "config", None)
    changed = {name: modules for name, modules in run.report.changes.items() if modules}
    missing = _noted(config).get("changed", {}).keys() - changed.keys()
    if missing:
        raise UnsupportedError(
            f"mosaic: the weights belong to a model changed by {', '.join(sorted(missing))}, as its"
            " configuration notes, and would silently compute something else; put the same"
            " algorithms into the recipe, or set model.config.mosaic = None to begin anew"
        )
    if changed and config is not None:
        config.mosaic = {"recipe": run.recipe_text, "changed": changed}


def _noted(config: Any) -> dict[str, Any]:
    return getattr(config, "mosaic", None) or {}


def load_pretrained(
    cls: type[_Model], path: str | Path, recipe: Any = None, **kwargs: Any
) -> _Model:
    """Load a model that was trained with a recipe, surgery included.

    Args:
        cls: The model's class, or an Auto class: whatever has ``from_pretrained``.
        path: Folder of the checkpoint or of the saved model, or a name on the Hub.
        recipe: The recipe; None takes the one that the model's configuration notes.
        kwargs: Passed to ``cls.from_pretrained``.

    Returns:
        The model with the weights to evaluate: averaged, where the recipe averages.

    Raises:
        UnsupportedError: If the surgery makes parameters, which ``from_pretrained`` can't fill.
    """
    # The report of loading would tell of the sentinel, which is right to be unexpected here.
    reporter, held = logging.getLogger("transformers.modeling_utils"), _Held()
    reporter.addFilter(held)
    try:
        load: Any = cls.from_pretrained  # type: ignore[attr-defined]  # see Args
        model, told = load(path, output_loading_info=True, **kwargs)
    finally:
        reporter.removeFilter(held)
    if any(key for keys in told.values() for key in keys if not is_sentinel(str(key))):
        for record in held.records:
            reporter.handle(record)
    config = model.config
    if recipe is None:
        recipe = Recipe.from_yaml(_noted(config).get("recipe", "[]"))
    names = set(model.state_dict())
    Run(recipe, model=model)
    if names != set(model.state_dict()):
        raise UnsupportedError(
            "load_pretrained: the recipe makes new parameters; make the model from its"
            " configuration, then Run(recipe, model=model), then load the weights into it"
        )
    loaded: _Model = model
    return loaded


class _Held(logging.Filter):
    """Keeps back what is logged of a checkpoint with the sentinel."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        found = any(is_sentinel(line) for line in record.getMessage().splitlines())
        if found:
            self.records.append(record)
        return not found
