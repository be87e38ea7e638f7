"""SWA: evaluate and keep the mean of the weights near the end of training."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mosaic_core import batchnorm
from mosaic_core.algorithm import Card, Need
from mosaic_core.errors import UnsupportedError
from mosaic_core.progress import Progress
from mosaic_core.step_rates import StepRates
from mosaic_core.weight_averaging import (
    AverageState,
    WeightAveraging,
    move,
    move_model,
    precise,
    restored,
    to_save,
)

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["SWA", "average_weights", "update_batchnorm"]

_STRATEGIES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: t,
    "cos": lambda t: (1 - math.cos(math.pi * t)) / 2,
}


@torch.no_grad()
def average_weights(model: nn.Module, swa_model: nn.Module, n_averaged: int) -> None:
    """Take weights into a mean in place: ``swa = (n * swa + weights) / (n + 1)``.

    Parameters are averaged. Buffers are copied: batch-norm statistics are to be recomputed by
    :func:`update_batchnorm` when all weights are in.

    Args:
        model: The model in training.
        swa_model: A deep copy of it that holds the mean.
        n_averaged: Number ``n`` of weights that are in the mean, at least 0.

    Raises:
        ValueError: If ``n_averaged`` is out of range or the models differ.

    Example:
        >>> model, mean = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight), nn.init.zeros_(mean.weight)
        >>> average_weights(model, mean, n_averaged=3)
        >>> mean.weight.item()
        0.25

    References:
        Izmailov et al., `Averaging Weights Leads to Wider Optima and Better Generalization
        <https://arxiv.org/abs/1803.05407>`_, 2018, Algorithm 1.
    """
    if n_averaged < 0:
        raise ValueError(f"average_weights: n_averaged must be at least 0, got {n_averaged}")
    move_model("average_weights", model, swa_model, 1 / (n_averaged + 1))


def update_batchnorm(
    model: nn.Module, batches: Sequence[Any], forward: Callable[[Any], object] | None = None
) -> None:
    """Recompute the statistics of all batch norms, in place, as the mean over some batches.

    Everything else runs as in evaluation, and each module's mode is put back.

    Args:
        model: The model.
        batches: Batches to run it on, each of which counts the same; without any, the statistics
            stay.
        forward: Runs the model on one of them; None calls ``model(batch)``.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> update_batchnorm(norm, [torch.tensor([[1.0], [3.0]])])
        >>> norm.running_mean.item()
        2.0

    References:
        Izmailov et al., `Averaging Weights Leads to Wider Optima and Better Generalization
        <https://arxiv.org/abs/1803.05407>`_, 2018, section 3.2.
    """
    if len(batches):
        batchnorm.recompute(model, batches, forward)


@dataclass
class _State(AverageState):
    averages: dict[str, Tensor] | None = None  # None until the average has begun
    count: int = 0  # of the weights in it
    rates: list[float] = field(default_factory=list)  # of each group, when annealing began
    step_rates: StepRates = field(default_factory=StepRates)


@dataclass(frozen=True)
class SWA(WeightAveraging):
    """Evaluate, and keep, the mean of the weights from ``swa_start`` to ``swa_end``.

    The weights are taken every ``update_interval`` between the two, both included. The mean is
    held in float32 or better, and training goes on from its own weights to the end.

    Args:
        swa_start: Time at which averaging begins, in ``ba``, ``ep`` or ``dur``.
        swa_end: Time at which it ends, later than ``swa_start``.
        update_interval: Whole number of ``ba`` or ``ep`` between the weights that are averaged.
        schedule_swa_lr: Whether the learning rate goes to ``swa_lr`` once averaging has begun.
            Schedulers see their own all the time; only the optimizer's step sees the other.
        anneal_strategy: How it gets there, ``"linear"`` or ``"cos"``.
        anneal_steps: Number of update intervals that takes, at least 1.
        swa_lr: Learning rate to end with, at least 0; given with ``schedule_swa_lr``, and only
            then.
        recompute_batchnorm: Number of the latest training micro-batches that are kept, where the
            model has batch norms, and run through the averaged model before each evaluation to
            recompute its statistics; after resuming, of those since. 0 evaluates with the
            statistics of the training weights.

    Raises:
        ValueError: If a setting is out of range, or one that belongs to another is not given.
    """

    swa_start: str = "0.7dur"
    swa_end: str = "0.97dur"
    update_interval: str = "1ep"
    schedule_swa_lr: bool = False
    anneal_strategy: str = "linear"
    anneal_steps: int = 10
    swa_lr: float | None = None
    recompute_batchnorm: int = 10

    excludes = frozenset({"EMA", "LAWA", "trainer weight averaging"})
    card = Card(
        category="any",
        summary="Evaluates and saves the mean of the weights near the end of training.",
        effect="One more copy of the parameters. With batch norms, also the latest"
        " recompute_batchnorm micro-batches stay in memory, and an evaluation first runs the model"
        " on them. Once averaging has begun, evaluation, checkpoints and the weights left after"
        " training are the averaged ones; training goes on from its own.",
        use_when="Where the learning rate stays high to the end, or is kept so by schedule_swa_lr;"
        " in short runs with an update_interval in ba.",
        interactions="With schedule_swa_lr it overrides the trainer's schedule from swa_start on,"
        " in torch optimizers only. After resuming, the first evaluations recompute batch norm on"
        " the micro-batches since. Excludes other weight averaging.",
        reference="Izmailov et al. 2018",
        url="https://arxiv.org/abs/1803.05407",
    )

    @classmethod
    def example(cls) -> "SWA":
        """Return one that acts on the network of the contract suites."""
        return cls("0.1dur", "0.9dur", "1ba", True, "cos", anneal_steps=4, swa_lr=0.01)

    @classmethod
    def needs(cls) -> frozenset[Need]:
        """Need weights alone: it reads no gradient, and its hooks work on any torch optimizer."""
        return super().needs() - {Need.GRADIENTS, Need.OPTIMIZER}

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        start, end = self.moment("swa_start"), self.moment("swa_end")
        if start.unit == end.unit and not start.value < end.value:
            raise ValueError(
                f"SWA: swa_end must be later than swa_start, got {self.swa_start} to {self.swa_end}"
            )
        if self.anneal_strategy not in _STRATEGIES:
            raise ValueError(
                f"SWA: anneal_strategy must be one of {', '.join(_STRATEGIES)}, got"
                f" {self.anneal_strategy!r}"
            )
        if self.anneal_steps < 1:
            raise ValueError(f"SWA: anneal_steps must be at least 1, got {self.anneal_steps}")
        if (self.swa_lr is not None) != self.schedule_swa_lr:
            raise ValueError(
                "SWA: swa_lr must be given with schedule_swa_lr=True, and only then, got"
                f" {self.swa_lr}"
            )
        if self.swa_lr is not None and not self.swa_lr >= 0:
            raise ValueError(f"SWA: swa_lr must be at least 0, got {self.swa_lr}")

    def prepare_optimizer(self, optimizer: Optimizer, run: "Run") -> None:
        """Refuse an optimizer whose learning rate can't be set; look at the steps of others."""
        if not self.schedule_swa_lr:
            return
        groups = optimizer.param_groups if isinstance(optimizer, Optimizer) else [{}]
        if any(group.get("lr") is None for group in groups):
            raise UnsupportedError(
                "SWA: schedule_swa_lr needs a torch optimizer with a learning rate, got"
                f" {type(optimizer).__name__}; use another one, or leave schedule_swa_lr off"
            )
        if run.started:  # another optimizer, for training that goes on
            run.state(self).step_rates.watch(optimizer)

    def init_state(self, run: "Run") -> _State:
        """Begin without an average; a run in which it would not begin is refused here."""
        self._refuse_empty(run.progress)
        state = _State()
        if self.schedule_swa_lr:
            for optimizer in run.optimizers:
                state.step_rates.watch(optimizer)
        return state

    def _refuse_empty(self, progress: Progress) -> None:
        start, end, interval = self.moment("swa_start"), self.moment("swa_end"), self.interval
        progress.reached(start)  # raises where the run can't tell, as the next
        self._over(progress)
        if "ep" in (start.unit, end.unit, interval.unit) and not progress.steps_per_epoch:
            return
        every = progress.steps(interval)
        first = max(1, math.ceil(progress.steps(start) / every)) * every
        if first > progress.steps(end):
            raise ValueError(
                f"SWA: an update must lie between {self.swa_start} and {self.swa_end}, got"
                f" update_interval {self.update_interval}, whose first from there on is at"
                f" {first:g}ba; give a shorter one, such as '10ba', or a later swa_end"
            )

    def _over(self, progress: Progress) -> bool:
        end = self.moment("swa_end")
        if end.unit == "ep" and not end.value % 1:
            under_way = self.interval.unit == "ba"  # the epoch is counted after its last step
            return progress.epoch + under_way > end.value
        return progress.step > progress.steps(end)

    def update_average(self, run: "Run") -> None:
        """Take the weights into the mean, if it is time."""
        state: _State = run.state(self)
        if not run.progress.reached(self.moment("swa_start")) or self._over(run.progress):
            return
        fragments = run.parameters.fragments()
        if state.averages is None:
            state.averages = {f.name: precise(f.master) for f in fragments}
        else:
            masters = [f.master for f in fragments]
            move(list(state.averages.values()), masters, 1 / (state.count + 1))
        state.count += 1

    def on_gradients(self, run: "Run") -> None:
        """Let the optimizer's next step see the annealed learning rate."""
        state: _State = run.state(self)
        if not (self.schedule_swa_lr and state.count):
            return
        own = [group["lr"] for optimizer in run.optimizers for group in optimizer.param_groups]
        if len(state.rates) != len(own):
            state.rates = [float(rate) for rate in own]
        share = _STRATEGIES[self.anneal_strategy](min(1.0, state.count / self.anneal_steps))
        annealed = [(1 - share) * rate + share * (self.swa_lr or 0.0) for rate in state.rates]
        state.step_rates.set(run, annealed)
        run.log("SWA/lr", annealed[0])

    def on_step_end(self, run: "Run") -> None:
        """Leave the optimizer as it was, and update where the interval is in steps."""
        run.state(self).step_rates.clear()
        super().on_step_end(run)

    def evaluation_weights(self, run: "Run") -> dict[str, Tensor] | None:
        """Return the mean."""
        state: _State = run.state(self)
        return state.averages

    def state_dict(self, run: "Run") -> dict[str, Any]:
        """Return the mean, unless the model's own file holds it, and where annealing began."""
        state: _State = run.state(self)
        return {
            **super().state_dict(run),
            "averages": to_save(state.averages, run),
            "count": state.count,
            "rates": state.rates,
        }

    def load_state_dict(self, state: dict[str, Any], run: "Run") -> None:
        """Take the mean from the checkpoint, or from the model that was saved averaged."""
        super().load_state_dict(state, run)
        own: _State = run.state(self)
        own.averages, own.count = restored(state["averages"], run), state["count"]
        own.rates = list(state["rates"])
