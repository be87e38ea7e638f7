"""Plots that stand in the page of the report as SVG, and those of accuracy on the way.

They are drawn in stand-in colours, which become variables of the page's style, so that one picture
serves its light and its dark scheme. Its text is text: the page's font writes it.
"""

import contextlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mosaic_core.bench.report._text import escape
from mosaic_core.bench.runs import Record
from mosaic_core.datasets import MissingError
from mosaic_core.training import Evaluation, mean_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The stand-in for each variable.
COLOURS = {
    name: f"#0a0b{n:02x}"
    for n, name in enumerate(
        ("ink", "muted", "grid", "baseline", "faster", "slower", "less-accurate", "cannot-tell")
    )
}

Clock = Callable[[Evaluation], float]
"""What stands on the horizontal axis."""


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Draw with matplotlib's defaults, whatever the user has set, and the same ids every time.

    Raises:
        MissingError: If matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingError(
            "mosaic: the report needs matplotlib, which is not installed; get it with"
            ' pip install "mosaic-core[demo]"'
        ) from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "mosaic", "svg.fonttype": "none"})
        yield


# Accuracy on the way.


def curves(
    name: str,
    arms: Mapping[str, Sequence[Record]],
    clock: Clock,
    *,
    target: float,
    floor: float,
    label: str,
    title: str,
    size: tuple[float, float],
) -> str:
    """Return accuracy over a clock: the mean of each arm, and a thin line for each run.

    Dots on the line of the target are where runs reached it.

    Args:
        name: Tells the picture from others in the page.
        arms: Runs by the name of a colour, the most important one last.
        clock: What stands on the horizontal axis.
        target: Accuracy to reach.
        floor: Accuracy to begin at, unless a run ends below.
        label: Text of the horizontal axis, which may be empty.
        title: What the picture shows, for those who can't see it.
        size: Width and height in points.
    """
    figure, ax = new_axes(size, left=30, bottom=34 if label else 20)
    for colour, records in arms.items():
        for record in records:
            _curve(ax, record.evaluations, clock, lw=0.6, alpha=0.35, color=COLOURS[colour])
        _curve(
            ax,
            mean_curve(record.evaluations for record in records),
            clock,
            lw=1.8,
            color=COLOURS[colour],
        )
    ax.axhline(100 * target, color=COLOURS["ink"], lw=0.8, ls=(0, (1, 2)), zorder=1.5)
    for colour, records in arms.items():
        firsts = (next((e for e in r.evaluations if e.accuracy >= target), None) for r in records)
        times = [clock(first) for first in firsts if first is not None]
        level = [100 * target] * len(times)
        ax.plot(times, level, "o", ms=3.2, color=COLOURS[colour], mec="none", alpha=0.8)
    every = [record for records in arms.values() for record in records]
    low = min(floor, *(record.final_accuracy for record in every))
    high = max(target, *(e.accuracy for record in every for e in record.evaluations))
    room = 0.06 * (high - low) or 0.01
    ax.set_ylim(100 * (low - room / 2), 100 * min(1 + room / 4, high + room))
    ax.set_xlim(0, 1.02 * max(clock(record.evaluations[-1]) for record in every))
    ax.set_xlabel(label, color=COLOURS["muted"])
    ax.locator_params(nbins=4 if size[0] < 250 else 6)
    return to_svg(figure, name, title)


def _curve(ax: "Axes", evaluations: Sequence[Evaluation], clock: Clock, **style: Any) -> None:
    ax.plot([clock(e) for e in evaluations], [100 * e.accuracy for e in evaluations], **style)


def floor(runs: Iterable[Record]) -> float:
    """Return the accuracy from which the end of these runs shows well, and not how they began."""
    end = min(record.final_accuracy for record in runs)
    return max(0.0, end - max(0.02, min(3 * (1 - end), end / 2)))


# Pictures in a page.


def new_axes(size: tuple[float, float], left: float, bottom: float) -> tuple["Figure", "Axes"]:
    """Return axes with margins of fixed width, so that pictures side by side line up.

    Args:
        size: Width and height in points.
        left: Margin for the numbers on the left.
        bottom: Margin for those below and the text of the axis.
    """
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    width, height = size
    right, top = 6, 8
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    ax = figure.add_axes(
        (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    )
    figure.patch.set_visible(False)
    ax.patch.set_visible(False)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(COLOURS["muted"])
    ax.grid(color=COLOURS["grid"], lw=0.6)
    ax.set_axisbelow(True)
    ax.tick_params("both", length=0, labelcolor=COLOURS["muted"], labelsize=9, pad=4)
    ax.xaxis.label.set_fontsize(9)
    return figure, ax


def to_svg(figure: "Figure", name: str, title: str, texts: Sequence[str] = ()) -> str:
    """Return a figure as an ``<svg>`` element whose ids no other one has.

    Args:
        figure: The figure.
        name: What its ids begin with.
        title: What it shows, for those who can't see it.
        texts: What takes the place of the texts ``@0@``, ``@1@`` ...: it may hold any character.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    box = svg.partition('viewBox="')[2].partition('"')[0]
    svg = svg.partition("<svg")[2].partition(">")[2]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#([\w.-]+)', svg))
    svg = re.sub(
        r' id="(.*?)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg
    )
    svg = re.sub(r'(?:xlink:)?(href="|url\()#', rf"\1#{name}-", svg)
    svg = re.sub(r" ?font-family: [^;\"]*;?", "", svg)
    for variable, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    # Hundredths of a point are enough; numbers outside of tags are those of an axis.
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    svg = re.sub(r"@(\d+)@", lambda found: escape(texts[int(found[1])]), svg)
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(title)}">{svg}'
