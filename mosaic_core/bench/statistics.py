"""Intervals and tests for few seeds: Student's t, the sign test, Holm, how many seeds it takes."""

import bisect
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "MOST_SEEDS",
    "Interval",
    "holm",
    "sample",
    "seeds_needed",
    "sign_test",
    "spread",
    "t_cdf",
    "t_interval",
    "t_quantile",
    "t_test",
]

MOST_SEEDS = 1000
"""Where :func:`seeds_needed` gives up."""

_NORMAL = NormalDist()


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its interval.

    Attributes:
        estimate: The estimate.
        low: Lower end; minus infinity where the data can't bound it.
        high: Upper end; infinity where the data can't bound it.
    """

    estimate: float
    low: float
    high: float

    def exp(self) -> "Interval":
        """Return the interval of the ratio whose logarithm this one is of."""
        return Interval(*(_exp(x) for x in (self.estimate, self.low, self.high)))

    def __add__(self, shift: float) -> "Interval":
        """Return the interval moved by a number."""
        return Interval(self.estimate + shift, self.low + shift, self.high + shift)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf  # math.exp would raise


# Student's t.


def t_cdf(t: float, df: int) -> float:
    r"""Return P(T <= t) of Student's t by its finite series, exact for whole degrees of freedom.

    With ``theta = atan(|t| / sqrt(df))``, P(\|T\| <= t) is ``sin theta (1 + 1/2 cos^2 theta +
    (1 3)/(2 4) cos^4 theta + ...)`` for even ``df`` and ``2/pi (theta + sin theta cos theta (1 +
    2/3 cos^2 theta + ...))`` for odd ``df``; the powers of the cosine end at ``df - 2`` or
    ``df - 3``.

    Args:
        t: Any number, or infinity.
        df: Degrees of freedom, at least 1.

    Returns:
        The probability, with an absolute error of about 1e-15.

    Raises:
        ValueError: If ``df`` is less than 1.

    References:
        Abramowitz and Stegun, `Handbook of Mathematical Functions
        <https://personal.math.ubc.ca/~cbm/aands/>`_, 1964, 26.7.3 and 26.7.4.
    """
    if df < 1:
        raise ValueError(f"t_cdf: df must be at least 1, got {df}")
    theta = math.atan2(abs(t), math.sqrt(df))
    sine, cosine = math.sin(theta), math.cos(theta)
    numerators = np.arange(1 + df % 2, df - 2, 2)
    series = 1 + float(np.cumprod(numerators / (numerators + 1) * cosine**2).sum())
    if df % 2 == 0:
        inside = sine * series
    else:
        inside = 2 / math.pi * (theta + (sine * cosine * series if df > 1 else 0))
    return 0.5 * (1 + math.copysign(inside, t))


@functools.cache  # the search for the number of seeds asks for the same ones again
def t_quantile(p: float, df: int) -> float:
    """Return the t at which P(T <= t) is p.

    Newton's method from the normal quantile: over t > 0 the distribution function is concave and
    lies below the normal one, so the steps rise to the root from its left and never pass it.

    Args:
        p: Probability, in (0, 1).
        df: Degrees of freedom, at least 1.

    Returns:
        The quantile; its relative error is below 1e-10 for p from 0.0001 to 0.9999.

    Raises:
        ValueError: If ``p`` is not in (0, 1) or ``df`` is less than 1.

    Example:
        >>> round(t_quantile(0.975, 11), 6)
        2.200985
    """
    if not 0 < p < 1:
        raise ValueError(f"t_quantile: p must be in (0, 1), got {p}")
    if df < 1:
        raise ValueError(f"t_quantile: df must be at least 1, got {df}")
    if p < 0.5:
        return -t_quantile(1 - p, df)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    t = _NORMAL.inv_cdf(p)
    for _ in range(100):  # as many as the heaviest tail needs, where a step doubles t
        density = scale * (1 + t * t / df) ** (-(df + 1) / 2)
        step = (p - t_cdf(t, df)) / density
        if step <= 1e-15 * t:
            break
        t += step
    return t


def spread(values: ArrayLike) -> float:
    """Return the standard deviation with divisor n - 1; NaN of fewer than two values."""
    x = np.asarray(values, np.float64)
    return float(x.std(ddof=1)) if len(x) > 1 else math.nan


def t_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Return the mean and its t interval: ``mean +- t((1 + level) / 2, n - 1) s / sqrt(n)``.

    Args:
        values: Shape ``(n,)``, at least one.
        level: Coverage of the interval, in (0, 1).

    Returns:
        Infinite ends for one value, which shows no spread, and for values that are not finite;
        the mean alone where all values are equal.

    References:
        Student, `The probable error of a mean <https://doi.org/10.1093/biomet/6.1.1>`_, 1908.
    """
    x = sample("t_interval", values)
    mean = float(x.mean())
    if len(x) == 1 or not np.isfinite(x).all():
        return Interval(mean, -math.inf, math.inf)
    half = t_quantile((1 + level) / 2, len(x) - 1) * spread(x) / math.sqrt(len(x))
    return Interval(mean, mean - half, mean + half)


def t_test(values: ArrayLike, mean: float = 0.0) -> float:
    """Return the two-sided p-value of Student's test that the values have this mean.

    Args:
        values: Shape ``(n,)``, at least one.
        mean: The mean of the hypothesis.

    Returns:
        The p-value. For values that are all equal it is 1 if they equal ``mean`` and else 0; for
        one value, or values that are not finite, it is 1: they show nothing.
    """
    x = sample("t_test", values)
    if len(x) == 1 or not np.isfinite(x).all():
        return 1.0
    error, off = spread(x) / math.sqrt(len(x)), float(x.mean()) - mean
    if error == 0:
        return float(off == 0)
    return 2 * (1 - t_cdf(abs(off) / error, len(x) - 1))


# Tests without a spread, and several of them.


def sign_test(wins: int, losses: int) -> float:
    """Return the exact two-sided p-value that wins and losses are equally likely.

    ``min(1, 2 P(X <= min(wins, losses)))`` with X binomial of ``wins + losses`` fair draws.

    Args:
        wins: Pairs that one side won.
        losses: Pairs that the other side won. Ties belong to neither and are left out.

    Returns:
        The p-value; 1 where no pair was decided.

    References:
        Dixon and Mood, `The statistical sign test
        <https://doi.org/10.1080/01621459.1946.10501898>`_, 1946.
    """
    decided = wins + losses
    tail = sum(math.comb(decided, k) for k in range(min(wins, losses) + 1))
    return min(1.0, float(2 * tail / 2**decided))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted so that the chance of any false positive among them keeps its level.

    The k-th smallest of m becomes the largest of ``(m - j + 1) p_j`` over j up to k, at most 1.

    Args:
        p_values: One for each hypothesis.

    Returns:
        The adjusted values, in the order given.

    References:
        Holm, `A simple sequentially rejective multiple test procedure
        <https://www.jstor.org/stable/4615733>`_, 1979.
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return [float(x) for x in np.minimum(adjusted, 1)]


def seeds_needed(
    effect: float, spread: float, level: float = 0.95, power: float = 0.8
) -> int | None:
    """Return how many seeds show an effect: ``(t_(1+level)/2 + t_power) s / sqrt(n) <= |effect|``.

    The least n for which a new study finds the effect with probability ``power``, if effect and
    spread are what they seem; the quantiles of t have n - 1 degrees of freedom, so n stands on both
    sides and is searched. With 1/2 for the power, half of such studies would miss.

    Args:
        effect: What is to be told from 0.
        spread: Standard deviation over the seeds.
        level: Coverage of the interval that shall leave out 0, in (0, 1).
        power: Probability that it does, in [0.5, 1).

    Returns:
        At least 2; None where more than ``MOST_SEEDS`` would be needed, or no number would do.

    References:
        Cohen, Statistical power analysis for the behavioral sciences, 1988, chapter 2.
    """
    if not (effect and math.isfinite(effect) and math.isfinite(spread)):
        return None

    def enough(n: int) -> bool:
        quantiles = t_quantile((1 + level) / 2, n - 1) + t_quantile(power, n - 1)
        return quantiles * spread <= math.sqrt(n) * abs(effect)

    sizes = range(2, MOST_SEEDS + 1)
    found = bisect.bisect_left(sizes, True, key=enough)
    return sizes[found] if found < len(sizes) else None


def sample(where: str, values: ArrayLike) -> NDArray[np.float64]:
    """Return values as float64 of shape ``(n,)``; ``where`` opens the message if they are not."""
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or not len(x):
        raise ValueError(f"{where}: values must have shape (n,) with n at least 1, got {x.shape}")
    return x
