"""The tables of the report: verdicts, steps, arms and trials."""

import statistics
from collections.abc import Sequence

from mosaic_core.bench import _report_marks as marks
from mosaic_core.bench._report_data import memory, outcomes, phases, ranked, ratios
from mosaic_core.bench._report_text import (
    MISSING,
    badge,
    escape,
    number,
    percent,
    points,
    ratio,
    table,
)
from mosaic_core.bench.comparison import Comparison
from mosaic_core.bench.tuning import Trial
from mosaic_core.demo import brief


def forest(comparison: Comparison) -> str:
    """Return a row for each recipe: its speed-up and what becomes of the accuracy."""
    verdicts, delta = comparison.verdicts, comparison.plan.delta
    several = len(comparison.plan.seeds) > 1
    speed = marks.ratio_scale(
        i for v in verdicts.values() for i in (v.seconds.ratio, v.seconds.bca) if v.seconds.pairs
    )
    gain = marks.difference_scale((v.accuracy.gain for v in verdicts.values()), delta)
    rows = []
    for arm in ranked(comparison):
        verdict = verdicts[arm]
        seconds, change = verdict.seconds, verdict.accuracy.gain
        level = verdict.level if several else None
        known = seconds.pairs > 0
        nothing = '<span class="missing">no run reached the target</span>'
        p = f"p&nbsp;=&nbsp;{verdict.adjusted_p:.2g}" if several and known else ""
        strip = marks.interval(
            speed,
            seconds.ratio if known else None,
            f"speed-up {seconds.ratio.estimate:.2f}" if known else "no run reached the target",
            finding=verdict.finding,
            bounded=several,
            thin=seconds.bca,
            dots=ratios(comparison, arm),
        )
        change_strip = marks.interval(
            gain,
            change,
            f"final accuracy {100 * change.estimate:+.2f} points",
            finding=verdict.finding,
            bounded=several,
            at=0,
            margin=-delta,
        )
        rows.append(
            f'<tr><th scope="row"><span class="name">{escape(arm)}</span>'
            f"{badge(verdict.finding)}</th>"
            f'<td class="picture a">{strip}</td>'
            f'<td class="number a" data-label="in time">'
            f"{ratio(seconds.ratio, level) if known else nothing}"
            f' <span class="ends">{p}</span></td>'
            f'<td class="number" data-label="in steps">'
            f"{ratio(verdict.steps.ratio, level) if known else '–'}</td>"
            f'<td class="number" data-label="per step"><b>×{number(verdict.per_step)}</b></td>'
            f'<td class="picture b">{change_strip}</td>'
            f'<td class="number b" data-label="accuracy">{points(change, level)}</td></tr>'
        )
    heads = [
        "Recipe",
        "Speed-up to the target",
        "in time",
        "in steps",
        "time per step",
        f"Final accuracy, points; shaded: a loss of {number(100 * delta, '.3g')} or more",
        "difference",
    ]
    axes = (
        f'<tr class="axes"><td></td><td class="picture a">{marks.axis(speed)}</td>'
        f'<td></td><td></td><td></td><td class="picture b">{marks.axis(gain, "+.3g", 100)}</td>'
        "<td></td></tr>"
    )
    return table("forest", heads, rows, axes)


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
            f'<td class="number">×{number(totals[arm] / first)}</td>'
            f'<td class="number">{number(used, ".1f") if used is not None else MISSING}</td></tr>'
        )
    heads = ["Arm", "Phases of a step, ms", "ms/step", "of baseline", "MiB"]
    axis = f'<tr class="axes"><td></td><td class="picture">{marks.axis(scale)}</td>'
    return table("steps", heads, rows, axis + "<td></td><td></td><td></td></tr>")


def legend(comparison: Comparison) -> str:
    """Return names and colours of the phases that were measured."""
    known = dict.fromkeys(n for records in comparison.records.values() for n in phases(records))
    return "".join(
        f'<span class="key"><svg class="swatch"><rect width="100%" height="100%"'
        f' class="phase {name if name in marks.PHASES else "other"}"/></svg>{escape(name)}</span>'
        for name in known
    )


def arms(comparison: Comparison, price: float | None) -> str:
    """Return a row for each arm with what it is and what was measured."""
    plan, rows = comparison.plan, []
    for arm, of in plan.arms.items():
        records = comparison.records[arm]
        found = outcomes(comparison, arm)
        seconds = statistics.mean(record.seconds for record in records)
        used, pairs = memory(records), len(records)
        turns = "–" if arm == plan.baseline else f"{comparison.in_turns(arm)} of {pairs}"
        cells = [
            str(of.epochs),
            ", ".join(f"{escape(k)}&nbsp;{escape(v)}" for k, v in of.settings.items()) or "–",
            _mean(comparison.final(arm)),
            number(comparison.ms_per_step(arm)),
            number(seconds, ".1f"),
            *([number(price * seconds / 3600, ".3g")] if price is not None else []),
            number(used, ".1f") if used is not None else MISSING,
            f"{sum(outcome.reached for outcome in found)} of {len(found)}",
            turns,
        ]
        rows.append(
            f'<tr><th scope="row"><span class="name">{escape(arm)}</span>'
            f'<span class="about">{escape(brief(of.recipe))}</span></th>'
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
        "MiB",
        "reached target",
        "pairs in turns",
    ]
    return table("arms", heads, rows)


def trials(comparison: Comparison) -> str:
    """Return a row for each arm that was tuned: a dot for each trial, and what was best."""
    tried = comparison.trials
    values = [trial.accuracy for trials in tried.values() for trial in trials]
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.01
    scale = marks.linear_scale(100 * (low - room), 100 * (high + room))
    rows = []
    for arm, of in tried.items():
        best = max(range(len(of)), key=lambda n, of=of: of[n].accuracy)  # type: ignore[misc]
        accuracies = [100 * trial.accuracy for trial in of]
        label = f"{len(of)} trials, from {min(accuracies):.1f} to {max(accuracies):.1f} %"
        rows.append(
            f'<tr><th scope="row">{escape(arm)}</th>'
            f'<td class="picture">{marks.dots(scale, accuracies, best, label)}</td>'
            f'<td class="number"><b>{percent(of[best].accuracy)}</b></td>'
            f'<td class="number">{_point(of[best])}</td>'
            f'<td class="number">{percent(of[0].accuracy)}</td></tr>'
        )
    heads = ["Arm", "Final accuracy of each trial, %", "best", "with", "untuned"]
    axis = f'<tr class="axes"><td></td><td class="picture">{marks.axis(scale)}</td>'
    return table("trials", heads, rows, axis + "<td></td><td></td><td></td></tr>")


def _point(trial: Trial) -> str:
    texts = (f"{escape(k)}&nbsp;{escape(v)}" for k, v in trial.settings.items())
    return ", ".join(texts) or "the workload’s own settings"


def _mean(shares: Sequence[float]) -> str:
    mean = percent(statistics.mean(shares))
    if len(shares) == 1:
        return f"<b>{mean}</b>"
    return f'<b>{mean}</b> <span class="ends">±&nbsp;{100 * statistics.stdev(shares):.2f}</span>'


