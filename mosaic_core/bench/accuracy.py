"""Whether a recipe keeps the final metric."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mosaic_core.bench.censoring import Outcome
from mosaic_core.bench.statistics import Interval, spread, t_interval, t_test

__all__ = ["Accuracy", "accuracy"]


@dataclass(frozen=True)
class Accuracy:
    """What the recipe does to the final metric.

    Attributes:
        gain: Mean over the pairs of what it adds, in units of the metric and positive for the
            better, with the t interval.
        delta: What may be lost.
        spread: Standard deviation of the gain over the pairs; NaN for one pair.
        p_value: Twice the one-sided p-value of a loss of ``delta`` or more.
    """

    gain: Interval
    delta: float
    spread: float
    p_value: float

    @property
    def non_inferior(self) -> bool:
        """Whether a loss of ``delta`` or more is ruled out."""
        return self.gain.low > -self.delta

    @property
    def inferior(self) -> bool:
        """Whether a loss of less than ``delta`` is ruled out."""
        return self.gain.high < -self.delta


def accuracy(
    baseline: Sequence[Outcome],
    recipe: Sequence[Outcome],
    *,
    delta: float,
    higher_is_better: bool = True,
    level: float = 0.95,
) -> Accuracy:
    """Test by paired differences whether the recipe's final metric is non-inferior.

    It is, if the lower end of the interval of the gain lies above ``-delta``: a one-sided test at
    ``(1 - level) / 2``, which is 2.5 %.

    Args:
        baseline: Shape ``(n,)``.
        recipe: The same seeds in the same order.
        delta: Loss that does not matter, in units of the metric, at least 0.
        higher_is_better: Whether good metrics are high.
        level: Coverage of the two-sided interval.

    Returns:
        The result; a final metric that is not finite leaves the interval without ends.

    Raises:
        ValueError: If ``delta`` is negative or not finite.

    References:
        Piaggio et al., `Reporting of noninferiority and equivalence randomized trials
        <https://doi.org/10.1001/jama.2012.87802>`_, 2012.
    """
    if not 0 <= delta < math.inf:
        raise ValueError(f"accuracy: delta must be finite and at least 0, got {delta}")
    a, b = (np.array([run.metric for run in arm]) for arm in (baseline, recipe))
    with np.errstate(invalid="ignore"):  # of infinite losses the difference is NaN
        gains = b - a if higher_is_better else a - b
        gain, deviation = t_interval(gains, level), spread(gains)
    two_sided = t_test(gains, -delta)
    return Accuracy(gain, delta, deviation, two_sided if gain.estimate > -delta else 1.0)
