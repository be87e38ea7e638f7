"""The tables of the report: verdicts, steps, arms and trials."""

import statistics
from collections.abc import Sequence

from mosaic_core.bench.comparison import Comparison
from mosaic_core.bench.phases import PHASES
from mosaic_core.bench.report import _marks as marks
from mosaic_core.bench.report._data import memory, phases, ranked, ratios
from mosaic_core.bench.report._text import (
    MISSING,
    badge,
    escape,
    number,
    p_value,
    percent,
    points,
    ratio,
    settings,
    table,
)
from mosaic_core.bench.statistics import Interval


def forest(comparison: Comparison) -> str:
    """Return a row for each recipe: its speed-up and what becomes of the accuracy."""
    verdicts, delta = comparison.verdicts, comparison.plan.delta
    speed = marks.ratio_scale(
        (v.seconds.ratio, v.seconds.bca, *(Interval(1, r, r) for r in ratios(comparison, arm)))
        for arm, v in verdicts.items()
        if v.seconds.pairs
    )
    gain = marks.difference_scale([v.accuracy.gain for v in verdicts.values()], delta)
    heads = [
        "Recipe",
        "Speed-up to the target",
        "in time",
        "in steps",
        "per step",
        "p",
        "misses",
        "Final accuracy",
        "difference",
    ]
    axes = [
        "<td></td>",
        f'<td class="picture a" data-label="speed-up">{marks.axis(speed)}</td>',
        "<td></td>" * 5,
        f'<td class="picture b" data-label="accuracy">{marks.axis(gain, "+.3g", 100)}</td>',
        "<td></td>",
    ]
    rows = [_verdict(comparison, arm, speed, gain) for arm in ranked(comparison)]
    return table("forest", "Speed-up of each recipe", heads, rows, "".join(axes))


def _verdict(comparison: Comparison, arm: str, speed: marks.Scale, gain: marks.Scale) -> str:
    verdict = comparison.verdicts[arm]
    seconds, steps, change = verdict.seconds, verdict.steps, verdict.accuracy.gain
    several, known = verdict.seeds > 1, seconds.pairs > 0
    pictures = (
        marks.interval(
            speed,
            seconds.ratio if known else None,
            f"speed-up {seconds.ratio.estimate:.2f}" if known else "unknown",
            finding=verdict.finding,
            bounded=several,
            thin=seconds.bca,
            dots=ratios(comparison, arm),
        ),
        marks.interval(
            gain,
            change,
            f"final accuracy {100 * change.estimate:+.2f} points",
            finding=verdict.finding,
            bounded=several,
            at=0,
            margin=-verdict.accuracy.delta,
        ),
    )
    cells = {
        "in time": ratio(seconds.ratio, several) if known else "&ndash;",
        "in steps": ratio(steps.ratio, several) if known else "&ndash;",
        "per step": f"<b>&times;{number(verdict.per_step)}</b>",
        "p": p_value(verdict.adjusted_p) if several and known else "&ndash;",
        "misses": "{}&nbsp;/&nbsp;{}".format(*seconds.misses),
    }
    return (
        f'<tr><th scope="row"><span class="name">{escape(arm)}</span> {badge(verdict.finding)}</th>'
        f'<td class="picture a">{pictures[0]}</td>'
        + "".join(
            f'<td class="number" data-label="{name}">{text}</td>' for name, text in cells.items()
        )
        + f'<td class="picture b">{pictures[1]}</td>'
        f'<td class="number" data-label="accuracy">{points(change, several)}</td></tr>'
    )


def steps(comparison: Comparison) -> str:
    """Return a row for each arm: phases of a step as bars, time of a step, memory."""
    arms = comparison.plan.arms
    split = {arm: phases(comparison.records[arm]) for arm in arms}
    totals = {arm: comparison.ms_per_step(arm) for arm in arms}
    longest = max(*totals.values(), *(sum(parts.values()) for parts in split.values()))
    scale = marks.linear_scale(0, 1.02 * longest)
    first, rows = totals[comparison.plan.baseline], []
    for arm in arms:
        parts, used = split[arm], memory(comparison.records[arm])
        if parts:
            label = ", ".join(f"{name} {value:.2f} ms" for name, value in parts.items())
            picture = marks.stacked(scale, parts, totals[arm], label)
        else:
            picture = '<span class="missing">phases not measured</span>'
        rows.append(
            f'<tr><th scope="row">{escape(arm)}</th><td class="picture">{picture}</td>'
            f'<td class="number"><b>{number(totals[arm])}</b></td>'
            f'<td class="number">&times;{number(totals[arm] / first)}</td>'
            f'<td class="number">{number(used, ".1f") if used is not None else MISSING}</td></tr>'
        )
    heads = ["Arm", "Phases of a step, ms", "ms/step", "of baseline", "MiB"]
    return table("steps", "Time of a step", heads, rows, _axis(scale))


def legend(comparison: Comparison) -> str:
    """Return names and colours of the phases that were measured."""
    known = dict.fromkeys(n for records in comparison.records.values() for n in phases(records))
    return "".join(
        f'<span class="key"><svg class="swatch"><rect width="100%" height="100%"'
        f' class="phase {name if name in PHASES else "other"}"/></svg>{escape(name)}</span>'
        for name in known
    )


def arms(comparison: Comparison, price: float | None) -> str:
    """Return a row for each arm with what it is and what was measured."""
    plan, rows = comparison.plan, []
    for arm, of in plan.arms.items():
        records = comparison.records[arm]
        found = comparison.outcomes(arm)
        seconds = statistics.mean(record.seconds for record in records)
        used, pairs = memory(records), len(records)
        turns = "&ndash;" if arm == plan.baseline else f"{comparison.in_turns(arm)} of {pairs}"
        cells = [
            str(of.epochs),
            settings(of.settings) or "&ndash;",
            _mean(comparison.final(arm)),
            number(comparison.ms_per_step(arm)),
            number(seconds, ".1f"),
            *([number(price * seconds / 3600, ".3g")] if price is not None else []),
            number(statistics.median(record.start_up for record in records), ".2g"),
            number(used, ".1f") if used is not None else MISSING,
            f"{sum(outcome.reached for outcome in found)} of {len(found)}",
            turns,
        ]
        rows.append(
            f'<tr><th scope="row"><span class="name">{escape(arm)}</span>'
            f'<span class="about">{escape(of.recipe.brief())}</span></th>'
            + "".join(f'<td class="number">{cell}</td>' for cell in cells)
            + "</tr>"
        )
    heads = [
        "Arm",
        "epochs",
        "own settings",
        "final accuracy",
        "ms/step",
        "seconds a run",
        *(["cost of a run"] if price is not None else []),
        "start-up, s",
        "MiB",
        "reached target",
        "pairs in turns",
    ]
    return table("arms", "All arms", heads, rows)


def trials(comparison: Comparison) -> str:
    """Return a row for each arm that was tuned: a dot for each trial, and what was best."""
    tried = comparison.trials
    values = [trial.accuracy for trials in tried.values() for trial in trials]
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.01
    scale = marks.linear_scale(100 * (low - room), 100 * (high + room))
    rows, own = [], "the workload&rsquo;s own settings"
    for arm, of in tried.items():
        best = max(range(len(of)), key=lambda n, of=of: of[n].accuracy)  # type: ignore[misc]
        accuracies = [100 * trial.accuracy for trial in of]
        label = f"{len(of)} trials, from {min(accuracies):.1f} to {max(accuracies):.1f} %"
        rows.append(
            f'<tr><th scope="row">{escape(arm)}</th>'
            f'<td class="picture">{marks.dots(scale, accuracies, best, label)}</td>'
            f'<td class="number"><b>{percent(of[best].accuracy)}</b></td>'
            f'<td class="number">{settings(of[best].settings) or own}</td>'
            f'<td class="number">{percent(of[0].accuracy)}</td></tr>'
        )
    heads = ["Arm", "Final accuracy of each trial, %", "best", "with", "untuned"]
    return table("trials", "Trials of tuning", heads, rows, _axis(scale))


def _axis(scale: marks.Scale) -> str:
    return f'<td></td><td class="picture">{marks.axis(scale)}</td>' + "<td></td>" * 3


def _mean(shares: Sequence[float]) -> str:
    mean = percent(statistics.mean(shares))
    if len(shares) == 1:
        return f"<b>{mean}</b>"
    return f'<b>{mean}</b> <span class="ends">±&nbsp;{100 * statistics.stdev(shares):.2f}</span>'
