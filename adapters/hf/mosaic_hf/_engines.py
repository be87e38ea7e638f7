"""The seam to engines that shard parameters or own the optimizer step.

The rest of the adapter is written for parameters that every process owns whole and for a step that
the Trainer takes. Where an engine does both, its own adapter has to bring a view of the parameters
and hooks on the engine; :func:`refuse_engine` is the one place to let it in.
"""

from typing import Any

from mosaic_core import UnsupportedError

__all__ = ["refuse_engine"]


def refuse_engine(trainer: Any) -> None:
    """Refuse an engine whose parameters are sharded or whose step is out of the Trainer's hands.

    Args:
        trainer: The Trainer, whose accelerator exists.

    Raises:
        UnsupportedError: If it trains with DeepSpeed, FSDP or another kind of model parallelism.
    """
    if trainer.is_deepspeed_enabled:
        raise UnsupportedError(
            "mosaic: the Trainer's DeepSpeed integration takes the optimizer step inside backward,"
            " where a callback can't act; train with mosaic_deepspeed.initialize, or without"
            " DeepSpeed in one process or with DDP (torchrun)"
        )
    if trainer.is_fsdp_enabled or getattr(trainer, "is_fsdp_xla_enabled", False):
        raise UnsupportedError(
            "mosaic: FSDP shards the parameters, for which this adapter has no view; use DDP"
            " (torchrun without fsdp), or ZeRO with mosaic_deepspeed.initialize"
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
