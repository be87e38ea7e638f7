"""Making an engine that trains with a recipe, and giving one to an engine that exists."""

from collections.abc import Callable, Iterable
from typing import Any

import deepspeed
from torch import nn

from mosaic_core import Algorithm, Recipe, Run, UnsupportedError
from mosaic_core.batch import Key
from mosaic_core.parameters import ReplicatedParameters
from mosaic_deepspeed._handle import Handle
from mosaic_deepspeed._layout import plain_layout
from mosaic_deepspeed._refusals import (
    refuse_attaching,
    refuse_config,
    refuse_engine,
    refuse_model,
    refuse_new_parameters,
)
from mosaic_deepspeed._views import view_of

__all__ = ["attach", "initialize"]


def initialize(
    recipe: Iterable[Algorithm] | Recipe | None,
    *,
    model: nn.Module,
    seed: int = 0,
    input_key: Key | None = None,
    target_key: Key | None = None,
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
    **kwargs: Any,
) -> tuple[Any, Any, Any, Any]:
    """Do what ``deepspeed.initialize`` does, for a model that trains with a recipe.

    Args:
        recipe: Algorithms, in any order, or a recipe.
        model: The model, which is changed in place where the recipe asks for it.
        seed: Seed of all that the algorithms draw.
        input_key: Where the input lies in a training batch: an index, a name, or a pair
            ``(get(batch), set(batch, value) -> batch)``; None finds it by convention.
        target_key: The same of the target.
        total_steps: Optimizer steps of the whole run, for durations such as ``"0.3dur"``.
        steps_per_epoch: Optimizer steps of an epoch; None takes it from ``training_data``.
        kwargs: Passed to ``deepspeed.initialize``: ``config``, ``optimizer``, ``training_data``...

    Returns:
        Engine, optimizer, training loader and learning-rate scheduler. ``engine.mosaic`` is a
        :class:`Handle`; the loader transforms each batch.

    Raises:
        UnsupportedError: If training would not be exact.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe(recipe)
    refuse_model(recipe, model)
    refuse_config(recipe, kwargs)
    before = list(model.parameters())
    run = _run(recipe, model, seed, input_key, target_key)
    refuse_new_parameters(model, before, kwargs)
    with plain_layout(model):
        engine, optimizer, loader, scheduler = deepspeed.initialize(model=model, **kwargs)
    if steps_per_epoch is None and loader is not None:
        steps_per_epoch = len(loader) // engine.gradient_accumulation_steps() or None
    handle = attach(engine, run=run, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    return engine, optimizer, None if loader is None else handle.loader(loader), scheduler


def attach(
    engine: Any,
    recipe: Iterable[Algorithm] | Recipe | None = None,
    *,
    run: Run | None = None,
    seed: int = 0,
    input_key: Key | None = None,
    target_key: Key | None = None,
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
    replay: Callable[[], Any] | None = None,
) -> Handle:
    """Train an engine that exists already with a recipe that does not change the model.

    Args:
        engine: The engine; ``engine.mosaic`` will be the handle.
        recipe: Algorithms, in any order, or a recipe.
        run: A run whose surgery was done before the engine was made, in place of ``recipe``,
            ``seed`` and the keys.
        seed: As in :func:`initialize`, like the other arguments.
        input_key: See there.
        target_key: See there.
        total_steps: See there.
        steps_per_epoch: See there.
        replay: Runs a window forward and backward again; None leaves that to the loader.

    Returns:
        The handle.

    Raises:
        UnsupportedError: If training would not be exact.
    """
    if "mosaic" in vars(engine):
        raise UnsupportedError(
            "mosaic_deepspeed.attach: the engine has a recipe, and the order of two would be"
            " undefined; put all algorithms into one, or call engine.mosaic.detach() first"
        )
    if run is None:
        recipe = recipe if isinstance(recipe, Recipe) else Recipe(recipe)
        refuse_attaching(recipe)
        run = _run(recipe, engine.module, seed, input_key, target_key)
    if len(run.recipe):
        refuse_engine(run.recipe, engine)
        run.parameters = view_of(engine)
        run.parameters.start()
    run.rank, run.world_size = engine.global_rank, engine.world_size
    return Handle(engine, run, total_steps, steps_per_epoch, replay)


def _run(
    recipe: Recipe,
    model: nn.Module,
    seed: int,
    input_key: Key | None,
    target_key: Key | None,
) -> Run:
    run = Run(
        recipe,
        model=model,
        seed=seed,
        input_key=input_key,
        target_key=target_key,
        forward=lambda batch: _forward(run, batch),
        parameters=ReplicatedParameters(model),  # until there is an engine
    )
    return run


def _forward(run: Run, batch: Any) -> Any:
    """Run the model on the input of a batch, in the dtype of its weights as a loop must do."""
    input, dtype = run.locator.read(batch, "input"), next(run.model.parameters()).dtype
    return run.model(input.to(dtype) if input.is_floating_point() else input)
