"""What algorithms share that evaluate with an average of the weights."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mosaic_core import batchnorm
from mosaic_core.algorithm import Algorithm, Place
from mosaic_core.progress import Duration

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = [
    "AverageState",
    "WeightAveraging",
    "move",
    "move_model",
    "precise",
    "restored",
    "to_save",
]


@dataclass
class AverageState:
    """Base of the states: the statistics that a checkpoint brought, for want of its batches."""

    statistics: dict[str, Tensor] = field(default_factory=dict, kw_only=True)


class WeightAveraging(Algorithm):
    """Base of algorithms that evaluate, and keep, an average of the weights.

    Every ``update_interval`` it calls :meth:`update_average`. Before an evaluation it recomputes
    batch-norm statistics on the latest micro-batches. A checkpoint holds no batches: it holds the
    statistics they gave, for an evaluation before training goes on.

    A subclass is a frozen dataclass with the two settings, and with a state made from
    :class:`AverageState`.
    """

    update_interval: Any
    recompute_batchnorm: int

    place = Place.WEIGHTS

    def __post_init__(self) -> None:
        """Check the settings."""
        interval = self.interval
        if interval.unit not in ("ba", "ep") or interval.value < 1 or interval.value % 1:
            raise ValueError(
                f"{self.name}: update_interval must be a whole number of ba or ep, got"
                f" {self.update_interval!r}"
            )
        if self.recompute_batchnorm < 0:
            raise ValueError(
                f"{self.name}: recompute_batchnorm must be at least 0, got"
                f" {self.recompute_batchnorm}"
            )

    def moment(self, setting: str) -> Duration:
        """Read a setting that names a time in the run.

        Raises:
            ValueError: If it does not.
        """
        text = getattr(self, setting)
        moment = Duration.parse(text, f"{self.name}: {setting}")
        if moment.unit not in ("ba", "ep", "dur"):  # samples are counted where batches are read
            raise ValueError(f"{self.name}: {setting} must be in ba, ep or dur, got {text}")
        return moment

    @property
    def interval(self) -> Duration:
        """Time between two updates."""
        return Duration.parse(self.update_interval, f"{self.name}: update_interval")

    def update_average(self, run: "Run") -> None:
        """Take the weights into the average; gradients are off."""
        raise NotImplementedError

    def on_step_end(self, run: "Run") -> None:
        """Update where the interval is in steps."""
        self._update("ba", run.progress.step, run)

    def on_epoch_end(self, run: "Run") -> None:
        """Update where the interval is in epochs."""
        self._update("ep", run.progress.epoch, run)

    @torch.no_grad()
    def _update(self, unit: str, done: int, run: "Run") -> None:
        interval = self.interval
        if interval.unit == unit and done % int(interval.value) == 0:
            self.update_average(run)

    def replays(self) -> int:
        """Keep batches where batch-norm statistics are recomputed."""
        return self.recompute_batchnorm

    def on_evaluation(self, run: "Run") -> None:
        """Give the batch norms the statistics of the averaged weights."""
        state: AverageState = run.state(self)
        if run.recent:
            batchnorm.recompute(run.model, run.recent, run.forward, run.frozen_norms)
        elif state.statistics:
            run.averaged.load(state.statistics)

    def state_dict(self, run: "Run") -> dict[str, Any]:
        """Return the statistics of the averaged weights, while these are in the model."""
        found = batchnorm.statistics(run.model)
        recomputed = run.in_evaluation and self.recompute_batchnorm
        return {"statistics": {n: b.clone() for n, b in found.items()} if recomputed else {}}

    def load_state_dict(self, state: dict[str, Any], run: "Run") -> None:
        """Take them from the checkpoint."""
        run.state(self).statistics = state["statistics"]


def move(averages: list[Tensor], weights: list[Tensor], share: float) -> None:
    """Move averages towards weights in place, ``average + share * (weight - average)``.

    It takes a few kernels for all of them; the weights may be less precise.
    """
    weights = [
        w if w.dtype == a.dtype else w.to(a.dtype) for a, w in zip(averages, weights, strict=True)
    ]
    if averages:  # a rank may own nothing
        torch._foreach_lerp_(averages, weights, share)


def move_model(where: str, model: nn.Module, average: nn.Module, share: float) -> None:
    """Do that with the parameters of two models; buffers are copied.

    Raises:
        ValueError: If the models differ; the message begins with ``where``.
    """
    weights, averages = dict(model.named_parameters()), dict(average.named_parameters())
    if weights.keys() != averages.keys():
        differing = ", ".join(sorted(weights.keys() ^ averages.keys()))
        raise ValueError(f"{where}: the models differ in the parameters {differing}")
    move(list(averages.values()), list(weights.values()), share)
    copies, buffers = list(average.buffers()), list(model.buffers())
    if len(copies) != len(buffers):
        raise ValueError(
            f"{where}: the models differ in their buffers, {len(buffers)} and {len(copies)}"
        )
    if buffers:
        torch._foreach_copy_(copies, buffers)


def precise(weight: Tensor) -> Tensor:
    """Copy a weight, to float32 where its precision is lower: an average moves by tiny steps."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.detach().to(dtype, copy=True)


def to_save(averages: dict[str, Tensor] | None, run: "Run") -> dict[str, Tensor] | None:
    """Return those averages that the model's own file does not hold to the last bit."""
    if averages is None or not run.in_evaluation:
        return averages
    live = dict(run.model.named_parameters())
    return {name: a for name, a in averages.items() if a.dtype != live[name].dtype}


def restored(saved: dict[str, Tensor] | None, run: "Run") -> dict[str, Tensor] | None:
    """Return the averages from a checkpoint and from the model that was saved averaged."""
    if saved is None:
        return None
    averages = {f.name: precise(f.master) for f in run.parameters.fragments()}
    for name, average in saved.items():
        averages[name].copy_(average)
    return averages
