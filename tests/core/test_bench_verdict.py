"""From evaluations to a verdict, and the negative controls that the bench must pass."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from mosaic_core.bench.accuracy import accuracy
from mosaic_core.bench.censoring import (
    Outcome,
    auto_target,
    per_step_ratio,
    restricted,
    speedup,
    time_to_target,
)
from mosaic_core.bench.statistics import Interval, seeds_needed, sign_test, t_interval, t_quantile
from mosaic_core.bench.verdict import Verdict, judge, judge_all

Array = NDArray[np.float64]


def runs(
    seconds: Sequence[float] | Array,
    *,
    steps: Sequence[float] | Array | None = None,
    reached: Sequence[bool] | None = None,
    metrics: Sequence[float] | Array | float = 0.91,
) -> list[Outcome]:
    n = len(seconds)
    return [
        Outcome(float(t), float(k), bool(r), float(m))
        for t, k, r, m in zip(
            seconds,
            np.full(n, 100.0) if steps is None else steps,
            [True] * n if reached is None else reached,
            np.broadcast_to(metrics, n),
            strict=True,
        )
    ]


# Time to target.


def test_the_target_is_reached_at_the_first_evaluation_that_is_as_good() -> None:
    clock = {"seconds": [1.5, 3.0, 4.5, 6.0], "steps": [10, 20, 30, 40]}
    metrics = [0.5, 0.9, 0.8, 0.95]
    assert time_to_target(**clock, metrics=metrics, target=0.9) == Outcome(3.0, 20, True, 0.95)
    assert time_to_target(**clock, metrics=metrics, target=0.4) == Outcome(1.5, 10, True, 0.95)
    assert time_to_target(**clock, metrics=metrics, target=0.96) == Outcome(6.0, 40, False, 0.95)


def test_a_low_metric_may_be_the_better() -> None:
    clock = {"seconds": [1.0, 2.0, 3.0], "steps": [1, 2, 3]}
    losses = [2.0, 1.0, 1.5]
    found = time_to_target(**clock, metrics=losses, target=1.0, higher_is_better=False)
    assert found == Outcome(2.0, 2, True, 1.5)
    missed = time_to_target(**clock, metrics=losses, target=0.9, higher_is_better=False)
    assert missed == Outcome(3.0, 3, False, 1.5)


@pytest.mark.parametrize("higher", [True, False])
def test_nan_reaches_nothing(higher: bool) -> None:
    found = time_to_target([1.0, 2], [1, 2], [math.nan] * 2, 0.5, higher_is_better=higher)
    assert (found.seconds, found.reached) == (2.0, False)


def test_shapes_and_clocks_are_checked() -> None:
    with pytest.raises(ValueError, match=r"must have one shape \(n,\).* got \(1,\), \(2,\) and"):
        time_to_target([1.0], [1, 2], [0.5, 0.6], 0.5)
    with pytest.raises(ValueError, match=r"^time_to_target: seconds, steps and metrics must"):
        time_to_target([], [], [], 0.5)
    with pytest.raises(ValueError, match=r"^time_to_target: seconds must rise from above 0"):
        time_to_target([2.0, 1.0], [1, 2], [0.5, 0.6], 0.5)
    with pytest.raises(ValueError, match=r"^time_to_target: steps must rise from above 0"):
        time_to_target([1.0, 2.0], [0, 2], [0.5, 0.6], 0.5)
    with pytest.raises(ValueError, match=r"^Outcome: seconds must be finite and positive, got 0"):
        Outcome(0.0, 1, True, 0.5)
    with pytest.raises(ValueError, match=r"^Outcome: steps must be finite and positive, got inf"):
        Outcome(1.0, math.inf, True, 0.5)


def test_the_auto_target_is_the_median() -> None:
    assert auto_target([0.9, 0.7, 0.8]) == 0.8
    assert auto_target([0.75, 0.5]) == 0.625
    assert auto_target([0.9, math.nan, 0.8]) == 0.8  # the worst of three
    assert auto_target([1.0, math.nan, 2.0], higher_is_better=False) == 2.0
    assert auto_target([0.5]) == 0.5


@pytest.mark.parametrize("metrics", [[], [math.nan], [0.5, math.nan], [math.nan, math.nan, 1]])
def test_a_baseline_that_does_not_train_sets_no_target(metrics: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^auto_target: metrics must have a finite median, got "):
        auto_target(metrics)


# Speed-up.


def test_the_speedup_is_the_geometric_mean_of_the_ratios() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.lognormal(3, 0.3, 9), rng.lognormal(2.8, 0.3, 9)
    found = speedup(runs(a), runs(b))
    d = np.log(a / b)
    half = t_quantile(0.975, 8) * d.std(ddof=1) / 3
    expected = np.exp([d.mean(), d.mean() - half, d.mean() + half])
    np.testing.assert_allclose(dataclasses.astuple(found.ratio), expected, rtol=1e-12)
    assert found.spread == pytest.approx(d.std(ddof=1))
    assert (found.pairs, found.wins, found.losses) == (9, (d > 0).sum(), (d < 0).sum())
    assert found.misses == (0, 0)
    assert found.bca.estimate == pytest.approx(found.ratio.estimate)
    assert found.sign_p == sign_test(found.wins, found.losses)


@pytest.mark.parametrize("missing", ["nobody", "both", "baseline", "either"])
def test_swapping_the_arms_inverts_the_speedup(missing: str) -> None:
    rng = np.random.default_rng(1)
    both = rng.random(10) < 0.6
    one = rng.random(10) < 0.6
    everybody = np.ones(10, bool)
    left, right = {
        "nobody": (everybody, everybody),
        "both": (both, both),
        "baseline": (one, everybody),
        "either": (both, one),
    }[missing]
    a = runs(rng.lognormal(3, 0.3, 10), reached=left)
    b = runs(rng.lognormal(2.8, 0.3, 10), reached=right)
    there, back = speedup(a, b), speedup(b, a)
    assert back.ratio.estimate == pytest.approx(1 / there.ratio.estimate)
    assert back.ratio.low == pytest.approx(1 / there.ratio.high)
    assert (back.wins, back.losses, back.misses) == (there.losses, there.wins, there.misses[::-1])
    assert back.p_value == pytest.approx(there.p_value)


def test_a_restricted_pair_never_exaggerates() -> None:
    rng = np.random.default_rng(2)
    true = rng.lognormal(0, 1, (2, 500))
    budget = rng.lognormal(0, 1, (2, 500))
    arms = [
        runs(np.minimum(t, c), reached=t <= c, steps=np.ones(500))
        for t, c in zip(true, budget, strict=True)
    ]
    a, b = restricted(*arms)
    d, d_true = np.log(a / b), np.log(true[0] / true[1])
    kinds = Counter((x.reached, y.reached) for x, y in zip(*arms, strict=True))
    assert min(kinds.values()) > 50
    assert (d * d_true >= 0).all()
    assert (abs(d) <= abs(d_true) + 1e-12).all()
    both = np.array([x.reached and y.reached for x, y in zip(*arms, strict=True)])
    np.testing.assert_allclose(d[both], d_true[both])
    neither = np.array([not (x.reached or y.reached) for x, y in zip(*arms, strict=True)])
    assert (d[neither] == 0).all()


def test_a_miss_after_a_short_budget_is_not_fast() -> None:
    a = runs([9.0] * 8)
    b = runs([5.0] * 8, reached=[False] * 8)  # half the seconds a step, and never there
    found = speedup(a, b)
    assert found.ratio == Interval(1, 1, 1)
    assert (found.wins, found.losses, found.sign_p) == (0, 0, 1)
    assert judge(a, b, target="91 %", delta=0.01).finding == "cannot tell"


def test_misses_on_one_side_give_the_ratio_of_restricted_means() -> None:
    a = runs([8.0, 10.0, 10.0], reached=[True, False, False])
    b = runs([4.0, 6.0, 10.0], reached=[True, True, False])
    found = speedup(a, b)
    assert found.ratio.estimate == pytest.approx(28 / 20)
    influence = np.array([8, 10, 10]) / (28 / 3) - np.array([4, 6, 10]) / (20 / 3)
    half = t_quantile(0.975, 2) * influence.std(ddof=1) / math.sqrt(3)
    assert math.log(found.ratio.high / found.ratio.estimate) == pytest.approx(half)
    assert (found.wins, found.losses, found.misses, found.pairs) == (2, 0, (2, 1), 3)
    assert found.sign_p == 0.5


def test_pairs_that_both_missed_tell_nothing() -> None:
    reached = [True, True, True, False, False]
    a = runs([4.0, 5.0, 6.0, 10.0, 10.0], reached=reached, steps=[40, 50, 60, 100, 100])
    b = runs([4.4, 5.4, 6.5, 11.0, 11.0], reached=reached, steps=[40, 50, 60, 100, 100])
    found = speedup(a, b)
    assert found.ratio == speedup(a[:3], b[:3]).ratio
    assert (found.pairs, found.misses) == (3, (2, 2))
    assert speedup(a, b, quantity="steps").ratio == Interval(1, 1, 1)
    assert per_step_ratio(a, b) == pytest.approx(found.ratio.estimate, rel=1e-14)


def test_nobody_reaches_the_target() -> None:
    a, b = runs([9.0] * 4, reached=[False] * 4), runs([10.0] * 4, reached=[False] * 4)
    found = speedup(a, b)
    assert found.ratio == found.bca == Interval(1, 0, math.inf)
    assert (found.pairs, found.p_value, found.sign_p) == (0, 1, 1)
    verdict = judge(a, b, target="91.0 %", delta=0.01)
    assert (verdict.finding, verdict.more_seeds) == ("cannot tell", None)
    assert str(verdict) == ("cannot tell, no run reached 91.0 %, 4 seeds; 0.90x in time per step")


def test_one_pair_has_no_interval() -> None:
    found = speedup(runs([4.0]), runs([2.0]))
    assert found.ratio == found.bca == Interval(pytest.approx(2), 0, math.inf)
    assert math.isnan(found.spread)
    assert found.p_value == 1
    verdict = judge(runs([4.0]), runs([2.0]), target="91.0 %", delta=0.01)
    assert (verdict.finding, verdict.more_seeds) == ("cannot tell", 1)
    assert str(verdict) == (
        "cannot tell, at least 1 more seed needed: x2.00 to 91.0 %, no interval, 1 seed;"
        " 1.00x in steps, 2.00x in time per step; final metric +0"
    )


def test_equal_times_are_certain() -> None:
    same = judge(runs([2.0] * 3), runs([2.0] * 3), target="91 %", delta=0.01)
    assert same.seconds.ratio == same.seconds.bca == Interval(1, 1, 1)
    assert (same.finding, same.more_seeds) == ("cannot tell", None)
    half = judge(runs([4.0] * 3), runs([2.0] * 3), target="91 %", delta=0.01)
    assert half.seconds.ratio == Interval(*[pytest.approx(2)] * 3)
    assert (half.finding, half.p_value) == ("faster", 0)


def test_arms_have_the_same_seeds() -> None:
    for function in (speedup, per_step_ratio, restricted):
        with pytest.raises(ValueError, match=r"^speedup: baseline and recipe must .*got 2 and 1$"):
            function(runs([1.0, 2.0]), runs([1.0]))
        with pytest.raises(ValueError, match=r"at least one, got 0 and 0$"):
            function([], [])


def test_steps_times_time_per_step_is_time() -> None:
    rng = np.random.default_rng(3)
    a, b = (runs(rng.lognormal(3, 0.5, 11), steps=rng.integers(1, 900, 11)) for _ in range(2))
    product = speedup(a, b, quantity="steps").ratio.estimate * per_step_ratio(a, b)
    assert product == pytest.approx(speedup(a, b).ratio.estimate, rel=1e-14)


# The final metric.


def test_a_small_loss_is_non_inferior_and_a_large_one_inferior() -> None:
    noise = np.array([-0.001, 0.0, 0.001, 0.0])
    base = runs([1.0] * 4, metrics=0.9)

    def after(change: float, **options: bool) -> tuple[bool, bool]:
        found = accuracy(base, runs([1.0] * 4, metrics=0.9 + change + noise), delta=0.01, **options)
        return found.non_inferior, found.inferior

    assert after(-0.005) == (True, False)
    assert after(+0.05) == (True, False)
    assert after(-0.0095) == (False, False)
    assert after(-0.03) == (False, True)
    assert after(+0.03, higher_is_better=False) == (False, True)
    assert after(-0.03, higher_is_better=False) == (True, False)


def test_the_test_of_the_metric_is_one_sided() -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        a, b = rng.normal(0.9, 0.01, (2, 8))
        found = accuracy(runs([1.0] * 8, metrics=a), runs([1.0] * 8, metrics=b), delta=0.008)
        assert found.gain == t_interval(b - a)
        assert (found.p_value < 0.05) == found.non_inferior
        assert (found.p_value == 1) == (found.gain.estimate <= -0.008)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_decides_nothing(bad: float) -> None:
    a, b = runs([2.0] * 3, metrics=[0.9, bad, 0.9]), runs([1.0] * 3, metrics=[0.9, bad, 0.9])
    found = accuracy(a, b, delta=0.01)
    assert (found.non_inferior, found.inferior) == (False, False)
    verdict = judge(a, b, target="90 %", delta=0.01)
    assert (verdict.finding, verdict.more_seeds) == ("cannot tell", None)
    assert "1000 seeds would not be enough" in str(verdict)


@pytest.mark.parametrize("delta", [-0.1, math.inf, math.nan])
def test_delta_is_a_loss(delta: float) -> None:
    with pytest.raises(ValueError, match=r"^accuracy: delta must be finite and at least 0, got "):
        judge(runs([1.0, 2.0]), runs([1.0, 2.0]), target="91 %", delta=delta)


# Verdicts.


def example(ratio: float, gain: float, n: int = 12, spread: float = 0.05) -> Verdict:
    """Compare arms whose logarithmic ratios have exactly this mean and spread."""
    z = np.random.default_rng(5).standard_normal((2, n))
    z = (z - z.mean(1, keepdims=True)) / z.std(1, ddof=1, keepdims=True)
    a, steps = np.full(n, 100.0), np.full(n, 1000)
    b = a / ratio * np.exp(spread * z[0])
    return judge(
        runs(a, steps=steps, metrics=0.91),
        runs(b, steps=np.full(n, 800), metrics=0.91 + gain + 0.003 * z[1]),
        target="91.0 %",
        delta=0.005,
    )


def test_faster() -> None:
    verdict = example(1.32, 0.0)
    assert (verdict.finding, verdict.more_seeds) == ("faster", 0)
    assert str(verdict) == (
        "x1.32 faster to 91.0 %, 95 % interval [1.28, 1.36], 12 seeds;"
        " 1.25x in steps, 1.06x in time per step"
    )


def test_faster_has_the_p_value_of_its_weaker_half() -> None:
    for ratio in (1.02, 1.032, 1.035, 1.32):
        for gain in (0.0, -0.002, -0.003, -0.0031, -0.0035):
            verdict = example(ratio, gain)
            assert verdict.p_value == max(verdict.seconds.p_value, verdict.accuracy.p_value)
            assert (verdict.p_value <= 0.05) == (verdict.finding == "faster")
    slower = example(0.9, -0.004)
    assert slower.p_value == slower.seconds.p_value < slower.accuracy.p_value


def test_an_end_near_1_shows_its_side() -> None:
    assert str(example(1.0327, 0.0)).startswith(
        "x1.03 faster to 91.0 %, 95 % interval [1.0004, 1.0660], 12 seeds;"
    )


def test_slower_whatever_the_metric() -> None:
    verdict = example(0.9, -0.05)
    assert (verdict.finding, verdict.more_seeds) == ("slower", 0)
    assert str(verdict).startswith("slower, x0.90 to 91.0 %, 95 % interval [0.87, 0.93], 12 seeds;")
    assert example(0.9, +0.05).finding == "slower"


@pytest.mark.parametrize("ratio", [1.0, 1.32])
def test_less_accurate(ratio: float) -> None:
    verdict = example(ratio, -0.02)
    assert verdict.finding == "less accurate"
    text = f"less accurate, x{ratio:.2f} to 91.0 %, 95 % interval ["
    assert str(verdict).startswith(text)
    assert str(verdict).endswith("; final metric -0.02, 95 % interval [-0.0219, -0.0181]")


def test_more_seeds_follow_from_the_spread_of_the_times() -> None:
    verdict = example(1.02, 0.0)
    assert (verdict.finding, verdict.accuracy.non_inferior) == ("cannot tell", True)
    assert verdict.more_seeds == seeds_needed(math.log(1.02), 0.05) - 12  # type: ignore[operator]  # not None here
    assert str(verdict).startswith("cannot tell, 41 more seeds needed: x1.02 to 91.0 %, 95 %")
    assert example(1 / 1.02, 0.0).more_seeds == verdict.more_seeds
    assert example(1.0000001, 0.0).more_seeds is None


def test_more_seeds_follow_from_the_spread_of_the_metric() -> None:
    verdict = example(1.32, -0.004)
    assert (verdict.finding, verdict.accuracy.non_inferior) == ("cannot tell", False)
    assert verdict.more_seeds == seeds_needed(0.001, 0.003) - 12  # type: ignore[operator]  # not None here
    assert "final metric -0.004, 95 % interval [-0.00591, -0.00209]" in str(verdict)
    # Leaning to less accurate, which says enough by itself.
    lost = example(1.01, -0.006)
    assert lost.more_seeds == verdict.more_seeds


def test_more_seeds_count_those_that_miss() -> None:
    rng = np.random.default_rng(6)
    reached = [True] * 6 + [False] * 6
    a = runs(np.full(12, 100.0), reached=reached)
    b = runs(100 * rng.lognormal(0.02, 0.05, 12), reached=reached)
    verdict = judge(a, b, target="91 %", delta=0.01)
    effect = math.log(verdict.seconds.ratio.estimate)
    need = seeds_needed(effect, verdict.seconds.spread)
    assert need is not None
    assert verdict.more_seeds == 2 * need - 12  # half of the new ones will miss as well
    one = judge(a[5:], b[5:], target="91 %", delta=0.01)
    assert (one.seconds.pairs, one.more_seeds) == (1, 7)  # one of seven told something
    assert str(one).startswith("cannot tell, at least 7 more seeds needed: ")


def test_misses_are_told() -> None:
    a = runs([9.0, 9.1, 9.2, 10.0, 10.0, 10.0, 9.5], reached=[True] * 3 + [False] * 3 + [True])
    b = runs([6.0, 6.1, 6.2, 6.3, 6.0, 6.5, 10.0], reached=[True] * 6 + [False])
    verdict = judge(a, b, target="91.0 %", delta=0.01)
    assert str(verdict).endswith(
        "; 3 of 7 runs of the baseline and 1 of the recipe missed the target, sign test p = 0.12"
    )


# Several recipes.


def test_holm_takes_back_what_may_be_luck() -> None:
    rng = np.random.default_rng(7)
    z = rng.standard_normal(12)
    z = (z - z.mean()) / z.std(ddof=1)
    base = runs(np.full(12, 100.0))
    recipes = {
        # 2.5 standard errors off 1: p is 0.03, and 0.06 to 0.09 among these.
        "luck": runs(100 * np.exp(0.05 * z - 2.5 * 0.05 / math.sqrt(12))),
        "nothing": runs(100 * np.exp(0.05 * z)),
        "fast": runs(70 * np.exp(0.05 * z)),
    }
    alone = {k: judge(base, r, target="91 %", delta=0.01) for k, r in recipes.items()}
    assert [v.finding for v in alone.values()] == ["faster", "cannot tell", "faster"]
    together = judge_all(base, recipes, target="91 %", delta=0.01)
    assert list(together) == ["luck", "nothing", "fast"]
    assert [v.finding for v in together.values()] == ["cannot tell", "cannot tell", "faster"]
    luck = together["luck"]
    assert luck.adjusted_p == pytest.approx(2 * luck.p_value)
    need = seeds_needed(2.5 * 0.05 / math.sqrt(12), 0.05, 1 - 0.05 / 3)
    assert luck.more_seeds == need - 12  # type: ignore[operator]  # not None here
    assert str(luck).endswith(f"; p = {luck.adjusted_p:.2g} corrected for several recipes")
    # A loss of accuracy is told all the same.
    slow = runs(100 * np.exp(2.5 * 0.05 / math.sqrt(12) + 0.05 * z))
    lost = [dataclasses.replace(run, metric=run.metric - 0.4) for run in slow]
    assert judge(base, slow, target="91 %", delta=0.01).finding == "slower"
    assert judge(base, lost, target="91 %", delta=0.01).finding == "slower"
    both = judge_all(base, {**recipes, "slow": slow, "lost": lost}, target="91 %", delta=0.01)
    assert (both["slow"].finding, both["lost"].finding) == ("cannot tell", "less accurate")
    assert both["lost"].more_seeds == 0
    only = judge_all(base, {"luck": recipes["luck"]}, target="91 %", delta=0.01)["luck"]
    assert only == alone["luck"]
    assert judge_all(base, {}, target="91 %", delta=0.01) == {}


# Negative controls, in simulation.


def trainings(
    rng: np.random.Generator,
    n: int,
    *,
    noise: float = 0.035,
    slower: float = 1.0,
    rate: float = 1.0,
    gain: float = 0.0,
    same_weights: bool = True,
    target: float | None = None,
) -> tuple[list[Outcome], list[Outcome]]:
    """Simulate both arms: curves that rise to a plateau, evaluated twenty times each.

    Args:
        rng: Generator.
        n: Number of seeds.
        noise: Standard deviation of the logarithm of the time of a step, from run to run.
        slower: How much longer a step of the recipe takes.
        rate: How much faster it learns.
        gain: What it adds to the plateau.
        same_weights: Whether the recipe leaves the weights alone, so both arms have one curve.
        target: None takes the median of the baseline.
    """
    steps = np.arange(50, 1001, 50)

    def curves(rate: float, plateau: float) -> Array:
        speed = 6 * rate * rng.lognormal(0, 0.1, (n, 1))
        level = plateau + 0.004 * rng.standard_normal((n, 1))
        metric = level - 0.5 * np.exp(-speed * steps / 1000)
        return metric + 0.003 * rng.standard_normal(metric.shape) * np.sqrt(1.02 - steps / 1000)

    baseline = curves(1.0, 0.93)
    recipe = baseline if same_weights else curves(rate, 0.93 + gain)
    aim = auto_target(baseline[:, -1]) if target is None else target
    arms = []
    for metric, factor in ((baseline, 1.0), (recipe, slower)):
        step = 0.02 * factor * rng.lognormal(0, noise, (n, 1))
        clocks = zip(step * steps, metric, strict=True)
        arms.append([time_to_target(t, steps, m, aim) for t, m in clocks])
    return arms[0], arms[1]


def shares(repeats: int, seed: int, n: int, **options: float | bool | None) -> dict[str, float]:
    """Return how often each finding comes out."""
    rng = np.random.default_rng(seed)
    found: Counter[str] = Counter()
    for _ in range(repeats):
        arms = trainings(rng, n, **options)  # type: ignore[arg-type]  # by its own names
        found[judge(*arms, target="91.5 %", delta=0.005).finding] += 1
    return {finding: count / repeats for finding, count in found.items()}


def test_lognormal_times_of_one_recipe_twice_are_seldom_told_apart() -> None:
    rng = np.random.default_rng(20)
    false = 0
    for _ in range(400):
        a, b = (runs(rng.lognormal(3, 0.1, 12)) for _ in range(2))
        false += judge(a, b, target="91 %", delta=0.005).finding != "cannot tell"
    assert 0.02 <= false / 400 <= 0.08  # 0.05, and at least 2.5 standard errors


@pytest.mark.parametrize("n", [5, 12])
@pytest.mark.parametrize("same_weights", [True, False])
def test_a_recipe_against_itself_with_half_of_the_runs_missing(n: int, same_weights: bool) -> None:
    found = shares(120, 21, n, same_weights=same_weights)
    assert found["cannot tell"] >= 0.9


def test_a_sleeper_is_found_slower() -> None:
    assert shares(200, 22, 12, slower=1.05, target=0.915)["slower"] >= 0.8
    # Where half of the runs miss the target, the others must be quieter for the same power.
    assert shares(200, 23, 12, slower=1.05, noise=0.02)["slower"] >= 0.8


def test_what_learns_faster_is_found_faster() -> None:
    found = shares(100, 24, 12, rate=1.4, same_weights=False, target=0.915)
    assert found["faster"] >= 0.9


@pytest.mark.parametrize("target", [None, 0.9])
def test_half_the_learning_rate_is_not_faster(target: float | None) -> None:
    found = shares(100, 25, 12, rate=0.5, gain=-0.01, same_weights=False, target=target)
    assert "faster" not in found
    assert found.get("slower", 0) + found.get("less accurate", 0) >= 0.95


def test_a_low_plateau_reached_in_a_hurry_is_not_faster() -> None:
    found = shares(100, 26, 12, rate=1.6, gain=-0.02, same_weights=False, target=0.89)
    assert found == {"less accurate": 1.0}


def test_holm_keeps_the_rate_of_false_findings_over_five_recipes() -> None:
    rng = np.random.default_rng(27)
    alone = together = 0
    for _ in range(60):
        base = runs(rng.lognormal(3, 0.1, 12))
        recipes = {str(k): runs(rng.lognormal(3, 0.1, 12)) for k in range(5)}
        verdicts = judge_all(base, recipes, target="91 %", delta=0.005).values()
        together += any(v.finding != "cannot tell" for v in verdicts)
        alone += any(v.p_value <= 0.05 for v in verdicts)
    assert together <= 8
    assert alone > together
