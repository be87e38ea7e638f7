"""NoOp: acts at every point of a step and changes nothing."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mosaic_core.algorithm import Algorithm, Card, Place
from mosaic_core.batch import Batch

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["NoOp"]


@dataclass(frozen=True)
class NoOp(Algorithm):
    """Do nothing at every point of a step, to measure what the points themselves cost."""

    place = Place.MEASURING
    card = Card(
        category="any",
        summary="Acts at every point of a step and changes nothing.",
        effect="None on the weights; costs what being called costs.",
        use_when="To measure overhead, and as the control of a comparison.",
        interactions="None.",
        reference="-",
        url="",
    )

    def on_batch(self, batch: Batch, run: "Run") -> Batch:
        """Return the batch."""
        return batch

    def on_gradients(self, run: "Run") -> None:
        """Do nothing."""

    def on_step_end(self, run: "Run") -> None:
        """Do nothing."""
