"""Batch norms that keep running statistics: finding them, and computing the statistics again."""

from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["batch_norms", "recompute", "statistics"]


def batch_norms(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Return the batch norms of a model that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    }


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a model's batch norms by their names in the model, not copied."""
    return {
        f"{name}.{key}" if name else key: buffer
        for name, norm in batch_norms(model).items()
        for key, buffer in norm.named_buffers(recurse=False)
    }


@torch.no_grad()
def recompute(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[Any], object] | None = None,
    frozen: Container[str] = (),
) -> None:
    """Compute the statistics again, in place, as the mean over some batches.

    Everything else runs as in evaluation, and each module's mode is put back.

    Args:
        model: The model.
        batches: Batches to run it on, each of which counts the same.
        forward: Runs the model on one of them; None calls ``model(batch)``.
        frozen: Names of batch norms whose statistics stay.
    """
    norms = [norm for name, norm in batch_norms(model).items() if name not in frozen]
    if not norms:
        return
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over the batches
            norm.train()
        for batch in batches:
            (forward or model)(batch)
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
