"""Running a training step again without a trace in logs and metrics."""

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["forward", "muted"]


@contextlib.contextmanager
def muted(module: Any) -> Iterator[None]:
    """Discard what the block logs, and put the states of torchmetrics back after it.

    Args:
        module: The LightningModule.
    """
    logging = {name: vars(module).get(name) for name in ("log", "log_dict")}
    metrics = [
        m for m in module.modules() if hasattr(m, "_defaults") and hasattr(m, "_update_count")
    ]
    saved = [(m, _state(m)) for m in metrics]
    for name in logging:
        vars(module)[name] = _discard
    try:
        yield
    finally:
        for name, own in logging.items():
            if own is None:
                del vars(module)[name]
            else:
                vars(module)[name] = own
        for metric, state in saved:
            for name, value in state.items():
                setattr(metric, name, value)


def _state(metric: Any) -> dict[str, Any]:
    names = (*metric._defaults, "_update_count", "_computed", "_forward_cache")
    values = {name: getattr(metric, name, None) for name in names}
    return {
        n: v.clone() if isinstance(v, torch.Tensor) else copy.copy(v) for n, v in values.items()
    }


def _discard(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``log`` and ``log_dict``."""


def forward(trainer: Any, module: Any, batch: Any) -> None:
    """Run the user's training step on a batch, without a trace."""
    takes_index = len(inspect.signature(module.training_step).parameters) > 1
    with muted(module), trainer.precision_plugin.train_step_context():
        module.training_step(batch, *([0] if takes_index else []))
