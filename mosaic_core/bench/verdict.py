"""What may be said of a recipe: faster, slower, less accurate, or that nobody can tell yet."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mosaic_core.bench.accuracy import Accuracy, accuracy
from mosaic_core.bench.censoring import Outcome, Speedup, per_step_ratio, speedup
from mosaic_core.bench.statistics import MOST_SEEDS, Interval, holm, seeds_needed

__all__ = ["Finding", "Verdict", "judge", "judge_all"]

Finding = Literal["faster", "slower", "less accurate", "cannot tell"]


@dataclass(frozen=True)
class Verdict:
    """What a comparison shows, with all of its figures; ``str()`` says it in a line.

    Attributes:
        finding: ``"faster"`` if the interval of the speed-up in seconds lies above 1 and the final
            metric is non-inferior; ``"slower"`` if it lies below 1, whatever the metric;
            ``"less accurate"`` if it is not slower and the metric is inferior, which more seeds
            would not mend; else ``"cannot tell"``.
        target: How the target reads, such as ``"91.0 %"``.
        seeds: Number of pairs.
        more_seeds: How many more a finding needs, 0 if there is one; None if that is beyond reach.
        seconds: Speed-up in seconds.
        steps: Speed-up in optimizer steps.
        per_step: Speed-up of a step.
        accuracy: What becomes of the final metric.
        p_value: That of the side the data lean to: of not being faster at a non-inferior metric,
            or of not being slower.
        adjusted_p: The same after Holm's correction for all recipes that were compared.
        level: Coverage of the intervals, not corrected.
    """

    finding: Finding
    target: str
    seeds: int
    more_seeds: int | None
    seconds: Speedup
    steps: Speedup
    per_step: float
    accuracy: Accuracy
    p_value: float
    adjusted_p: float
    level: float

    def __str__(self) -> str:
        ratio, gain, (a, b) = self.seconds.ratio, self.accuracy.gain, self.seconds.misses
        several, seeds = self.seeds > 1, f"{self.seeds} seed{'s' * (self.seeds > 1)}"
        if not self.seconds.pairs and self.finding == "cannot tell":
            return f"cannot tell, no run reached {self.target}, {seeds}; {self._step()}"
        factor = f"x{ratio.estimate:.2f}"
        text = {
            "faster": f"{factor} faster to {self.target}",
            "slower": f"slower, {factor} to {self.target}",
            "less accurate": f"less accurate, {factor} to {self.target}",
            "cannot tell": f"cannot tell, {self._more()}: {factor} to {self.target}",
        }[self.finding]
        ends = (ratio.low, ratio.high)
        # As many digits as show on which side of 1 the ends lie; two, if one lies on it.
        digits = next((d for d in range(2, 7) if 1 not in (round(end, d) for end in ends)), 2)
        text += f", {self._ends(ratio, f'.{digits}f')}" if several else ", no interval"
        text += f", {seeds}; {self.steps.ratio.estimate:.2f}x in steps, {self._step()}"
        if not self.accuracy.non_inferior:
            text += f"; final metric {round(gain.estimate, 9):+.3g}"  # 9: of rounding nothing shows
            text += f", {self._ends(gain, '+.3g')}" if several else ""
        if a or b:
            text += f"; {a} of {self.seeds} runs of the baseline and {b} of the recipe missed the"
            text += f" target, sign test p = {self.seconds.sign_p:.2g}"
        if self.adjusted_p != self.p_value:
            text += f"; p = {self.adjusted_p:.2g} corrected for several recipes"
        return text

    def _step(self) -> str:
        return f"{self.per_step:.2f}x in time per step"

    def _ends(self, interval: Interval, form: str) -> str:
        low, high = format(interval.low, form), format(interval.high, form)
        return f"{100 * self.level:g} % interval [{low}, {high}]"

    def _more(self) -> str:
        if self.more_seeds is None:
            return f"{MOST_SEEDS} seeds would not be enough"
        least = "at least " if self.seconds.pairs == 1 else ""
        return f"{least}{self.more_seeds} more seed{'s' * (self.more_seeds > 1)} needed"


def judge(
    baseline: Sequence[Outcome],
    recipe: Sequence[Outcome],
    *,
    target: str,
    delta: float,
    higher_is_better: bool = True,
    level: float = 0.95,
    seed: int = 0,
) -> Verdict:
    """Compare a recipe with the baseline on the same seeds; see :class:`Verdict` for the rules.

    Args:
        baseline: Shape ``(n,)``.
        recipe: The same seeds in the same order.
        target: How the target reads.
        delta: Loss of the final metric that does not matter, in units of the metric.
        higher_is_better: Whether good metrics are high.
        level: Coverage of the intervals.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If the arms differ in length or are empty, or ``delta`` is negative.
    """
    seconds, steps = (
        speedup(baseline, recipe, quantity=quantity, level=level, seed=seed)
        for quantity in ("seconds", "steps")
    )
    metric = accuracy(baseline, recipe, delta=delta, higher_is_better=higher_is_better, level=level)
    finding: Finding = "cannot tell"
    if seconds.ratio.high < 1:
        finding = "slower"
    elif metric.inferior:
        finding = "less accurate"
    elif seconds.ratio.low > 1 and metric.non_inferior:
        finding = "faster"
    ahead = seconds.ratio.estimate > 1
    p_value = max(seconds.p_value, metric.p_value) if ahead else seconds.p_value
    seeds = len(baseline)
    return Verdict(
        finding=finding,
        target=target,
        seeds=seeds,
        more_seeds=_more_seeds(seconds, metric, seeds, level) if finding == "cannot tell" else 0,
        seconds=seconds,
        steps=steps,
        per_step=per_step_ratio(baseline, recipe),
        accuracy=metric,
        p_value=p_value,
        adjusted_p=p_value,
        level=level,
    )


def judge_all(
    baseline: Sequence[Outcome],
    recipes: Mapping[str, Sequence[Outcome]],
    *,
    target: str,
    delta: float,
    higher_is_better: bool = True,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Verdict]:
    """Compare several recipes with one baseline; Holm's correction decides what is found.

    A recipe that is faster or slower by itself, and not after the correction, is one of which
    nobody can tell. ``"less accurate"`` is a warning and stays without correction.

    Args:
        baseline: Shape ``(n,)``.
        recipes: Outcomes of each recipe on the same seeds in the same order.
        target: See :func:`judge`, also for what follows.
        delta: See there.
        higher_is_better: See there.
        level: See there.
        seed: See there.

    Returns:
        The verdicts, in the order given.
    """

    def verdict(runs: Sequence[Outcome], level: float) -> Verdict:
        return judge(
            baseline,
            runs,
            target=target,
            delta=delta,
            higher_is_better=higher_is_better,
            level=level,
            seed=seed,
        )

    verdicts = {name: verdict(runs, level) for name, runs in recipes.items()}
    adjusted = holm([v.p_value for v in verdicts.values()])
    for (name, found), p in zip(list(verdicts.items()), adjusted, strict=True):
        verdicts[name] = dataclasses.replace(found, adjusted_p=p)
        if found.finding in ("faster", "slower") and p > 1 - level:
            if found.accuracy.inferior:  # which needs no correction
                verdicts[name] = dataclasses.replace(
                    verdicts[name], finding="less accurate", more_seeds=0
                )
                continue
            strict = verdict(recipes[name], 1 - (1 - level) / len(recipes))  # Holm's first step
            more = None if strict.more_seeds is None else max(1, strict.more_seeds)
            verdicts[name] = dataclasses.replace(
                verdicts[name], finding="cannot tell", more_seeds=more
            )
    return verdicts


def _more_seeds(speed: Speedup, metric: Accuracy, seeds: int, level: float) -> int | None:
    """Return how many more seeds the finding needs that the data lean to."""
    effect, margin = math.log(speed.ratio.estimate), metric.gain.estimate + metric.delta
    need_speed = need_metric = 0.0  # where it is settled
    if speed.ratio.low <= 1 <= speed.ratio.high:
        need_speed = _seeds(effect, speed.spread, speed.pairs, level) * seeds / max(1, speed.pairs)
    if not metric.non_inferior:
        need_metric = _seeds(margin, metric.spread, seeds, level)
    if effect > 0 and not margin < 0:  # leans to faster, which needs both
        need = max(need_speed, need_metric)
    else:  # leans to slower, or to less accurate; either is a finding
        need = min(need_speed if effect < 0 else math.inf, need_metric if margin < 0 else math.inf)
    return max(1, math.ceil(need) - seeds) if need <= MOST_SEEDS else None


def _seeds(effect: float, spread: float, pairs: int, level: float) -> float:
    if pairs == 1:
        return 2  # the least that show a spread
    return seeds_needed(effect, spread, level) or math.inf
