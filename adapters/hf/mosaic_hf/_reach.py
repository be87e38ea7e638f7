"""What the Trainer does not tell its callbacks: itself, and what its training loop knows.

Callbacks are called with the model and the optimizer, never with the Trainer. It is looked for
among the callers once for each event that needs it, not on the hot path.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sized
from types import FrameType
from typing import Any

from accelerate.optimizer import (  # type: ignore[import-untyped]  # it ships no annotations
    AcceleratedOptimizer,
)
from torch.optim import Optimizer
from transformers import Trainer

from mosaic_core import UnsupportedError

__all__ = [
    "bare_optimizer",
    "called_by",
    "calling_trainer",
    "changed",
    "guarded",
    "resumed_from",
    "steps_per_epoch",
    "training_loader",
]

# What the training loop calls, one after the other; 5.0 has one method instead of the first two.
_CALLED = ("_run_epoch", "_finalize_training", "_evaluate", "training_step")


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def calling_trainer(callback: Any, known: Any = None) -> Any:
    """Return the nearest Trainer among the callers that has a callback in its list.

    Args:
        callback: The callback.
        known: The Trainer to return if none is found.

    Raises:
        UnsupportedError: If there is none.
    """
    for frame in _callers():
        owner = frame.f_locals.get("self")
        handler = getattr(owner, "callback_handler", None) if isinstance(owner, Trainer) else None
        if handler is not None and any(item is callback for item in handler.callbacks):
            return owner
    if known is None:
        raise UnsupportedError(
            "MosaicCallback: the Trainer that called it was not found among its callers; pass it:"
            " MosaicCallback(recipe, trainer=trainer)"
        )
    return known


def resumed_from(trainer: Any) -> str | None:
    """Return the checkpoint folder from which the running training goes on, None for none."""
    folder: str | None = _of_loop(trainer, "resume_from_checkpoint")
    return folder


def training_loader(trainer: Any) -> Any:
    """Return the loader of the running training, None if it was not found."""
    return _of_loop(trainer, "train_dataloader")


def _of_loop(trainer: Any, name: str) -> Any:
    for frame in _callers():
        # The Trainer's own method, also where a subclass or a shadow calls it.
        if frame.f_code.co_name == "_inner_training_loop" and frame.f_locals.get("self") is trainer:
            return frame.f_locals.get(name)
    return None


def called_by(trainer: Any, callback: Any) -> list[tuple[Any, str]]:
    """Return owner and name of the methods that the loop will call after ``on_train_begin``."""
    handler = trainer.callback_handler
    others = [c for c in handler.callbacks if c is not callback]  # some of them are yet to begin
    return [
        *((trainer, name) for name in _CALLED if hasattr(trainer, name)),
        *((other, "on_train_begin") for other in others),
        (handler, "call_event"),
    ]


def guarded(method: Callable[..., Any], undo: Callable[[], None]) -> Callable[..., Any]:
    """Return a method that undoes when it raises: the Trainer has no event for that."""

    @functools.wraps(method)
    def guarded_method(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except BaseException:
            undo()
            raise

    return guarded_method


def changed(init: Callable[..., Any], change: Callable[[Any], None]) -> Callable[..., Any]:
    """Return a ``model_init`` whose models are changed."""

    @functools.wraps(init)  # the Trainer counts its arguments
    def model_init(*args: Any) -> Any:
        model = init(*args)
        if model is not None:  # which the Trainer has an error for
            change(model)
        return model

    return model_init


def bare_optimizer(optimizer: Any) -> Optimizer:
    """Return the torch optimizer that Accelerate wrapped; the wrapping is new for each training."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    bare: Optimizer = optimizer
    return bare


def steps_per_epoch(loader: Any, accumulate: int) -> int | None:
    """Return the optimizer steps of an epoch; an incomplete last window is a step."""
    try:
        return -(-len(loader) // accumulate) if isinstance(loader, Sized) else None
    except TypeError:  # a loader over a stream has a length and can't tell it
        return None
