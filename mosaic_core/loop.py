"""The plain PyTorch loop: what every adapter must reproduce to the last bit it can.

It is written to be read. Where a trainer and this loop differ, the trainer's adapter is wrong.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mosaic_core.run import Run

__all__ = ["train_steps"]


def train_steps(
    run: Run,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    clip_norm: float | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    scaler: torch.amp.GradScaler | None = None,
    average_gradients: Callable[[nn.Module], None] | None = None,
) -> None:
    """Train on batches, one optimizer step for every full window of them.

    Args:
        run: The run; it has started, and its model is in training mode.
        batches: Micro-batches; an incomplete last window is not used.
        loss: Computes the loss of one transformed micro-batch, ``loss(model, batch)``.
        accumulate: Micro-batches in a window; their gradients are averaged.
        autocast: Computation dtype of forward, None for that of the weights.
        clip_norm: Largest norm of all gradients together, applied after the algorithms.
        scheduler: Learning-rate schedule, stepped once a window.
        scaler: Scales the loss where gradients would underflow, as with float16; it may skip
            steps.
        average_gradients: Averages the gradients over ranks, once a window.

    Raises:
        LossError: If the loss ignored mixed labels; before the weights move.
    """
    model, device = run.model, next(run.model.parameters()).device

    def backward(batch: Any) -> None:
        # Without the cache the two passes of a window round alike.
        with torch.autocast(device.type, autocast, enabled=bool(autocast), cache_enabled=False):
            value = loss(model, batch) / accumulate
        (value if scaler is None else scaler.scale(value)).backward()

    def run_window() -> None:  # again, after the run has dropped the gradients
        for batch in window:
            backward(batch)
        if average_gradients is not None:
            average_gradients(model)

    window: list[Any] = []
    for batch in batches:
        if not window:
            _zero_grad(run.optimizers)
        window.append(run.on_batch(batch))
        backward(window[-1])
        run.check_loss()
        if len(window) < accumulate:
            continue
        if average_gradients is not None:
            average_gradients(model)
        scale = 1.0 if scaler is None else scaler.get_scale()
        run.second_pass(run_window, scale)
        if scaler is not None:
            for optimizer in run.optimizers:
                scaler.unscale_(optimizer)
        run.on_gradients()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        for optimizer in run.optimizers:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        if scheduler is not None:
            scheduler.step()
        run.end_step(applied=scaler is None or scaler.get_scale() >= scale)
        window.clear()
    if window:
        run.progress.micro_batch = 0


def _zero_grad(optimizers: Iterable[Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
