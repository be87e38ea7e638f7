"""EMA: evaluate and keep an exponential moving average of the weights."""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mosaic_core.algorithm import Card
from mosaic_core.progress import Duration
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

__all__ = ["EMA", "compute_ema"]

_HALF_LIFE = "1000ba"


@torch.no_grad()
def compute_ema(model: nn.Module, ema_model: nn.Module, smoothing: float = 0.99) -> None:
    """Update an average in place: ``ema = smoothing * ema + (1 - smoothing) * weights``.

    Parameters are averaged. Buffers are copied: averaged batch-norm statistics belong to no
    network and cost accuracy.

    Args:
        model: The model in training.
        ema_model: A deep copy of it that holds the average.
        smoothing: Share of the old average, in [0, 1].

    Raises:
        ValueError: If ``smoothing`` is out of range or the models differ.

    Example:
        >>> model, average = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight), nn.init.zeros_(average.weight)
        >>> compute_ema(model, average, smoothing=0.75)
        >>> average.weight.item()
        0.25

    References:
        Polyak and Juditsky, `Acceleration of Stochastic Approximation by Averaging
        <https://doi.org/10.1137/0330046>`_, 1992; Tarvainen and Valpola, `Mean teachers
        <https://arxiv.org/abs/1703.01780>`_, 2017, Eq. 2.
    """
    _check_smoothing("compute_ema", smoothing)
    move_model("compute_ema", model, ema_model, 1 - smoothing)


def _check_smoothing(where: str, smoothing: float) -> None:
    if not 0 <= smoothing <= 1:
        raise ValueError(f"{where}: smoothing must be in [0, 1], got {smoothing}")


@dataclass
class _State(AverageState):
    averages: dict[str, Tensor] | None = None  # None until the average has begun
    smoothing: float | None = None  # None until the length of the run is needed


@dataclass(frozen=True)
class EMA(WeightAveraging):
    """Evaluate, and keep, an exponential moving average of the weights.

    Every ``update_interval`` the average becomes ``s * average + (1 - s) * weights`` with
    ``s = 2 ** (-update_interval / half_life)``. It begins as a copy of the weights after the first
    update point at which ``ema_start`` is reached, and is held in float32 or better.

    Args:
        half_life: Time after which a weight counts half, in ``ba``, ``ep`` or ``dur``.
        smoothing: ``s`` itself, in [0, 1), in place of ``half_life``.
        ema_start: Time at which averaging begins, in ``ba``, ``ep`` or ``dur``.
        update_interval: Whole number of ``ba`` or ``ep`` between updates; None for ``"1ep"`` where
            the half-life is in ``ep``, ``"1ba"`` otherwise.
        recompute_batchnorm: Number of the latest training micro-batches that are kept and run
            through the averaged model before each evaluation to recompute its batch-norm
            statistics; after resuming, of those since. 0 evaluates with the statistics of the
            training weights.

    Raises:
        ValueError: If a setting is out of range, or both half-life and smoothing are given.
    """

    half_life: str = _HALF_LIFE
    smoothing: float | None = None
    ema_start: str = "0.0dur"
    update_interval: str | None = None
    recompute_batchnorm: int = 0

    excludes = frozenset({"LAWA", "SWA", "trainer weight averaging"})
    card = Card(
        category="any",
        summary="Evaluates and saves an exponential moving average of the weights.",
        effect="One more copy of the parameters and a few fused kernels a step. Evaluation,"
        " checkpoints and the weights left after training are the averaged ones; training goes on"
        " from its own.",
        use_when="Nearly always with a learning rate that does not decay to zero; choose a"
        " half-life well below the length of the run.",
        interactions="Batch-norm statistics are those of the training weights unless"
        " recompute_batchnorm is set, which keeps micro-batches in memory; after resuming, the"
        " first evaluations recompute them on those since. Excludes other weight averaging.",
        reference="Polyak and Juditsky 1992",
        url="https://doi.org/10.1137/0330046",
    )

    @classmethod
    def example(cls) -> "EMA":
        """Return one that acts on the network of the contract suites."""
        return cls("4ba")

    def __post_init__(self) -> None:
        """Check the settings."""
        half_life = Duration.parse(self.half_life, "EMA: half_life")
        super().__post_init__()
        self.moment("ema_start")
        if self.smoothing is not None:
            if not 0 <= self.smoothing < 1:
                raise ValueError(f"EMA: smoothing must be in [0, 1), got {self.smoothing}")
            if self.half_life != _HALF_LIFE:
                raise ValueError("EMA: half_life and smoothing say the same thing; give one")
        if half_life.unit not in ("ba", "ep", "dur") or not half_life.value > 0:
            raise ValueError(f"EMA: half_life must be above 0 ba, ep or dur, got {self.half_life}")

    @property
    def interval(self) -> Duration:
        """Time between two updates."""
        unit = "ep" if self.smoothing is None and self.half_life.endswith("ep") else "ba"
        return Duration.parse(self.update_interval or f"1{unit}", "EMA: update_interval")

    def init_state(self, run: "Run") -> _State:
        """Begin without an average; durations that this run can't tell are refused here."""
        self._resolve(run)
        run.progress.reached(self.moment("ema_start"))
        half_life, total = Duration.parse(self.half_life), run.progress.total_steps
        known = half_life.unit != "ep" or run.progress.steps_per_epoch
        if self.smoothing is None and total and known and run.progress.steps(half_life) > total:
            warnings.warn(
                f"EMA: half_life {self.half_life} is longer than the run of {total} steps, so the"
                " average stays near the first weights; choose one well below, such as '0.05dur'",
                stacklevel=2,
            )
        return _State()

    def update_average(self, run: "Run") -> None:
        """Move the average towards the weights, or begin with a copy of them."""
        state: _State = run.state(self)
        fragments = run.parameters.fragments()
        if state.averages is not None:
            weights = [fragment.master for fragment in fragments]
            move(list(state.averages.values()), weights, 1 - (state.smoothing or 0.0))
        elif run.progress.reached(self.moment("ema_start")):
            state.smoothing = self._resolve(run)
            run.log("EMA/smoothing", state.smoothing)
            state.averages = {f.name: precise(f.master) for f in fragments}

    def _resolve(self, run: "Run") -> float:
        if self.smoothing is not None:
            return self.smoothing
        interval, half_life = self.interval, Duration.parse(self.half_life)
        if interval.unit == half_life.unit:
            return float(2 ** (-interval.value / half_life.value))
        return float(2 ** (-run.progress.steps(interval) / run.progress.steps(half_life)))

    def evaluation_weights(self, run: "Run") -> dict[str, Tensor] | None:
        """Return the average."""
        state: _State = run.state(self)
        return state.averages

    def state_dict(self, run: "Run") -> dict[str, Any]:
        """Return the average, unless the model's own file holds it to the last bit."""
        state: _State = run.state(self)
        return {
            **super().state_dict(run),
            "smoothing": state.smoothing,
            "averages": to_save(state.averages, run),
        }

    def load_state_dict(self, state: dict[str, Any], run: "Run") -> None:
        """Take the average from the checkpoint, or from the model that was saved averaged."""
        super().load_state_dict(state, run)
        own: _State = run.state(self)
        own.smoothing, own.averages = state["smoothing"], restored(state["averages"], run)
