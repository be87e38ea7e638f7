"""The second forward and backward pass of a step, for algorithms that take two."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mosaic_core.algorithm import Algorithm, Need

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
        self._buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        self._streams: list[Tensor] = []

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
        self._buffers = [
            (module, name, buffer, buffer.clone())
            for module in self._run.model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        self._streams = _streams()

    @torch.no_grad()
    def end(self) -> None:
        """Put buffers and random streams back, and let the algorithms act on the new gradients."""
        for module, name, buffer, value in self._buffers:
            setattr(module, name, buffer.copy_(value))  # forward may have replaced it
        if self._streams:
            torch.set_rng_state(self._streams[0])
            for state in self._streams[1:]:
                torch.cuda.set_rng_state(state)
        acting, self._acting = self._acting, []
        self._buffers, self._streams = [], []
        for algorithm in acting:
            algorithm.on_second_pass(self._run)


def _streams() -> list[Tensor]:
    """Return the state of the random stream of the CPU, and of the current GPU if one is used."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if cuda else [])]
