"""Checkpoints: averaged weights in DeepSpeed's files, the run in files by rank beside them."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mosaic_core import Run, UnsupportedError, checkpoint
from mosaic_core.surgery import sentinel

__all__ = ["load", "module_state_dict", "save"]

_FILES = "mosaic_rank_*.pt"
_LOAD_WITH = "load them into an engine of mosaic_deepspeed.initialize(recipe, ...)"
_WARM_START = "to begin a new run from its weights, load it with load_module_only=True"


def save(
    engine: Any,
    run: Run,
    save_checkpoint: Callable[..., Any],
    folder: Any,
    tag: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Save a checkpoint whose weights are those to evaluate."""
    tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
    path = Path(folder) / tag
    with run.evaluation():
        path.mkdir(parents=True, exist_ok=True)
        own = {
            "layout": _layout(engine, run),
            # DeepSpeed writes those of rank 0 alone, and batch norm differs between ranks.
            "buffers": {name: b.clone() for name, b in run.model.named_buffers()},
            "run": run.state_dict(),
        }
        # First: the file "latest" must not name a checkpoint that is not complete.
        torch.save(own, path / _FILES.replace("*", f"{engine.global_rank:05d}"))
        return save_checkpoint(folder, tag, *args, **kwargs)


def load(
    engine: Any,
    run: Run,
    start: Callable[[], None],
    load_checkpoint: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Load a checkpoint; a run goes on exactly, or is refused before anything is loaded.

    Raises:
        UnsupportedError: If the run can't go on from it.
    """
    bound = inspect.signature(load_checkpoint).bind(*args, **kwargs)
    bound.apply_defaults()
    options = bound.arguments
    own, message = None, None
    if options["load_optimizer_states"] and not options["load_module_only"]:
        own, message = _read(engine, run, Path(options["load_dir"]), options["tag"])
    # Together: a rank that stopped alone would leave the others waiting.
    messages: list[str | None] = [None] * engine.world_size
    torch.distributed.all_gather_object(messages, message)
    for found in messages:
        if found is not None:
            raise UnsupportedError(f"engine.load_checkpoint: {found}")
    result = load_checkpoint(*args, **kwargs)
    if result[0] is None:  # nothing was found, and DeepSpeed has said so
        return result
    if own is None:  # weights alone, or a checkpoint that was written without mosaic
        run.reset()
        start()
        run.progress.step = engine.global_steps
        return result
    buffers = dict(run.model.named_buffers())
    for name, value in own["buffers"].items():
        buffers[name].copy_(value)
    run.parameters.start()
    run.load_state_dict(own["run"])
    return result


def _read(
    engine: Any, run: Run, folder: Path, tag: Any
) -> tuple[dict[str, Any] | None, str | None]:
    """Return the file of this rank, if there is one, and why the run can't go on from it."""
    if tag is None:
        latest = folder / "latest"
        tag = latest.read_text().strip() if latest.is_file() else None
    files = [] if tag is None else sorted((folder / str(tag)).glob(_FILES))
    if not files:
        return None, None
    if len(files) != engine.world_size:
        return None, (
            f"the checkpoint is of {len(files)} ranks and this run has {engine.world_size}, but"
            f" what a recipe keeps is split by rank; go on with {len(files)}, or, {_WARM_START}"
        )
    own = torch.load(files[engine.global_rank], map_location=engine.device, weights_only=True)
    ours = _layout(engine, run)
    if own["layout"] != ours:
        return own, (
            f"the checkpoint is of {own['layout']['optimizer']}, which splits the parameters in"
            f" another way than the {ours['optimizer']} of this engine; go on with the same ZeRO"
            f" configuration, or, {_WARM_START}"
        )
    try:
        checkpoint.check(run, own["run"])
    except UnsupportedError as error:
        return own, str(error)
    return own, None


def _layout(engine: Any, run: Run) -> dict[str, Any]:
    return {
        "optimizer": type(engine.optimizer).__name__,
        "fragments": [[f.name, f.start, f.numel] for f in run.parameters.fragments()],
    }


def module_state_dict(run: Run, state_dict: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return the engine's state dict, which says in plain words if surgery changed the model."""
    state = state_dict(*args, **kwargs)
    state.update(sentinel(run.report, _LOAD_WITH))
    return state
