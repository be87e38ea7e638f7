"""fastai's own functions, for ``mosaic bench kernels`` to compare with."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from fastai.callback.mixup import CutMix, MixUp
from fastai.losses import LabelSmoothingCrossEntropy

__all__ = ["peers"]


def peers(task: str, *arguments: Any) -> Callable[[], Any] | None:
    """Return what does a task of :mod:`mosaic_core.bench.kernels`, or None."""
    first, labels = arguments
    if task == "LabelSmoothing":
        loss = LabelSmoothingCrossEntropy(0.1)
        return lambda: torch.autograd.grad(loss(first, labels), first)
    if task not in ("MixUp", "CutMix"):
        return None
    callback = MixUp(0.2) if task == "MixUp" else CutMix(1.0)
    callback.stack_y = True  # as with a loss of class indices
    # All that these callbacks ask of a Learner; CutMix writes into its input.
    learn = SimpleNamespace(x=first.clone(), y=labels, training=True)
    callback.learn = learn

    def mix() -> Any:
        learn.xb, learn.yb = (learn.x,), (labels,)
        callback.before_batch()
        return learn.xb

    return mix
