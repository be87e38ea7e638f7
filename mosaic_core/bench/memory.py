"""Peak memory of the tensors of a run."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["peak_memory"]


def peak_memory(function: Callable[[], object]) -> int:
    """Call a function and return how many bytes its tensors took at most at one time.

    On CUDA this is what the allocator counted. On the CPU, where the resident memory of a process
    says more about its allocator than about a small model, the results of all operations are
    counted while they live.

    Args:
        function: What to run; it should be short, as the count slows the CPU down.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    counter = _Counter()
    with counter:
        function()
    return counter.peak


class _Counter(TorchDispatchMode):
    """Counts the bytes of the storages made inside it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.live:
            self.live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            # The Python object of a storage lives as long as the storage itself.
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.live.pop(key)
