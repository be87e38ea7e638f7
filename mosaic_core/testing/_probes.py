"""Algorithms that make an adapter's mistakes visible in the weights, where no real one does."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mosaic_core.algorithm import Algorithm, Card, Place
from mosaic_core.batch import Batch
from mosaic_core.norm import global_norm
from mosaic_core.progress import Duration

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["Clock", "Squash"]


def _card(summary: str) -> Card:
    return Card("any", summary, "None.", "In contract suites.", "None.", "-", "")


@dataclass(frozen=True)
class Squash(Algorithm):
    """Divide the gradients by one plus their norm.

    So it matters whether they are those of the whole window, unscaled and not yet clipped.
    """

    place = Place.GRADIENTS
    card = _card("Squashes the gradients.")

    @torch.no_grad()
    def on_gradients(self, run: "Run") -> None:
        """Change every gradient by the norm of all."""
        view = run.parameters
        pairs = [(f, g) for f in view.fragments() if (g := view.grad(f)) is not None]
        device = next(run.model.parameters()).device
        norm = global_norm([grad for _, grad in pairs], device, view.all_reduce)
        for fragment, grad in pairs:
            view.set_grad(fragment, grad / (1 + norm))


@dataclass(frozen=True)
class Clock(Algorithm):
    """Shrink inputs and weights by what the run tells of its progress.

    So it matters when steps and epochs end, and that the run knows how many there will be.
    """

    place = Place.WEIGHTS
    card = _card("Writes the time into the weights.")

    def on_batch(self, batch: Batch, run: "Run") -> Batch:
        """Make micro-batches of a window differ."""
        return batch.replace(batch.input * (1 - run.progress.micro_batch / 64))

    def on_step_end(self, run: "Run") -> None:
        """Note a step."""
        self._shrink(run, 1 - run.progress.fraction / 64)

    def on_epoch_end(self, run: "Run") -> None:
        """Note an epoch, and when it ended."""
        progress = run.progress
        late = progress.step / progress.steps(Duration(1, "ep"))
        self._shrink(run, 1 - (late + progress.epoch) / 64)

    @torch.no_grad()
    def _shrink(self, run: "Run", factor: float) -> None:
        for fragment in run.parameters.fragments():
            fragment.master.mul_(factor)
        run.parameters.publish()
