"""What the adapter refuses before the first step, because it would not be exact or is untried."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.module import PipelineModule
from torch import nn

from mosaic_core import Need, Recipe, UnsupportedError
from mosaic_deepspeed.plugin import SCALED, mosaic_adapter

__all__ = [
    "refuse_attaching",
    "refuse_config",
    "refuse_engine",
    "refuse_model",
    "refuse_new_parameters",
]


def refuse_model(recipe: Recipe, model: nn.Module) -> None:
    """Refuse what shows before surgery.

    Raises:
        UnsupportedError: For a pipeline or a model that is sharded already.
    """
    mosaic_adapter().check(recipe)
    if not len(recipe):
        return
    if isinstance(model, PipelineModule):
        raise UnsupportedError(
            "mosaic: a pipeline schedules its micro-batches itself, where the recipe reaches"
            " neither batches nor gradients; use a plain module with ZeRO"
        )
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise UnsupportedError(
            "mosaic: the model was built inside deepspeed.zero.Init, where surgery sees empty"
            " parameters; build it outside, and let initialize partition it"
        )


def refuse_new_parameters(
    model: nn.Module, before: Iterable[nn.Parameter], kwargs: Mapping[str, Any]
) -> None:
    """Refuse surgery that changed parameters which somebody holds already.

    Raises:
        UnsupportedError: If the optimizer would not train those of the model.
    """
    if {id(p) for p in before} == {id(p) for p in model.parameters()}:
        return
    held = next(
        (
            name
            for name in ("optimizer", "model_parameters")
            if kwargs.get(name) is not None
            and (name != "optimizer" or isinstance(kwargs[name], torch.optim.Optimizer))
        ),
        None,
    )
    if held is not None:
        raise UnsupportedError(
            f"mosaic_deepspeed.initialize: the recipe changes the model's parameters, and {held}"
            " holds those of before; leave model_parameters out, and give the optimizer in the"
            " config or as a function of the parameters"
        )


def refuse_attaching(recipe: Recipe) -> None:
    """Refuse surgery on a model that an engine has taken apart.

    Raises:
        UnsupportedError: If an algorithm changes the model.
    """
    mosaic_adapter().check(recipe)
    for algorithm in recipe:
        if Need.SURGERY in algorithm.needs():
            raise UnsupportedError(
                f"mosaic_deepspeed.attach: {algorithm.name} changes the model, which must be done"
                " before the engine is made; use mosaic_deepspeed.initialize"
            )


def refuse_engine(recipe: Recipe, engine: Any) -> None:
    """Refuse an engine that works in a way that was not proved.

    Raises:
        UnsupportedError: Naming the way, and what to use instead.
    """
    if type(engine) is not DeepSpeedEngine:
        raise UnsupportedError(
            f"mosaic: a {type(engine).__name__} is not supported; use a DeepSpeedEngine, as"
            " deepspeed.initialize makes of a plain module"
        )
    for reason, instead in _reasons(engine):
        raise UnsupportedError(f"mosaic: {reason}; {instead}")
    if engine.fp16_enabled():
        _refuse_scaled(recipe)


def refuse_config(recipe: Recipe, kwargs: Mapping[str, Any]) -> None:
    """Refuse what the configuration shows, while the model is as it was.

    Raises:
        UnsupportedError: If gradients would reach the algorithms scaled.
    """
    config = kwargs.get("config") or kwargs.get("config_params")
    config = config or getattr(kwargs.get("args"), "deepspeed_config", None)
    if isinstance(config, str | Path) and Path(config).is_file():
        config = json.loads(Path(config).read_text())
    if isinstance(config, Mapping) and config.get("fp16", {}).get("enabled") is True:
        _refuse_scaled(recipe)


def _refuse_scaled(recipe: Recipe) -> None:
    for algorithm in recipe:
        if algorithm.needs() & SCALED:
            raise UnsupportedError(
                f"mosaic: {algorithm.name} acts on gradients, which DeepSpeed scales with float16"
                ' weights and unscales only inside its step; use "bf16" in the config'
            )


def _reasons(engine: Any) -> Iterable[tuple[str, str]]:
    data_parallel = "use data parallelism with ZeRO alone"
    if engine.basic_optimizer is None:
        yield "the engine has no optimizer", "give one in the config or to initialize"
    if engine.has_moe_layers:
        yield "experts are sharded in another way than the other parameters", data_parallel
    if engine.mp_world_size > 1 or engine.autotp_size() > 1:
        yield "tensor parallelism splits parameters in a way the recipe can't see", data_parallel
    if engine.sequence_parallel_size > 1:
        yield "sequence parallelism gives the recipe a part of each example", data_parallel
    if engine.fp16_enabled() and not engine.zero_optimization():
        yield (
            "without ZeRO, DeepSpeed 0.19 divides float16 gradients by a scale that it did not"
            " put on the loss",
            'set stage 1, 2 or 3 of zero_optimization, or use "bf16", in the config',
        )
    if engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16:
        yield (
            "with autocast to float16 DeepSpeed does not tell which steps it skipped",
            'use "bfloat16" as dtype of torch_autocast in the config',
        )
    for offload in (engine.zero_offload_optimizer(), engine.zero_offload_param()):
        if offload is not None and str(getattr(offload.device, "value", offload.device)) != "none":
            yield (
                "offloaded parameters and optimizer states are not where the recipe looks for them",
                "take offload_optimizer and offload_param out of the config",
            )
    if engine.zero_hpz_partition_size() > 1 or engine.zero_quantized_weights():
        yield (
            "ZeRO++ keeps second, perhaps quantized, copies of the weights",
            "take zero_hpz_partition_size and zero_quantized_weights out of the config",
        )
    if engine.zero_quantized_gradients():
        yield "quantized gradients are not exact", "take zero_quantized_gradients out of the config"
    if not engine.managed_gradient_accumulation():
        yield (
            "with managed_gradient_accumulation off only the loop knows where a window ends",
            "leave it on",
        )
    if engine.random_ltd_enabled():
        yield (
            "random layer-token dropping draws inside forward",
            "take random_ltd out of the config",
        )
    if engine.is_deepcompile_enabled():
        yield (
            "DeepCompile reduces gradients inside compiled graphs",
            "take compile out of the config",
        )
    if engine.checkpoint_engine.is_decoupled():
        yield (
            "a decoupled checkpoint writer reads the weights after they have been put back",
            "use the default writer",
        )
    if engine.load_universal_checkpoint():
        yield (
            "a universal checkpoint is laid out for another number of ranks, which the state of a"
            " recipe is not",
            "take load_universal out of the config",
        )
