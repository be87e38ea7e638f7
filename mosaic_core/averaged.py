"""Putting averaged weights into the model for evaluation, and the training weights back."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["AveragedWeights"]


class AveragedWeights:
    """The two sets of weights of a run, one of which is in the model.

    It works on the fragments of ``run.parameters``, so sharded weights stay sharded.

    Args:
        run: The run, whose recipe says which weights to evaluate.

    Attributes:
        parked: The training weights by name while the model holds the averaged ones.
    """

    def __init__(self, run: "Run") -> None:
        self._run = run
        self._algorithms = [a for a in run.recipe if a.acts_at("evaluation_weights")]
        self.parked: dict[str, Tensor] | None = None

    @torch.no_grad()
    def enter(self) -> None:
        """Put the averaged weights into the model, if there are any."""
        if self.parked is not None:
            return
        for algorithm in self._algorithms:
            weights = algorithm.evaluation_weights(self._run)
            if weights is None:
                continue
            live = self._masters()
            saved = {name: live[name] for name in weights}
            if algorithm.replays():  # batch-norm statistics are about to be recomputed
                saved.update(self._run.model.named_buffers())
            self.parked = {name: tensor.detach().clone() for name, tensor in saved.items()}
            self.load(weights)
            algorithm.on_evaluation(self._run)

    def leave(self) -> None:
        """Put the training weights back."""
        if self.parked is not None:
            parked, self.parked = self.parked, None
            self.load(parked)

    def forget(self) -> None:
        """Take what the model holds for the training weights."""
        self.parked = None

    @torch.no_grad()
    def held(self) -> bool:
        """Tell whether the model holds the averaged weights to the last bit, on every rank."""
        live = self._masters()
        pairs = (
            (live[name], weight.to(live[name]))
            for algorithm in self._algorithms
            for name, weight in (algorithm.evaluation_weights(self._run) or {}).items()
        )
        differing = torch.zeros((), device=_device(live.values()))
        for weight, average in pairs:
            differing += (weight != average).any()
        return not self._run.parameters.all_reduce(differing)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy weights and buffers into the model by name, as this rank owns them."""
        live = {**dict(self._run.model.named_buffers()), **self._masters()}
        for name, tensor in tensors.items():
            live[name].copy_(tensor)
        self._run.parameters.publish()

    def _masters(self) -> dict[str, Tensor]:
        return {f.name: f.master for f in self._run.parameters.fragments()}


def _device(tensors: Iterable[Tensor]) -> torch.device | None:
    return next((tensor.device for tensor in tensors), None)
