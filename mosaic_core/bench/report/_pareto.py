"""The plot of what accuracy costs, and the arms that no other one beats."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mosaic_core.bench.report._plots import COLOURS, new_axes, to_svg
from mosaic_core.bench.report._text import css
from mosaic_core.bench.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = {"faster": "o", "slower": "s", "less accurate": "D", "cannot tell": "o", "baseline": "^"}


@dataclass(frozen=True)
class Point:
    """An arm in the plot.

    Attributes:
        name: Name of the arm.
        finding: What is found of it, or ``"baseline"``.
        seconds: Of the whole training: mean and interval.
        accuracy: At its end, in [0, 1]: mean and interval.
        recipe: Arms of the same one are joined.
    """

    name: str
    finding: str
    seconds: Interval
    accuracy: Interval
    recipe: str

    @property
    def at(self) -> tuple[float, float]:
        """Seconds, and accuracy in per cent."""
        return self.seconds.estimate, 100 * self.accuracy.estimate


def front(points: Iterable[Point]) -> list[Point]:
    """Return the arms that no other one beats in both seconds and accuracy, by their seconds."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.at[0], -p.at[1])):
        if not best or point.at[1] > best[-1].at[1]:
            best.append(point)
    return best


def outliers(points: Sequence[Point]) -> list[Point]:
    """Return the arms so much less accurate that with them nothing else could be seen.

    They lie more than six median absolute deviations, and 5 points, below the median.
    """
    accuracy = np.array([point.at[1] for point in points])
    away = np.median(accuracy) - accuracy
    far = away > max(6 * np.median(abs(away)), 5)
    return [point for point, out in zip(points, far, strict=True) if out]


def pareto(name: str, points: Sequence[Point], title: str) -> str:
    """Return final accuracy over seconds: a point with intervals for each arm, and the front.

    Args:
        name: Tells the picture from others in the page.
        points: The arms.
        title: What the picture shows, for those who can't see it.
    """
    figure, ax = new_axes((360, 240), left=34, bottom=34)
    best = front(points)
    for recipe in dict.fromkeys(point.recipe for point in points):
        same = sorted(point.at for point in points if point.recipe == recipe)
        ax.plot(*zip(*same, strict=True), color=COLOURS["muted"], lw=0.8, ls=(0, (3, 2)))
    for point in points:
        _point(ax, point)
    _limits(ax, points)
    stairs = [*(point.at for point in best), (ax.get_xlim()[1], best[-1].at[1])]
    style: dict[str, Any] = {"lw": 1, "alpha": 0.5, "drawstyle": "steps-post", "zorder": 1.5}
    ax.plot(*zip(*stairs, strict=True), color=COLOURS["ink"], **style)
    ax.set_xlabel("seconds of training", color=COLOURS["muted"])
    _labels(ax, [*best, *(point for point in points if point not in best)], points)
    return to_svg(figure, name, title, [point.name for point in points])


def _point(ax: "Axes", point: Point) -> None:
    (x, y), colour = point.at, COLOURS[css(point.finding)]
    low, high = point.seconds.low, point.seconds.high
    if math.isfinite(high - low):
        ax.plot([low, high], [y, y], color=colour, lw=0.8)
    low, high = point.accuracy.low, point.accuracy.high
    if math.isfinite(high - low):
        ax.plot([x, x], [100 * low, 100 * high], color=colour, lw=0.8)
    face = "none" if point.finding == "cannot tell" else colour
    ax.plot(x, y, MARKERS[point.finding], color=colour, mfc=face, ms=5.5, zorder=3)


def _limits(ax: "Axes", points: Sequence[Point]) -> None:
    """Leave room for names, and for bars unless they are much longer than arms are apart."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = _extent([point.seconds for point in points])
    if high > 4 * low > 0:
        ax.set_xscale("log")
        ax.set_xlim(low / 1.2, high * 1.6)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.tick_params(which="minor", length=0)
    else:
        width = max(high - low, 0.1 * high)
        ax.set_xlim(low - 0.08 * width, high + 0.25 * width)
    low, high = _extent([point.accuracy for point in points])
    height = max(high - low, 0.005)
    top = min(high + 0.12 * height, 1.01)  # a bar may pass 1, an accuracy doesn't
    ax.set_ylim(100 * (low - 0.08 * height), 100 * top)


def _extent(intervals: Sequence[Interval]) -> tuple[float, float]:
    middle = [interval.estimate for interval in intervals]
    low, high = min(middle), max(middle)
    room = max(high - low, 0.05 * high)
    ends = [end for i in intervals for end in (i.low, i.high) if math.isfinite(end)]
    return max(low - room, min([low, *ends])), min(high + room, max([high, *ends]))


# Names beside points.

_SIZE = 8.5
_SIDES = (
    *(("left", 6, dy) for dy in (7, -7, 0)),
    *(("right", -6, dy) for dy in (7, -7, 0)),
    *(("center", 0, dy) for dy in (12, -12)),
)

_Box = tuple[float, float, float, float]


def _labels(ax: "Axes", first: Sequence[Point], points: Sequence[Point]) -> None:
    """Write names beside their points, the first ones first, where there is room."""
    places = {point.name: ax.transData.transform(point.at) for point in points}
    taken: list[_Box] = [(x - 4, y - 4, x + 4, y + 4) for x, y in places.values()]
    for point in first:
        x, y = places[point.name]
        for side, dx, dy in _SIDES:
            box = _box(x + dx, y + dy, side, 0.56 * _SIZE * len(point.name))
            inside = ax.bbox.x0 < box[0] and box[2] < ax.bbox.x1
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                ax.annotate(
                    f"@{points.index(point)}@",
                    point.at,
                    (dx, dy),
                    textcoords="offset points",
                    ha=side,
                    va="center_baseline",
                    color=COLOURS["ink"],
                    fontsize=_SIZE,
                )
                break


def _box(x: float, y: float, side: str, width: float) -> _Box:
    left = x - {"left": 0, "center": width / 2, "right": width}[side]
    return left, y - _SIZE / 2, left + width, y + _SIZE / 2


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
