"""The second forward and backward pass of a step, for algorithms that take two."""

from typing import TYPE_CHECKING

import torch

from mosaic_core.algorithm import Algorithm, Need
from mosaic_core.untraced import Untraced

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["SecondPass"]


class SecondPass:
    """What happens around the second pass of a step.

    Between :meth:`begin` and :meth:`end` the caller runs the same transformed micro-batches forward
    and backward again. Batch-norm statistics and the like move once, and the global random streams
    as if there had been one pass.

    Args:
        run: The run.
    """

    def __init__(self, run: "Run") -> None:
        self._run = run
        self._algorithms = [a for a in run.recipe if Need.SECOND_PASS in a.needs()]
        self._acting: list[Algorithm] = []
        self._untraced: Untraced | None = None

    @property
    def due(self) -> list[Algorithm]:
        """The algorithms that take two passes in this step."""
        return [a for a in self._algorithms if a.second_pass_due(self._run)]

    @property
    def taken(self) -> bool:
        """Whether the recipe takes two passes at all, so forward may hold moved weights."""
        return bool(self._algorithms)

    def begin(self, scale: float = 1.0) -> None:
        """Let the algorithms act on the gradients of the window, and forget these.

        Args:
            scale: Factor a gradient scaler put on the loss; the algorithms see gradients without
                it, and those of the second pass still have it.
        """
        view = self._run.parameters
        if scale != 1:
            for fragment in view.fragments():
                grad = view.grad(fragment)
                if grad is not None:
                    view.set_grad(fragment, grad / scale)
        self._acting = self.due
        for algorithm in self._acting:
            algorithm.on_first_pass(self._run)
        view.publish()
        view.drop_grads()
        self._untraced = Untraced(self._run.model)

    @torch.no_grad()
    def end(self) -> None:
        """Put buffers and random streams back, and let the algorithms act on the new gradients."""
        if self._untraced is not None:
            self._untraced.restore()
        acting, self._acting, self._untraced = self._acting, [], None
        for algorithm in acting:
            algorithm.on_second_pass(self._run)
