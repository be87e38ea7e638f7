"""The seam to engines that shard parameters or own the optimizer step.

The rest of the adapter is written for parameters that every process owns whole and for a step that
the Trainer takes. Where an engine does both, its own adapter has to bring a view of the parameters
and hooks on the engine, as that of DeepSpeed does.
"""

from typing import Any

from mosaic_core import Recipe, Run, UnsupportedError
from mosaic_hf import _checkpoint, _deepspeed, _reach
from mosaic_hf._step import Steps

__all__ = ["refuse_engine", "start"]


def start(run: Run, trainer: Any, loader: Any) -> Steps:
    """Start a run, or let it go on from a checkpoint.

    Args:
        run: The run.
        trainer: The Trainer, about to train.
        loader: Its training loader.

    Returns:
        What takes the steps.
    """
    if _deepspeed.trains(run.recipe, trainer):
        return _deepspeed.EngineSteps(run, trainer)  # the engine has started the run
    state, folder = trainer.state, _reach.resumed_from(trainer)
    if folder is not None:
        run.reset()
    fresh = not run.started
    run.start(
        [_reach.bare_optimizer(trainer.optimizer)],
        total_steps=state.max_steps,
        steps_per_epoch=_reach.steps_per_epoch(loader, trainer.args.gradient_accumulation_steps),
    )
    if not _checkpoint.load_run(run, folder) and fresh:  # perhaps from one without mosaic
        run.progress.step, run.progress.epoch = state.global_step, int(state.epoch or 0)
    # Where the run goes on from an earlier training, which this one's steps come after.
    run.progress.total_steps = state.max_steps + run.progress.step - state.global_step
    return Steps(run, trainer)


def refuse_engine(recipe: Recipe, trainer: Any) -> None:
    """Refuse an engine for which there is no view of the parameters, or which would not be exact.

    Args:
        recipe: The recipe.
        trainer: The Trainer, whose accelerator exists.

    Raises:
        UnsupportedError: If it trains with FSDP or another kind of model parallelism, or with
            DeepSpeed in a way that is refused.
    """
    if trainer.is_deepspeed_enabled:
        _deepspeed.refuse_deepspeed(recipe, trainer)
    if trainer.is_fsdp_enabled or getattr(trainer, "is_fsdp_xla_enabled", False):
        raise UnsupportedError(
            "mosaic: FSDP shards the parameters, for which this adapter has no view; use DDP"
            " (torchrun without fsdp), or ZeRO (TrainingArguments(deepspeed=...))"
        )
    sharded = getattr(trainer, "is_distributed_loading_by_transformers", False)
    plan = getattr(trainer.accelerator, "parallelism_config", None)
    if sharded or plan is not None or getattr(trainer, "is_tp_enabled", False):
        raise UnsupportedError(
            "mosaic: tensor, context and sequence parallelism shard the model or its batches, for"
            " which this adapter has no view; use DDP (torchrun without parallelism_config)"
        )
    if trainer.is_model_parallel:
        raise UnsupportedError(
            "mosaic: a model spread over several devices (device_map) is untried; put it on one"
            " device, or use DDP (torchrun)"
        )
