"""The recipe between the transfer of a batch to the device and the training step."""

import functools
from collections.abc import Callable
from typing import Any

from mosaic_core import Run

__all__ = ["shadow"]


def shadow(run: Run, trainer: Any) -> tuple[Any, str, Callable[..., Any]]:
    """Return what to shadow while fitting: owner, method name, and the function to put there."""
    name = "on_after_batch_transfer"
    owner = trainer._data_connector._datahook_selector.get_instance(name)
    transfer = owner.on_after_batch_transfer

    @functools.wraps(transfer)  # Lightning still sees whether the user overrode it
    def on_after_batch_transfer(batch: Any, dataloader_idx: int) -> Any:
        batch = transfer(batch, dataloader_idx)
        if not trainer.training or batch is None:
            return batch
        run.skip_batch()  # where on_train_batch_start skipped the last one
        return run.on_batch(batch)

    return owner, name, on_after_batch_transfer
