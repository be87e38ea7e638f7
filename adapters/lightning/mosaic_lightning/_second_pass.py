"""Running a window of micro-batches again, for algorithms that take two passes a step.

Calling Lightning's closure twice would zero gradients, count metrics and move batch norm twice. So
pass one is Lightning's own; then the algorithms act; then the window is run again, muted; then
Lightning goes on once, to unscaling, hooks, clipping and the step.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from mosaic_core import Run
from mosaic_lightning._muted import muted

__all__ = ["shadows"]


def shadows(run: Run, trainer: Any, module: Any) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Return what to shadow while fitting: owner, method name, and the function to put there."""
    strategy, scaler = trainer.strategy, getattr(trainer.precision_plugin, "scaler", None)
    train, step = strategy.training_step, module.optimizer_step
    window: list[tuple[Any, ...]] = []

    def training_step(*args: Any) -> Any:
        window.append(args)
        return train(*args)

    def run_again() -> None:
        with muted(module):
            for i, args in enumerate(window):
                output = train(*args)
                loss = output["loss"] if isinstance(output, Mapping) else output
                if loss is None:
                    continue
                loss = loss / trainer.accumulate_grad_batches
                last = i == len(window) - 1
                no_sync = getattr(strategy, "block_backward_sync", contextlib.nullcontext)
                with contextlib.nullcontext() if last else no_sync():
                    module.backward(loss if scaler is None else scaler.scale(loss))

    def optimizer_step(epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> Any:
        def both() -> Any:
            loss = closure()
            run.second_pass(run_again, 1.0 if scaler is None else scaler.get_scale())
            window.clear()
            return loss

        return step(epoch, batch_idx, optimizer, both)

    return [
        (strategy, "training_step", training_step),
        (module, "optimizer_step", optimizer_step),
    ]
