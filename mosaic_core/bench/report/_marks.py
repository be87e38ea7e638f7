"""Small pictures for the cells of tables, as SVG that stretches with its cell.

Positions across are per cent, so that one picture serves a wide page and a narrow one. Colours are
classes of the page's style.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mosaic_core.bench.phases import PHASES
from mosaic_core.bench.report._text import css, escape, number
from mosaic_core.bench.statistics import Interval

_RATIOS = (
    [n / 20 for n in range(1, 60)],
    [n / 10 for n in range(1, 60)],
    [n / 5 for n in range(1, 60)],
    [0.25, 0.5, 0.75, 1, 1.5, 2, 3],
    [0.1, 0.25, 0.5, 1, 2, 4, 10],
    [10.0**n for n in range(-9, 10)],
)


@dataclass(frozen=True)
class Scale:
    """Where numbers stand across a cell.

    Attributes:
        low: Number at the left end.
        high: Number at the right end.
        ticks: Numbers to write at the axis.
        log: Whether distances are ratios.
    """

    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def at(self, value: float) -> float:
        """Return the position in per cent; what lies outside is at the nearer end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return 100 * math.log(value / self.low) / math.log(self.high / self.low)
        return 100 * (value - self.low) / (self.high - self.low)


def ratio_scale(intervals: Iterable[Iterable[Interval]]) -> Scale:
    """Return a logarithmic scale with 1 on it; very long intervals run out of it.

    Args:
        intervals: Those that stand together, row by row.
    """
    known = [interval for row in intervals for interval in row]
    middle = [1.0, *(i.estimate for i in known)]
    ends = [end for i in known for end in (i.low, i.high)]
    low = max(min([*middle, *ends, 0.92]), min(middle) / 2) / 1.03
    high = min(max([*middle, *ends, 1.08]), max(middle) * 2) * 1.03
    return Scale(low, high, _few(_RATIOS, low, high), log=True)


def difference_scale(intervals: Sequence[Interval], delta: float) -> Scale:
    """Return a linear scale with 0 and ``-delta`` on it.

    Very long intervals run out of it, and what is more than 5 points and six times the median away.
    """
    sizes = [abs(i.estimate) for i in intervals]
    far = max(0.05, 6 * statistics.median([0.0, *sizes]))
    middle = [0.0, -delta, *(i.estimate for i in intervals if abs(i.estimate) <= far)]
    ends = [end for i in intervals for end in (i.low, i.high)]
    room = max(max(middle) - min(middle), 0.03)
    low = max(min([*middle, *ends, -2 * delta]), min(middle) - room)
    high = min(max([*middle, *ends, 2 * delta]), max(middle) + room)
    edge = 0.05 * (high - low) or 0.001
    return linear_scale(low - edge, high + edge, most=4)


def linear_scale(low: float, high: float, most: int = 5) -> Scale:
    """Return a linear scale with round numbers at its axis, not too many."""
    power = 10 ** math.floor(math.log10(high - low))
    steps = [power * factor for factor in (0.2, 0.5, 1, 2, 5)]
    wide = ([n * s for n in range(math.ceil(low / s), math.floor(high / s) + 1)] for s in steps)
    return Scale(low, high, _few(list(wide), low, high, most))


def _few(
    candidates: Sequence[Sequence[float]], low: float, high: float, most: int = 5
) -> list[float]:
    inside = [[tick for tick in ticks if low <= tick <= high] for ticks in candidates]
    return next((ticks for ticks in inside if len(ticks) <= most), inside[-1])


def axis(scale: Scale, form: str = ".4g", factor: float = 1) -> str:
    """Return the numbers of a scale, each times a factor."""

    def write(tick: float) -> str:
        return number(factor * tick, form) if tick else "0"

    texts = (f'<text x="{_pc(scale.at(tick))}" y="12">{write(tick)}</text>' for tick in scale.ticks)
    return _svg("axis", 16, "", texts)


def interval(
    scale: Scale,
    value: Interval | None,
    label: str,
    *,
    finding: str,
    bounded: bool = True,
    thin: Interval | None = None,
    dots: Sequence[float] = (),
    at: float = 1,
    margin: float | None = None,
) -> str:
    """Return an estimate with its interval, and what stands beside it.

    Args:
        scale: Where numbers stand.
        value: The estimate; None where there is none.
        label: What it says, for those who can't see it.
        finding: Gives mark and colour.
        bounded: Whether there is an interval.
        thin: A second interval, which has the same estimate.
        dots: The same for each pair.
        at: The number that means no difference.
        margin: A loss up to here does not matter.
    """
    parts = []
    if margin is not None:
        parts.append(f'<rect class="lost" width="{_pc(scale.at(margin))}" height="100%"/>')
    parts += [_line(scale, tick, tick, 0, "grid", "100%") for tick in scale.ticks]
    parts.append(_line(scale, at, at, 0, "one", "100%"))
    middle = 26 if thin is None else 16
    if value is not None:
        if bounded:
            parts.append(_reach(scale, value, middle, "reach"))
            parts += [_reach(scale, thin, 26, "thin")] if thin is not None else []
        parts += [_reach(scale, Interval(dot, dot, dot), 37, "pair") for dot in dots]
        x = _pc(scale.at(value.estimate))
        parts.append(f'<use href="#mark-{css(finding)}" x="{x}" y="{middle}"/>')
    return _svg(f"strip {css(finding)}", 52, label, parts)


def _reach(scale: Scale, value: Interval, y: int, kind: str) -> str:
    """Return a line from end to end, with an arrow where an end lies outside."""
    parts = [_line(scale, value.low, value.high, y, kind)]
    for out, x, turn in ((value.low < scale.low, 0, -1), (value.high > scale.high, 100, 1)):
        if out:
            start = 0 if scale.low <= value.estimate <= scale.high else 8 * turn  # beside the mark
            arrow = f'<path class="arrow" d="M{start}-4L{start + 7 * turn} 0L{start} 4z"/>'
            parts.append(f'<svg x="{x}%" y="{y}" overflow="visible">{arrow}</svg>')
    return "".join(parts)


def stacked(scale: Scale, parts: Mapping[str, float], total: float, label: str) -> str:
    """Return bars end to end, each with its number if that fits, and a line at the total."""
    shapes, left = [], 0.0
    for phase, value in parts.items():
        name = phase if phase in PHASES else "other"
        width = scale.at(left + value) - scale.at(left)
        title = f"<title>{escape(phase)}: {number(value, '.2f')} ms</title>"
        shapes.append(
            f'<rect class="phase {name}" x="{_pc(scale.at(left))}" y="4"'
            f' width="{_pc(width)}" height="20">{title}</rect>'
        )
        if width > 9:
            middle = _pc(scale.at(left) + width / 2)
            text = number(value, ".3g")
            shapes.append(f'<text class="on {name}" x="{middle}" y="18">{text}</text>')
        left += value
    shapes.append(_line(scale, total, total, 0, "total", "28"))
    return _svg("strip bar", 28, label, shapes)


def dots(scale: Scale, values: Sequence[float], chosen: int, label: str) -> str:
    """Return a dot for each value; the first is hollow, and the chosen one is marked."""
    shapes = [_line(scale, tick, tick, 0, "grid", "100%") for tick in scale.ticks]
    for n, value in enumerate(values):
        kind = "untuned" if n == 0 else "trial"
        shapes.append(f'<circle class="{kind}" cx="{_pc(scale.at(value))}" cy="11" r="3.5"/>')
    shapes.append(f'<circle class="chosen" cx="{_pc(scale.at(values[chosen]))}" cy="11" r="7"/>')
    return _svg("strip", 22, label, shapes)


def _line(scale: Scale, a: float, b: float, y: int, kind: str, y2: str | None = None) -> str:
    x1, x2 = _pc(scale.at(a)), _pc(scale.at(b))
    return f'<line class="{kind}" x1="{x1}" x2="{x2}" y1="{y}" y2="{y if y2 is None else y2}"/>'


def _svg(kind: str, height: int, label: str, parts: Iterable[str]) -> str:
    told = f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true"'
    return f'<svg class="{kind}" height="{height}" {told}>{"".join(parts)}</svg>'


def _pc(value: float) -> str:
    return f"{value:.2f}%"
