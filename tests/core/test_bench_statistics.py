"""Intervals, tests and profiles of the bench, against SciPy and against their definitions."""

import math

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from mosaic_core.bench.bootstrap import bca_interval
from mosaic_core.bench.profiles import performance_profile, performance_ratios, profile_area
from mosaic_core.bench.statistics import (
    MOST_SEEDS,
    Interval,
    holm,
    seeds_needed,
    sign_test,
    spread,
    t_cdf,
    t_interval,
    t_quantile,
    t_test,
)

DEGREES = [*range(1, 35), 99, 100, 999, 1000, 20_001]


def mean(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x.mean(axis=-1)


def ratio(x: NDArray[np.float64], y: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    return np.asarray(x.mean(axis=axis) / y.mean(axis=axis))


def lognormal(n: int, seed: int, sigma: float = 1.0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).lognormal(0, sigma, n)


# Student's t.


@pytest.mark.parametrize("df", DEGREES)
def test_the_distribution_of_t_is_that_of_scipy(df: int) -> None:
    for t in (-40.0, -3.0, -1e-3, 0.0, 0.1, 0.7, 1.0, 2.2, 12.7, 300.0):
        assert t_cdf(t, df) == pytest.approx(scipy.stats.t.cdf(t, df), abs=1e-13)
    assert t_cdf(math.inf, df) == pytest.approx(1, abs=1e-15)
    assert t_cdf(-math.inf, df) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("df", DEGREES)
def test_the_quantile_of_t_is_that_of_scipy(df: int) -> None:
    for p in (1e-4, 0.005, 0.025, 0.3, 0.5, 0.51, 0.8, 0.95, 0.975, 0.995, 0.9999):
        assert t_quantile(p, df) == pytest.approx(scipy.stats.t.ppf(p, df), rel=1e-10, abs=1e-10)


def test_quantiles_of_t_have_closed_forms_for_one_and_two_degrees() -> None:
    assert t_quantile(0.975, 1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-12)
    assert t_quantile(0.975, 2) == pytest.approx(0.95 / math.sqrt(2 * 0.975 * 0.025), rel=1e-12)
    assert t_quantile(0.5, 7) == 0


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1, math.nan])
def test_a_quantile_needs_a_probability(p: float) -> None:
    with pytest.raises(ValueError, match=r"^t_quantile: p must be in \(0, 1\), got "):
        t_quantile(p, 3)


def test_there_is_at_least_one_degree_of_freedom() -> None:
    with pytest.raises(ValueError, match=r"^t_quantile: df must be at least 1, got 0"):
        t_quantile(0.9, 0)
    with pytest.raises(ValueError, match=r"^t_cdf: df must be at least 1, got -1"):
        t_cdf(1, -1)


@pytest.mark.parametrize("n", [2, 3, 12, 40])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_t_interval_and_its_test_are_those_of_scipy(n: int, level: float) -> None:
    x = np.random.default_rng(n).normal(0.3, 1, n)
    theirs = scipy.stats.ttest_1samp(x, 0.1)
    low, high = theirs.confidence_interval(level)
    ours = t_interval(x, level)
    assert (ours.estimate, ours.low, ours.high) == pytest.approx((x.mean(), low, high), rel=1e-10)
    assert t_test(x, 0.1) == pytest.approx(theirs.pvalue, abs=1e-13)
    assert spread(x) == pytest.approx(np.std(x, ddof=1))


def test_one_value_shows_no_spread() -> None:
    assert t_interval([0.5]) == Interval(0.5, -math.inf, math.inf)
    assert t_interval([0.5]).exp() == Interval(math.exp(0.5), 0, math.inf)
    assert math.isnan(spread([0.5]))
    assert t_test([0.5]) == 1


def test_equal_values_are_certain() -> None:
    assert t_interval([0.5, 0.5, 0.5]) == Interval(0.5, 0.5, 0.5)
    assert t_test([0.5, 0.5]) == 0
    assert t_test([0.5, 0.5], 0.5) == 1


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite_bound_nothing(bad: float) -> None:
    interval = t_interval([0.1, bad, 0.3])
    assert (interval.low, interval.high) == (-math.inf, math.inf)
    assert t_test([0.1, bad, 0.3]) == 1


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]]])
def test_values_have_one_axis(values: object) -> None:
    for function in (t_interval, t_test):
        with pytest.raises(
            ValueError, match=rf"^{function.__name__}: values must have shape \(n,\)"
        ):
            function(values)  # type: ignore[operator]  # both take values alone
    with pytest.raises(ValueError, match=r"^bca_interval: values must have shape \(n,\)"):
        bca_interval(mean, values)  # type: ignore[arg-type]  # a wrong one on purpose


# The bootstrap.


def test_the_bca_interval_is_that_of_scipy() -> None:
    x = lognormal(12, seed=5)
    theirs = scipy.stats.bootstrap((x,), np.mean, n_resamples=99_999, method="BCa", rng=1)
    ours = bca_interval(mean, x, resamples=99_999)
    low, high = theirs.confidence_interval
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.01)
    plain = scipy.stats.bootstrap((x,), np.mean, n_resamples=9999, method="percentile", rng=1)
    assert abs(plain.confidence_interval.high - high) > 0.05  # that test could fail


def test_pairs_are_resampled_together() -> None:
    a = lognormal(15, seed=1)
    b = a * lognormal(15, seed=2, sigma=0.2)
    ours = bca_interval(ratio, a, b, level=0.9)
    theirs = scipy.stats.bootstrap(
        (a, b),
        ratio,
        paired=True,
        confidence_level=0.9,
        rng=4,
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=0.03)


def test_a_ratio_that_never_varies_is_certain() -> None:
    a = lognormal(8, seed=3)
    interval = bca_interval(ratio, a, 4 * a)
    assert (interval.estimate, interval.low, interval.high) == (0.25, 0.25, 0.25)
    assert bca_interval(mean, [2.0, 2.0, 2.0]) == Interval(2, 2, 2)
    assert bca_interval(mean, [2.0]) == Interval(2, -math.inf, math.inf)


def test_the_bootstrap_depends_on_its_seed_alone() -> None:
    x = lognormal(12, seed=7)
    np.random.seed(0)
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr]  # the legacy tuple
    first = bca_interval(mean, x, seed=3)
    np.random.seed(1)
    assert bca_interval(mean, x, seed=3) == first
    assert bca_interval(mean, x, seed=4) != first
    np.random.seed(0)
    bca_interval(mean, x)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]  # as above


def test_a_statistic_beyond_all_resamples_has_an_interval() -> None:
    def odd(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(x.mean(axis=-1) + (9 if x.shape == (12,) else 0))

    interval = bca_interval(odd, lognormal(12, seed=1))
    assert math.isfinite(interval.low)
    assert interval.low <= interval.high


# Signs, several tests, and how many seeds.


@pytest.mark.parametrize(("wins", "losses"), [(0, 5), (6, 0), (10, 2), (4, 4), (7, 6), (600, 500)])
def test_the_sign_test_is_exact(wins: int, losses: int) -> None:
    theirs = scipy.stats.binomtest(wins, wins + losses).pvalue
    assert sign_test(wins, losses) == pytest.approx(theirs, rel=1e-10)


def test_the_sign_test_needs_decided_pairs() -> None:
    assert sign_test(0, 0) == 1
    assert sign_test(5, 0) == 0.0625
    assert sign_test(6, 0) == 0.03125
    assert sign_test(3, 3) == 1


def test_holm_multiplies_by_what_is_left() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2]) == [0.2]
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([0.02, 0.02, 0.02]) == pytest.approx([0.06, 0.06, 0.06])
    assert holm([]) == []


def test_holm_rejects_as_his_procedure_does() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.random(6) ** 3
        rejected = set()
        for k, i in enumerate(np.argsort(p)):  # step down until the first that stays
            if p[i] > 0.05 / (6 - k):
                break
            rejected.add(int(i))
        assert {i for i, adjusted in enumerate(holm(list(p))) if adjusted <= 0.05} == rejected


@pytest.mark.parametrize("effect", [-0.2, 0.05, 0.031])
@pytest.mark.parametrize("level", [0.95, 0.99])
def test_seeds_needed_is_the_least_number(effect: float, level: float) -> None:
    def reach(n: int) -> float:
        t = scipy.stats.t.ppf([(1 + level) / 2, 0.8], n - 1).sum()
        return float(t * 0.1 / math.sqrt(n))

    n = seeds_needed(effect, 0.1, level)
    assert n is not None
    assert reach(n) <= abs(effect) < reach(n - 1)


def test_so_many_seeds_find_the_effect_in_eight_of_ten_studies() -> None:
    n = seeds_needed(0.05, 0.06)
    assert n is not None
    x = np.random.default_rng(0).normal(0.05, 0.06, (4000, n))
    low = x.mean(1) - t_quantile(0.975, n - 1) * x.std(1, ddof=1) / math.sqrt(n)
    assert (low > 0).mean() == pytest.approx(0.8, abs=0.03)


def test_no_number_of_seeds_is_enough() -> None:
    assert seeds_needed(0.0, 0.1) is None
    assert seeds_needed(0.1, math.nan) is None
    assert seeds_needed(math.inf, 0.1) is None
    assert seeds_needed(0.001, 1.0) is None
    assert seeds_needed(0.1, 0.0) == 2
    assert seeds_needed(2.802 / math.sqrt(MOST_SEEDS) * 1.005, 1.0) is not None


# Profiles.


def test_performance_profile() -> None:
    times = [[1.0, 4.0, math.inf, math.inf], [2.0, 2.0, 3.0, math.inf]]
    ratios = performance_ratios(times)
    np.testing.assert_array_equal(ratios, [[1, 2, np.inf, np.inf], [2, 1, 1, np.inf]])
    profile = performance_profile(ratios, [0.9, 1, 1.9, 2, 100])
    np.testing.assert_array_equal(profile, [[0, 0.25, 0.25, 0.5, 0.5], [0, 0.5, 0.5, 0.75, 0.75]])
    # 1 of 4 earns everything, 1 of 4 earns (4 - 2) / (4 - 1).
    np.testing.assert_allclose(profile_area(ratios), [5 / 12, 8 / 12])


def test_the_area_is_that_under_the_profile() -> None:
    ratios = performance_ratios(lognormal(5 * 9, seed=2).reshape(5, 9))
    for tau_max in (1.5, 4.0):
        tau = np.linspace(1, tau_max, 200_001)
        middle = performance_profile(ratios, (tau[1:] + tau[:-1]) / 2)
        np.testing.assert_allclose(profile_area(ratios, tau_max), middle.mean(axis=1), atol=1e-4)


def test_the_best_on_every_workload_scores_1() -> None:
    assert profile_area(performance_ratios([[1.0, 2.0], [1.0, 9.0]])).tolist() == [1.0, 0.5]


@pytest.mark.parametrize("times", [[1.0, 2.0], [[]]])
def test_times_are_a_table(times: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^performance_ratios: times must have shape \(recipes, "):
        performance_ratios(times)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_times_are_positive(bad: float) -> None:
    with pytest.raises(ValueError, match=r"^performance_ratios: times must be positive, got "):
        performance_ratios([[1.0, bad]])


@pytest.mark.parametrize("tau_max", [1.0, 0.5, math.inf, math.nan])
def test_the_largest_ratio_is_above_1(tau_max: float) -> None:
    with pytest.raises(ValueError, match=r"^profile_area: tau_max must be finite and above 1"):
        profile_area([[1.0]], tau_max)


# What the intervals promise, in simulation.


def test_the_intervals_cover_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(11)
    repeats, n, hit = 1000, 12, {"t": 0, "bca": 0}
    for repeat in range(repeats):
        d = rng.normal(0.1, 0.05, n)  # logarithms of lognormal times
        t, bca = t_interval(d), bca_interval(mean, d, seed=repeat, resamples=1999)
        hit["t"] += t.low <= 0.1 <= t.high
        hit["bca"] += bca.low <= 0.1 <= bca.high
    assert hit["t"] / repeats == pytest.approx(0.95, abs=0.02)
    assert hit["bca"] / repeats == pytest.approx(0.91, abs=0.025)  # as its docstring warns
