"""A comparison as one page of HTML that needs nothing else: no network, no script."""

import math
import string
from importlib import resources

from mosaic_core.bench.comparison import Comparison
from mosaic_core.bench.report import _pareto as pareto
from mosaic_core.bench.report import _plots as plots
from mosaic_core.bench.report import _tables as tables
from mosaic_core.bench.report._data import FINDINGS, embedded, ranked
from mosaic_core.bench.report._text import badge, css, escape, listed, number, percent, settings
from mosaic_core.bench.statistics import t_interval
from mosaic_core.bench.verdict import Verdict

__all__ = ["check", "to_html"]

_FEW = 3
"""So many recipes have their curves side by side; twice as many, their sentences at the top."""


def check(price: float | None = None) -> None:
    """Check before the runs that the page can be made after them.

    Args:
        price: See :func:`to_html`.

    Raises:
        ValueError: If ``price`` is not positive and finite.
        MissingError: If matplotlib is not installed.
    """
    if price is not None and not 0 < price < math.inf:
        raise ValueError(f"to_html: price must be positive and finite, got {price}")
    with plots.drawing():
        pass


def to_html(comparison: Comparison, *, price: float | None = None) -> str:
    """Return the page. The same comparison gives the same page.

    Args:
        comparison: What to show.
        price: Of an hour of training, in any currency; None leaves out costs.

    Raises:
        ValueError: If ``price`` is not positive and finite.
        MissingError: If matplotlib is not installed.
    """
    check(price)
    plan, many = comparison.plan, len(comparison.verdicts) > 2 * _FEW
    with plots.drawing():
        curves, front = _curves(comparison, price), _pareto(comparison)
    template = resources.files("mosaic_core.bench.report").joinpath("page.html")
    level = next(iter(comparison.verdicts.values())).level
    return string.Template(template.read_text(encoding="utf-8")).substitute(
        title=escape(f"{plan.workload.name} with {plan.trainer}"),
        headline=_headline(comparison),
        found=_tally(comparison) if many else _sentences(comparison),
        facts=_facts(comparison),
        notes=_notes(comparison),
        forest=tables.forest(comparison),
        sentences=f"<h3>In words</h3>{_sentences(comparison)}" if many else "",
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


def _tally(comparison: Comparison) -> str:
    """Return the names of the recipes of each finding, with what is found."""
    verdicts, items = comparison.verdicts, []
    for finding in FINDINGS:
        of = [arm for arm in ranked(comparison) if verdicts[arm].finding == finding]
        names = (
            f'<span class="name">{escape(arm)}</span>&nbsp;{_figure(verdicts[arm])}' for arm in of
        )
        items.append(
            f'<li class="{css(finding)}"><b class="count">{len(of)}</b> {badge(finding)}'
            f"<p>{', '.join(names) or '&ndash;'}</p></li>"
        )
    return f'<ol class="tally">{"".join(items)}</ol>'


def _figure(verdict: Verdict) -> str:
    if verdict.finding == "less accurate":
        return f"{number(100 * verdict.accuracy.gain.estimate, '+.1f')}&nbsp;points"
    return f"&times;{number(verdict.seconds.ratio.estimate)}" if verdict.seconds.pairs else ""


def _sentences(comparison: Comparison) -> str:
    """Return a sentence for each recipe, those of one finding together."""
    verdicts = comparison.verdicts
    items = (
        f'<li>{badge(finding)}<p><b class="name">{escape(arm)}</b> {escape(verdicts[arm])}</p></li>'
        for finding in FINDINGS
        for arm in ranked(comparison)
        if verdicts[arm].finding == finding
    )
    return f'<ol class="verdicts">{"".join(items)}</ol>'


def _facts(comparison: Comparison) -> str:
    plan, every = comparison.plan, [r for rs in comparison.records.values() for r in rs]
    fixed = (
        f"the median of the final ones of {escape(plan.baseline)}, which no recipe influences"
        if plan.target is None
        else "fixed before the runs"
    )
    seeds = list(plan.seeds)
    ordered = len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1))
    named = f"{seeds[0]} to {seeds[-1]}" if ordered else listed([str(seed) for seed in seeds])
    dates = sorted({str(record.environment.get("date", "unknown")) for record in every})
    facts = {
        "Workload": f"<b>{escape(plan.workload.name)}</b>, {escape(plan.workload.title)}",
        "Trainer": f"<b>{escape(plan.trainer)}</b>",
        "Seeds": f"<b>{len(seeds)}</b>, the same for all arms: {named}",
        "Target": f"<b>{percent(comparison.target)}</b> accuracy, {fixed}",
        "Margin": f"<b>{number(100 * plan.delta, '.3g')} points</b> of accuracy do not matter",
        "Settings": settings(plan.workload.settings) + ", unless an arm has its own",
        "Date": escape(" to ".join(dict.fromkeys([dates[0], dates[-1]]))),
        "Environment": "<br>".join(map(escape, _environments(comparison))),
    }
    return "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in facts.items())


def _environments(comparison: Comparison) -> list[str]:
    """Return machines and versions, each once."""
    found: dict[str, None] = {}
    for record in (record for records in comparison.records.values() for record in records):
        rest = {k: v for k, v in record.environment.items() if k not in ("date", "machine")}
        machine = str(record.environment.get("machine", "unknown machine"))
        found[", ".join([machine, *(f"{name} {value}" for name, value in rest.items())])] = None
    return list(found)


def _notes(comparison: Comparison) -> str:
    """Return what a sceptic would ask first."""
    plan, seeds = comparison.plan, len(comparison.plan.seeds)
    pairs = seeds * len(comparison.verdicts)
    apart = pairs - sum(comparison.in_turns(arm) for arm in comparison.verdicts)
    machines = len(_environments(comparison))
    missed = [arm for arm in plan.arms if not any(o.reached for o in comparison.outcomes(arm))]
    nobody = len(missed) == len(plan.arms)
    few, lengths = 1 < seeds < 5, {arm.epochs for arm in plan.arms.values()}
    notes = {
        "One seed shows no spread: there are no intervals, and nothing can be found.": seeds == 1,
        f"{seeds} seeds are few: intervals are wide, and rest on a normal distribution.": few,
        f"{apart} of {pairs} pairs did not take turns, so their times hold what the machine did"
        " meanwhile.": apart,
        f"The runs come from {machines} different environments.": machines > 1,
        "No run of any arm reached the target, so there is no time to compare.": nobody,
        f"No run of {escape(listed(missed))} reached the target.": missed and not nobody,
        "Arms differ in epochs, and each schedule decays over its own.": len(lengths) > 1,
    }
    items = "".join(f"<li>{note}</li>" for note, holds in notes.items() if holds)
    return f'<aside class="notes"><h3>Mind that</h3><ul>{items}</ul></aside>' if items else ""


# Plots.


def _curves(comparison: Comparison, price: float | None) -> str:
    plan, records = comparison.plan, comparison.records
    clocks: dict[str, plots.Clock] = {
        "seconds of training": lambda e: e.seconds,
        "steps": lambda e: e.step,
    }
    if price is not None:
        clocks[f"cost at {price:g} an hour"] = lambda e: price * e.seconds / 3600
    few = len(comparison.verdicts) <= _FEW
    floor = plots.floor(records[plan.baseline])

    def panel(label: str, n: int, arm: str) -> str:
        finding = comparison.verdicts[arm].finding
        picture = plots.curves(
            f"curves-{list(clocks).index(label)}-{n}",
            {"baseline": records[plan.baseline], css(finding): records[arm]},
            clocks[label],
            target=comparison.target,
            floor=floor,
            label=label if few else "",
            title=f"accuracy of {arm} and of {plan.baseline} over {label}",
            size=((380, 240) if price is None else (290, 200)) if few else (200, 135),
        )
        head = f'<b class="name">{escape(arm)}</b> {badge(finding)}'
        return f"<figure><figcaption>{head}</figcaption>{picture}</figure>"

    arms = list(enumerate(ranked(comparison)))
    if few:
        panels = "".join(panel(label, n, arm) for n, arm in arms for label in clocks)
        return f'<div class="panels clocks-{len(clocks)}">{panels}</div>'
    parts: list[str] = []
    for label in clocks:
        panels = "".join(panel(label, n, arm) for n, arm in arms)
        parts.append(
            f'<details class="plain"{"" if parts else " open"}><summary>Over {label}</summary>'
            f'<div class="panels many">{panels}</div></details>'
        )
    return "".join(parts)


def _pareto(comparison: Comparison) -> str:
    findings = {name: verdict.finding for name, verdict in comparison.verdicts.items()}
    points = [
        pareto.Point(
            name=name,
            finding=findings.get(name, "baseline"),
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
        f'<figure class="pareto">{picture}<figcaption>On the front: {escape(listed(best))};'
        " of arms whose intervals overlap either may be."
        f"{left}</figcaption></figure>"
    )


def _trials(comparison: Comparison) -> str:
    if not comparison.trials:
        return ""
    tuned, plan = list(comparison.trials), comparison.plan
    (seeds,) = {trial.seeds for trials in comparison.trials.values() for trial in trials}
    runs = "one run, on a seed" if seeds == 1 else f"the mean of {seeds} runs, on seeds"
    who = (
        f"Only {escape(plan.baseline)} was tuned, and its settings went to all arms."
        if tuned == [plan.baseline]
        else "Every arm had the same trials."
    )
    return (
        f'<section id="tuning"><h2>Tuning</h2><p>{who} A trial is {runs} that no'
        " comparison uses. The hollow dot is the workload&rsquo;s own settings, the ring the best"
        f" trial, whose settings the runs have.</p>{tables.trials(comparison)}</section>"
    )
