"""The bootstrap of Efron, which draws from a generator that its own seed makes."""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mosaic_core.bench.statistics import Interval, sample

__all__ = ["bca_interval"]

_NORMAL = NormalDist()


def bca_interval(
    statistic: Callable[..., Any],
    *samples: ArrayLike,
    level: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """Return the bias-corrected and accelerated bootstrap interval of a statistic.

    Its ends are the quantiles ``Phi(z0 + (z0 + z) / (1 - a (z0 + z)))`` of the resampled statistic,
    ``z = Phi^-1((1 -+ level) / 2)``, where ``z0 = Phi^-1(share of resamples below the estimate)``,
    ties counted half, and ``a = sum(d^3) / (6 sum(d^2)^1.5)`` from the jackknife,
    ``d = mean(leave-one-out) - leave-one-out``.

    With few values it covers less than it says, 84 % for 95 % of five and 91 % of twelve, so t
    decides, and this interval shows what the skewness does.

    Args:
        statistic: Reduces the last axis of arrays like the samples, of shape ``(..., n)``.
        samples: Each of shape ``(n,)``; resampled together, so pairs stay pairs.
        level: Coverage aimed at, in (0, 1).
        resamples: Number of resamples.
        seed: Seed of the resamples; the same seed gives the same interval.

    Returns:
        Infinite ends for n = 1; the estimate alone where the statistic never varies.

    References:
        Efron, `Better bootstrap confidence intervals
        <https://doi.org/10.1080/01621459.1987.10478410>`_, 1987.
    """
    arrays = [sample("bca_interval", values) for values in samples]
    n = len(arrays[0])
    estimate = float(statistic(*arrays))
    if n == 1:
        return Interval(estimate, -math.inf, math.inf)
    index = np.random.default_rng(seed).integers(0, n, (resamples, n))
    resampled = np.asarray(statistic(*(x[index] for x in arrays)))
    others = np.nonzero(~np.eye(n, dtype=bool))[1].reshape(n, n - 1)
    left_out = np.asarray(statistic(*(x[others] for x in arrays)))
    d = left_out.mean() - left_out
    a = float((d**3).sum() / (6 * (d**2).sum() ** 1.5)) if d.any() else 0.0
    below = ((resampled < estimate).sum() + (resampled <= estimate).sum()) / 2
    # Kept off 0 and 1, where z0 is infinite.
    z0 = _NORMAL.inv_cdf(min(max(float(below), 0.5), resamples - 0.5) / resamples)
    z = np.array([z0 + _NORMAL.inv_cdf((1 + side * level) / 2) for side in (-1, 1)])
    shares = [_NORMAL.cdf(x) for x in z0 + z / (1 - a * z)]
    low, high = np.quantile(resampled, shares)
    return Interval(estimate, float(low), float(high))
