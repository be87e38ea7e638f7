"""A comparison as one page of HTML that needs nothing else: no network, no script."""

import math
import string
from collections import Counter
from collections.abc import Sequence
from importlib import resources

from mosaic_core.bench import _report_pareto as pareto
from mosaic_core.bench import _report_plots as plots
from mosaic_core.bench import _report_tables as tables
from mosaic_core.bench._report_data import FINDINGS, embedded, outcomes, ranked
from mosaic_core.bench._report_text import badge, css, escape, listed, number, percent
from mosaic_core.bench.comparison import Comparison
from mosaic_core.bench.statistics import t_interval

__all__ = ["to_html"]

FEW = 3
"""Recipes whose curves are drawn large, side by side for each clock."""


def to_html(comparison: Comparison, *, price: float | None = None) -> str:
    """Return the page. The same comparison gives the same page.

    Args:
        comparison: What to show.
        price: Of an hour of training, in any currency; None leaves out costs.

    Raises:
        ValueError: If ``price`` is not positive and finite.
        MissingError: If matplotlib is not installed.
    """
    if price is not None and not 0 < price < math.inf:
        raise ValueError(f"to_html: price must be positive and finite, got {price}")
    plan = comparison.plan
    with plots.drawing():
        curves, front = _curves(comparison, price), _pareto(comparison)
    template = resources.files("mosaic_core.bench").joinpath("report.html")
    level = next(iter(comparison.verdicts.values())).level
    return string.Template(template.read_text(encoding="utf-8")).substitute(
        title=escape(f"{plan.workload.name} with {plan.trainer}"),
        headline=_headline(comparison),
        verdicts=_verdicts(comparison),
        facts=_facts(comparison),
        notes=_notes(comparison),
        forest=tables.forest(comparison),
        curves=curves,
        pareto=front,
        steps=tables.steps(comparison),
        legend=tables.legend(comparison),
        arms=tables.arms(comparison, price),
        trials=_trials(comparison),
        data=embedded(comparison),
        level=f"{100 * level:g}",
        delta=number(100 * plan.delta, ".3g"),
        target=percent(comparison.target),
        baseline=escape(plan.baseline),
    )


# What is found.


def _headline(comparison: Comparison) -> str:
    verdicts, target = comparison.verdicts, percent(comparison.target)
    if len(verdicts) > 1:
        faster = sum(verdict.finding == "faster" for verdict in verdicts.values())
        count = "None" if not faster else "All" if faster == len(verdicts) else str(faster)
        verb = "is found to train" if faster <= 1 else "train"
        return f"{count} of {len(verdicts)} recipes {verb} faster to {target}"
    ((name, verdict),) = verdicts.items()
    arm, factor = escape(name), number(verdict.seconds.ratio.estimate)
    return {
        "faster": f"{arm} trains {factor} times as fast to {target}",
        "slower": f"{arm} trains slower: {factor} times as fast to {target}",
        "less accurate": f"{arm} ends less accurate than {escape(comparison.plan.baseline)}",
        "cannot tell": f"Nobody can tell yet whether {arm} trains faster",
    }[verdict.finding]


def _verdicts(comparison: Comparison) -> str:
    """Return a sentence for each recipe, those of one finding together."""
    verdicts, items = comparison.verdicts, []
    for finding in FINDINGS:
        for arm in ranked(comparison):
            if verdicts[arm].finding == finding:
                items.append(
                    f'<li>{badge(finding)}<p><b class="name">{escape(arm)}</b>'
                    f" {escape(verdicts[arm])}</p></li>"
                )
    counts = Counter(verdict.finding for verdict in verdicts.values())
    tally = "".join(
        f'<span class="count {css(finding)}"><b>{counts[finding]}</b> {badge(finding)}</span>'
        for finding in FINDINGS
        if len(verdicts) > 1
    )
    size = "many" if len(verdicts) > 2 * FEW else "few"
    return f'<p class="tally">{tally}</p><ol class="verdicts {size}">{"".join(items)}</ol>'


def _facts(comparison: Comparison) -> str:
    plan, every = comparison.plan, [r for rs in comparison.records.values() for r in rs]
    fixed = (
        f"the median of the final accuracies of {escape(plan.baseline)}, which no recipe influences"
        if plan.target is None
        else "given before the runs"
    )
    dates = sorted({str(record.environment.get("date", "unknown date")) for record in every})
    machines = [_environment(record.environment) for record in every]
    facts = {
        "Workload": f"<b>{escape(plan.workload.name)}</b>, {escape(plan.workload.title)}",
        "Trainer": f"<b>{escape(plan.trainer)}</b>",
        "Seeds": f"<b>{len(plan.seeds)}</b>, the same for all arms: "
        + escape(", ".join(map(str, plan.seeds))),
        "Target": f"<b>{percent(comparison.target)}</b> accuracy, {fixed}",
        "Margin": f"<b>{number(100 * plan.delta, '.3g')} points</b> of final accuracy may be lost",
        "Date": " to ".join(dict.fromkeys([dates[0], dates[-1]])),
        "Environment": "<br>".join(dict.fromkeys(machines)),
    }
    return "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in facts.items())


def _environment(environment: object) -> str:
    items = dict(environment) if isinstance(environment, dict) else {}
    items.pop("date", None)
    machine = items.pop("machine", "unknown machine")
    return escape(", ".join([str(machine), *(f"{name} {value}" for name, value in items.items())]))


def _notes(comparison: Comparison) -> str:
    """Return what a sceptic would ask first."""
    plan, records = comparison.plan, comparison.records
    seeds, notes = len(plan.seeds), []
    if seeds == 1:
        notes.append("One seed shows no spread: there are no intervals, and nothing is found.")
    elif seeds < 5:
        notes.append(f"{seeds} seeds are few: the intervals are wide, and rest on normality.")
    apart = {
        arm: seeds - comparison.in_turns(arm) for arm in comparison.verdicts
    }
    pairs = seeds * len(apart)
    if sum(apart.values()) == pairs:
        notes.append("No run took turns with its baseline: a drift of the machine is in the times.")
    elif any(apart.values()):
        notes.append(f"{sum(apart.values())} of {pairs} pairs did not take turns, so a drift of the machine may be in their times.")
    machines = {_environment(r.environment) for rs in records.values() for r in rs}
    if len(machines) > 1:
        notes.append(f"The runs come from {len(machines)} different environments.")
    missed = [arm for arm in plan.arms if not any(o.reached for o in outcomes(comparison, arm))]
    if len(missed) == len(plan.arms):
        notes.append("No run of any arm reached the target, so there is no time to compare.")
    elif missed:
        notes.append(f"No run of {escape(listed(missed))} reached the target.")
    lengths = {arm.epochs for arm in plan.arms.values()}
    if len(lengths) > 1:
        notes.append("Arms differ in their number of epochs; each schedule decays over its own.")
    if not notes:
        return ""
    items = "".join(f"<li>{note}</li>" for note in notes)
    return f'<aside class="notes"><h3>Mind</h3><ul>{items}</ul></aside>'


# Plots.


def _curves(comparison: Comparison, price: float | None) -> str:
    plan, records = comparison.plan, comparison.records
    clocks: dict[str, plots.Clock] = {
        "seconds of training": lambda e: e.seconds,
        "steps": lambda e: e.step,
    }
    if price is not None:
        clocks[f"cost at {price:g} an hour"] = lambda e: price * e.seconds / 3600
    few = len(comparison.verdicts) <= FEW
    floor = plots.floor(record for runs in records.values() for record in runs)

    def panel(label: str, n: int, arm: str) -> str:
        finding = comparison.verdicts[arm].finding
        picture = plots.curves(
            f"curves-{list(clocks).index(label)}-{n}",
            {"baseline": records[plan.baseline], css(finding): records[arm]},
            clocks[label],
            target=comparison.target,
            floor=floor,
            label=label,
            title=f"accuracy of {arm} and of {plan.baseline} over {label}",
            small=not few,
        )
        head = f'<b class="name">{escape(arm)}</b> {badge(finding)}'
        return f"<figure><figcaption>{head}</figcaption>{picture}</figure>"

    arms = list(enumerate(ranked(comparison)))
    if few:
        panels = "".join(panel(label, n, arm) for n, arm in arms for label in clocks)
        return f'<div class="panels few">{panels}</div>'
    return "".join(
        f"<h3>Accuracy over {escape(label)}</h3>"
        f'<div class="panels many">{"".join(panel(label, n, arm) for n, arm in arms)}</div>'
        for label in clocks
    )


def _pareto(comparison: Comparison) -> str:
    points = [
        pareto.Point(
            name=name,
            finding=comparison.verdicts[name].finding if name in comparison.verdicts else "baseline",
            seconds=t_interval([record.seconds for record in comparison.records[name]]),
            accuracy=t_interval(comparison.final(name)),
            recipe=arm.recipe.to_yaml(),
        )
        for name, arm in comparison.plan.arms.items()
    ]
    out = pareto.outliers(points)
    shown = [point for point in points if point not in out]
    best = [point.name for point in pareto.front(points)]
    picture = pareto.pareto("pareto", shown, "final accuracy over seconds of training")
    below = listed([f"{p.name} ({p.at[1]:.1f} % after {p.at[0]:.0f} s)" for p in out])
    left = f" Below the picture: {escape(below)}." if out else ""
    return (
        f'<figure class="pareto">{picture}<figcaption>On the front: {escape(listed(best))}.'
        f"{left}</figcaption></figure>"
    )


def _trials(comparison: Comparison) -> str:
    if not comparison.trials:
        return ""
    of = listed(list(comparison.trials))
    return (
        '<section id="tuning"><h2>Tuning</h2><p>Every arm listed had the same trials, on a seed that'
        " no comparison uses. A hollow dot is the workload’s own settings, a ring the best trial,"
        f" which the runs of the arm use.</p>{tables.trials(comparison)}</section>"
        if of
        else ""
    )


