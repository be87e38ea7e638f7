"""Time to target, also where a run misses it, and the speed-up that pairs of runs show.

A run that misses the target was watched until the end of its budget, and that is all it tells: the
time it would have needed is longer. Such a time is called censored.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mosaic_core.bench.bootstrap import bca_interval
from mosaic_core.bench.statistics import (
    Interval,
    sign_test,
    spread,
    t_interval,
    t_test,
)

__all__ = [
    "Outcome",
    "Quantity",
    "Speedup",
    "auto_target",
    "per_step_ratio",
    "restricted",
    "speedup",
    "time_to_target",
]

Quantity = Literal["seconds", "steps"]
"""What to compare of two runs."""


@dataclass(frozen=True)
class Outcome:
    """What one training gave in view of a target.

    Attributes:
        seconds: Time to the target, or to the end of the budget if it was missed; positive.
        steps: Optimizer steps to the same evaluation, positive.
        reached: Whether the target was reached.
        metric: Metric of the last evaluation.
    """

    seconds: float
    steps: float
    reached: bool
    metric: float

    def __post_init__(self) -> None:
        """Check that logarithms can be taken."""
        for name in ("seconds", "steps"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"Outcome: {name} must be finite and positive, got {value}")


def time_to_target(
    seconds: ArrayLike,
    steps: ArrayLike,
    metrics: ArrayLike,
    target: float,
    *,
    higher_is_better: bool = True,
) -> Outcome:
    """Return the first evaluation at which the target is reached, else the last one, censored.

    Evaluations count as they are: nothing is interpolated between two of them, so both arms of a
    pair need the same evaluation points.

    Args:
        seconds: Time before each evaluation, shape ``(n,)``, rising and positive.
        steps: Optimizer steps before each evaluation, shape ``(n,)``, rising and positive.
        metrics: Shape ``(n,)``; one that is NaN reaches nothing.
        target: Reached by a metric that is as good or better.
        higher_is_better: Whether good metrics are high.

    Raises:
        ValueError: If the shapes differ or are empty, or a clock does not rise from above 0.
    """
    t, k, m = (np.asarray(x, np.float64) for x in (seconds, steps, metrics))
    if t.ndim != 1 or not len(t) or not t.shape == k.shape == m.shape:
        raise ValueError(
            "time_to_target: seconds, steps and metrics must have one shape (n,) with n at least"
            f" 1, got {t.shape}, {k.shape} and {m.shape}"
        )
    for name, clock in (("seconds", t), ("steps", k)):
        if not (np.diff(clock, prepend=0) > 0).all():
            raise ValueError(f"time_to_target: {name} must rise from above 0, got {clock}")
    at = np.flatnonzero(m >= target if higher_is_better else m <= target)
    first = int(at[0]) if len(at) else -1
    return Outcome(float(t[first]), float(k[first]), bool(len(at)), float(m[-1]))


def auto_target(metrics: ArrayLike, *, higher_is_better: bool = True) -> float:
    """Return the median of the baseline's final metrics, to be fixed before a recipe is trained.

    Args:
        metrics: Final metric of each seed, shape ``(n,)``; NaN counts as the worst.
        higher_is_better: Whether good metrics are high.

    Raises:
        ValueError: If there is none, or the median is not finite: the baseline does not train.
    """
    worst = -np.inf if higher_is_better else np.inf
    m = np.asarray(metrics, np.float64)
    m = np.where(np.isnan(m), worst, m)
    if not len(m) or not np.isfinite(np.sort(m)[(len(m) - 1) // 2 : len(m) // 2 + 1]).all():
        raise ValueError(f"auto_target: metrics must have a finite median, got {m}")
    return float(np.median(m))


@dataclass(frozen=True)
class Speedup:
    """How many times faster the recipe is to the target than the baseline.

    Attributes:
        ratio: The speed-up with its t interval; above 1 where the recipe is faster.
        bca: The speed-up with its bootstrap interval.
        spread: Standard deviation over the pairs on the logarithmic scale; NaN for fewer than two.
        pairs: Number of pairs they are taken from.
        wins: Pairs in which the recipe was certainly first.
        losses: Pairs in which the baseline was certainly first.
        misses: Runs of the baseline, and of the recipe, that missed the target.
        p_value: Two-sided, of the ratio being 1.
        sign_p: That of the sign test of wins and losses.
    """

    ratio: Interval
    bca: Interval
    spread: float
    pairs: int
    wins: int
    losses: int
    misses: tuple[int, int]
    p_value: float
    sign_p: float


def restricted(
    baseline: Sequence[Outcome], recipe: Sequence[Outcome], quantity: Quantity = "seconds"
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the times of both arms, restricted in each pair to what was watched of both.

    A pair that reached the target twice keeps its times. If one run missed it, both times are cut
    at the end of that run's budget; if both did, at the earlier end, which makes a tie. So a
    censored pair keeps the sign of its true difference or becomes a tie, and never exaggerates:
    not even a recipe that misses the target after a budget of fewer seconds looks fast.

    Args:
        baseline: Shape ``(n,)``.
        recipe: The same seeds in the same order.
        quantity: ``"seconds"`` or ``"steps"``.

    Returns:
        Two new float64 arrays of shape ``(n,)``.

    Raises:
        ValueError: If the arms differ in length or are empty.
    """
    a, b = (_array(arm, quantity) for arm in _paired(baseline, recipe))
    reached_a, reached_b = (_reached(arm) for arm in (baseline, recipe))
    first = np.minimum(a, b)
    return np.where(reached_b, a, first), np.where(reached_a, b, first)


def speedup(
    baseline: Sequence[Outcome],
    recipe: Sequence[Outcome],
    *,
    quantity: Quantity = "seconds",
    level: float = 0.95,
    seed: int = 0,
) -> Speedup:
    """Return the speed-up that pairs of runs show.

    If every run reaches the target, ``D_i = log a_i - log b_i``, the speed-up is ``exp(mean D)``
    and its interval ``exp(mean D +- t((1 + level) / 2, n - 1) s / sqrt(n))``. The same holds if the
    same seeds miss it in both arms, as where the recipe leaves the weights alone: these pairs tell
    nothing and are left out. If no run reaches it, the speed-up is 1 with an interval from 0 to
    infinity.

    Else it is the ratio of the restricted mean times, ``mean(a) / mean(b)`` of
    :func:`restricted`, and the interval is that of its logarithm linearised, with
    ``a_i / mean(a) - b_i / mean(b)`` in the place of ``D_i - mean D``. The sign test stands beside
    it, exact whatever the distribution, but it takes six decided pairs to find anything at 5 %.

    Args:
        baseline: Shape ``(n,)``.
        recipe: The same seeds in the same order.
        quantity: What to compare, ``"seconds"`` or ``"steps"``.
        level: Coverage of the intervals.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If the arms differ in length or are empty.

    References:
        Royston and Parmar, `Restricted mean survival time
        <https://doi.org/10.1186/1471-2288-13-152>`_, 2013.
    """
    a, b = restricted(baseline, recipe, quantity)
    reached_a, reached_b = _reached(baseline), _reached(recipe)
    wins, losses = int((b < a).sum()), int((b > a).sum())
    if (reached_a != reached_b).any():
        estimate = float(_log_ratio(a, b))
        d = a / a.mean() - b / b.mean() + estimate  # its mean is the estimate
        bca = bca_interval(_log_ratio, a, b, level=level, seed=seed)
    else:
        d = np.log(a[reached_a]) - np.log(b[reached_a])
        bca = bca_interval(_mean, d, level=level, seed=seed) if len(d) else _UNKNOWN
    return Speedup(
        ratio=(t_interval(d, level) if len(d) else _UNKNOWN).exp(),
        bca=bca.exp(),
        spread=spread(d),
        pairs=len(d),
        wins=wins,
        losses=losses,
        misses=(int((~reached_a).sum()), int((~reached_b).sum())),
        p_value=t_test(d) if len(d) else 1.0,
        sign_p=sign_test(wins, losses),
    )


def per_step_ratio(baseline: Sequence[Outcome], recipe: Sequence[Outcome]) -> float:
    """Return how many times faster a step of the recipe is: the geometric mean over the pairs.

    If no run, or the same seeds in both arms, missed the target, the speed-up in steps times this
    is the speed-up in seconds, exactly: ``log(a_sec / b_sec) = log(a_steps / b_steps) +
    log((a_sec / a_steps) / (b_sec / b_steps))`` in every pair, hence in the mean. Otherwise a miss
    cuts times but not this, and the product differs.

    Raises:
        ValueError: If the arms differ in length or are empty.
    """
    a, b = (_array(arm, "seconds") / _array(arm, "steps") for arm in _paired(baseline, recipe))
    reached_a, reached_b = _reached(baseline), _reached(recipe)
    if reached_a.any() and not (reached_a != reached_b).any():  # the pairs speedup() takes
        a, b = a[reached_a], b[reached_a]
    return math.exp(np.mean(np.log(a) - np.log(b)))


_UNKNOWN = Interval(0.0, -math.inf, math.inf)


def _paired(*arms: Sequence[Outcome]) -> tuple[Sequence[Outcome], ...]:
    if not len(arms[0]) == len(arms[1]) > 0:
        raise ValueError(
            "speedup: baseline and recipe must have the same seeds, at least one,"
            f" got {len(arms[0])} and {len(arms[1])}"
        )
    return arms


def _array(arm: Sequence[Outcome], quantity: Quantity) -> NDArray[np.float64]:
    return np.array([getattr(run, quantity) for run in arm], np.float64)


def _reached(arm: Sequence[Outcome]) -> NDArray[np.bool_]:
    return np.array([run.reached for run in arm])


def _mean(x: NDArray[np.float64]) -> Any:
    return x.mean(axis=-1)


def _log_ratio(a: NDArray[np.float64], b: NDArray[np.float64]) -> Any:
    return np.log(a.mean(axis=-1) / b.mean(axis=-1))
