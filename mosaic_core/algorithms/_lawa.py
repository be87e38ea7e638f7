"""LAWA: evaluate and keep the mean of the latest weights."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mosaic_core.algorithm import Card
from mosaic_core.weight_averaging import AverageState, WeightAveraging, precise

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["LAWA", "lawa_average"]


@torch.no_grad()
def lawa_average(
    snapshots: Sequence[Mapping[str, Tensor]], device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """Return the mean of several sets of weights: ``(w_1 + ... + w_k) / k`` for each name.

    Args:
        snapshots: Sets of weights by name, floating-point, such as ``dict(model.
            named_parameters())`` copied at different times; at least one.
        device: Where to compute it; None for where the first set lies.

    Returns:
        New tensors, of the names and shapes of each set, in float32 or better.

    Raises:
        ValueError: If there are none, or the names differ.
        TypeError: If a tensor holds integers, as the step counts of batch norms do.

    Example:
        >>> lawa_average([{"w": torch.tensor([1.0])}, {"w": torch.tensor([4.0])}])
        {'w': tensor([2.5000])}

    References:
        Kaddour, `Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest
        Weight Averaging <https://arxiv.org/abs/2209.14981>`_, 2022, section 2.
    """
    if not snapshots:
        raise ValueError("lawa_average: snapshots must hold at least one set of weights, got none")
    names = snapshots[0].keys()
    for snapshot in snapshots:
        if snapshot.keys() != names:
            differing = ", ".join(sorted(snapshot.keys() ^ names))
            raise ValueError(f"lawa_average: snapshots must have the same names, got {differing}")
    for name, weight in snapshots[0].items():
        if not (weight.is_floating_point() or weight.is_complex()):
            raise TypeError(
                f"lawa_average: snapshots must be floating-point, got {weight.dtype} for {name!r}"
            )
    if not names:  # a rank may own nothing
        return {}
    sums = [precise(weight.to(device or weight.device)) for weight in snapshots[0].values()]
    for snapshot in snapshots[1:]:
        weights = (snapshot[name] for name in names)
        torch._foreach_add_(sums, [w.to(s) for w, s in zip(weights, sums, strict=True)])
    torch._foreach_div_(sums, len(snapshots))
    return dict(zip(names, sums, strict=True))


@dataclass
class _State(AverageState):
    snapshots: deque[dict[str, Tensor]] = field(default_factory=deque)  # the newest last


@dataclass(frozen=True)
class LAWA(WeightAveraging):
    """Evaluate, and keep, the mean of the latest ``window`` weights.

    The weights are copied every ``update_interval``, each rank those it owns. While there are
    fewer than ``window`` copies, the mean is of these; it is computed when it is asked for, in
    float32 or better, so that no rounding adds up.

    Args:
        window: Number of copies to average, at least 1.
        update_interval: Whole number of ``ba`` or ``ep`` between copies.
        offload: Whether the copies are kept in the memory of the CPU, pinned where training is on
            a GPU, so that copying does not wait.
        recompute_batchnorm: Number of the latest training micro-batches that are kept, where the
            model has batch norms, and run through the averaged model before each evaluation to
            recompute its statistics; after resuming, of those since. 0 evaluates with the
            statistics of the training weights.

    Raises:
        ValueError: If a setting is out of range.
    """

    window: int = 5
    update_interval: str = "1ep"
    offload: bool = False
    recompute_batchnorm: int = 10

    excludes = frozenset({"EMA", "SWA", "trainer weight averaging"})
    card = Card(
        category="any",
        summary="Evaluates and saves the mean of the latest weights.",
        effect="A copy of the weights each update_interval, of which the latest window are kept,"
        " also in checkpoints. An evaluation first reads all of them, and with batch norms runs the"
        " model on the latest recompute_batchnorm micro-batches, which stay in memory. Evaluation,"
        " checkpoints and the weights left after training are the averaged ones; training goes on"
        " from its own.",
        use_when="To see earlier how good training will get, with a learning rate that is high or"
        " still to decay. EMA takes a fifth of the default's memory.",
        interactions="After resuming, the first evaluations recompute batch norm on the"
        " micro-batches since. Excludes other weight averaging.",
        reference="Kaddour 2022",
        url="https://arxiv.org/abs/2209.14981",
    )

    @classmethod
    def example(cls) -> "LAWA":
        """Return one that acts on the network of the contract suites."""
        return cls(window=3, update_interval="1ba")

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"LAWA: window must be at least 1, got {self.window}")

    def init_state(self, run: "Run") -> _State:
        """Begin without copies."""
        return _State()

    def update_average(self, run: "Run") -> None:
        """Copy the weights, into the place of the oldest copy where there are enough."""
        snapshots = run.state(self).snapshots
        weights = _weights(run)
        full = len(snapshots) == self.window
        copy = snapshots.popleft() if full else self._room_for(weights)
        _copy(copy.values(), weights.values())
        snapshots.append(copy)

    def evaluation_weights(self, run: "Run") -> dict[str, Tensor] | None:
        """Return the mean of the copies, computed where the weights are."""
        snapshots = self._complete(run)
        if not snapshots:
            return None
        device = next((weight.device for weight in _weights(run).values()), None)
        return lawa_average(snapshots, device)

    def state_dict(self, run: "Run") -> dict[str, Any]:
        """Return the copies."""
        return {**super().state_dict(run), "snapshots": self._complete(run)}

    def load_state_dict(self, state: dict[str, Any], run: "Run") -> None:
        """Take them from the checkpoint."""
        super().load_state_dict(state, run)
        own: _State = run.state(self)
        own.snapshots.clear()
        for snapshot in state["snapshots"]:
            copy = self._room_for(_weights(run))
            _copy(copy.values(), (snapshot[name] for name in copy))
            own.snapshots.append(copy)

    def _room_for(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.offload:
            return {name: torch.empty_like(weight) for name, weight in weights.items()}
        return {
            name: torch.empty_like(weight, device="cpu", pin_memory=weight.is_cuda)
            for name, weight in weights.items()
        }

    def _complete(self, run: "Run") -> list[dict[str, Tensor]]:
        """Return the copies, when those on their way to the CPU have arrived."""
        if self.offload and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return list(run.state(self).snapshots)


def _weights(run: "Run") -> dict[str, Tensor]:
    return {f.name: f.master.detach() for f in run.parameters.fragments()}


@torch.no_grad()
def _copy(into: Iterable[Tensor], weights: Iterable[Tensor]) -> None:
    into = list(into)
    if into:  # a rank may own nothing
        torch._foreach_copy_(into, list(weights), non_blocking=True)
