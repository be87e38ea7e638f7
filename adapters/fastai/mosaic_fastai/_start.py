"""How a run begins with a fit, or goes on, and how a batch of fastai's goes through it."""

import contextlib
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from mosaic_core import Run, UnsupportedError, checkpoint
from mosaic_fastai._optimizer import adopt, bare, steps_per_epoch
from mosaic_fastai._refusals import refuse_on_start

__all__ = ["begin", "transform"]


def begin(run: Run, learn: Any, resume: dict[str, Any] | None, made: Collection[Tensor]) -> None:
    """Start the run; or let it go on, from a file or from where the last fit ended.

    Args:
        run: The run.
        learn: The Learner, about to train its first epoch.
        resume: State of the run in the file that was loaded, or None.
        made: Parameters that surgery made.

    Raises:
        ConflictError: If the recipe contradicts the loss.
        UnsupportedError: If something would not be exact, or the file is of another recipe.
    """
    refuse_on_start(run.recipe, learn, run)
    # opt_func may be an optimizer that was made before the Learner.
    adopt(learn, made, run.new_parameters)
    if resume is not None:
        checkpoint.check(run, resume)
        run.reset()
    elif run.in_evaluation and not run.averaged.held():  # other weights were loaded: they win
        run.reset()
    per_epoch, fresh = steps_per_epoch(learn), resume is None and not run.started
    done = run.progress.step if resume is None else resume["progress"]["step"]
    if fresh:  # perhaps from a file that was saved without mosaic
        done = int(learn.epoch * (per_epoch or 0))
    left = None if per_epoch is None else int((learn.n_epoch - learn.epoch) * per_epoch)
    run.start(
        [bare(learn.opt)],
        total_steps=None if left is None else done + left,
        steps_per_epoch=None if per_epoch is None else max(1, int(per_epoch)),
    )
    if resume is not None:
        run.load_state_dict(resume)
    elif fresh:
        run.progress.step, run.progress.epoch = done, learn.epoch


def transform(run: Run, learn: Any, labels: bool) -> None:
    """Transform the Learner's micro-batch, on the device and outside autocast.

    Args:
        run: The run.
        learn: The Learner; MixedPrecision has entered autocast.
        labels: Whether the recipe touches labels.

    Raises:
        UnsupportedError: If the recipe touches labels and the loss takes other than one target.
    """
    if labels and len(learn.yb) != 1:
        raise UnsupportedError(
            "mosaic: the recipe touches labels, which needs one target that the loss compares, and"
            f" the batch has {len(learn.yb)}; take the algorithms that do out of the recipe"
        )
    inputs = len(learn.xb)
    kind = next(learn.model.parameters()).device.type
    entered = torch.is_autocast_enabled(kind)
    with torch.autocast(kind, enabled=False) if entered else contextlib.nullcontext():
        batch = run.on_batch((*learn.xb, *learn.yb))
    learn.xb, learn.yb = batch[:inputs], batch[inputs:]
