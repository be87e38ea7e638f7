"""Running a model forward as if it had not been: buffers and random streams are put back."""

from types import TracebackType

import torch
from torch import Tensor, nn

__all__ = ["Untraced"]


class Untraced:
    """Keeps the buffers of a model and the global random streams, and puts them back.

    As a context manager it does both; where the end comes later, keep the object that was made at
    the beginning and call :meth:`restore`.

    Args:
        model: The model.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> with Untraced(norm):
        ...     _ = norm(torch.tensor([[1.0], [3.0]]))
        >>> norm.running_mean.item(), norm.num_batches_tracked.item()
        (0.0, 0)
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = [
            (module, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        self._streams = _streams()

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        for module, name, buffer, value in self._buffers:
            setattr(module, name, buffer.copy_(value))  # forward may have replaced it
        torch.set_rng_state(self._streams[0])
        for state in self._streams[1:]:
            torch.cuda.set_rng_state(state)

    def __enter__(self) -> "Untraced":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()


def _streams() -> list[Tensor]:
    """Return the state of the random stream of the CPU, and of the current GPU if one is used."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if cuda else [])]
