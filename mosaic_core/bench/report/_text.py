"""Numbers and names as the report writes them; every function returns safe HTML."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mosaic_core.bench.statistics import Interval

MISSING = '<span class="missing">not measured</span>'


def escape(text: Any) -> str:
    """Return a text as HTML, also for attributes."""
    return html.escape(str(text))


def number(value: float, form: str = ".2f") -> str:
    """Return a number with a real minus, and infinity as its sign."""
    if math.isinf(value):
        return "∞" if value > 0 else "&minus;∞"
    return format(value, form).replace("-", "&minus;")


def percent(share: float) -> str:
    """Return a share in per cent."""
    return f"{number(100 * share, '.1f')}&nbsp;%"


def ratio(value: Interval, bounded: bool) -> str:
    """Return a speed-up, and its interval if there is one."""
    return _estimate(f"&times;{number(value.estimate)}", value.low, value.high, ".2f", bounded)


def points(value: Interval, bounded: bool) -> str:
    """Return a difference of shares in points of per cent, and its interval if there is one."""
    text, form = number(100 * value.estimate, "+.2f"), "+.2f"
    return _estimate(text, 100 * value.low, 100 * value.high, form, bounded)


def _estimate(text: str, low: float, high: float, form: str, bounded: bool) -> str:
    ends = f"[{number(low, form)}, {number(high, form)}]" if bounded else "no interval"
    return f'<b>{text}</b> <span class="ends">{ends}</span>'


def badge(finding: str) -> str:
    """Return a finding as its mark and its word, in its colour."""
    kind = css(finding)
    return (
        f'<span class="badge {kind}"><svg class="mark" aria-hidden="true">'
        f'<use href="#mark-{kind}" x="50%" y="50%"/></svg>{escape(finding)}</span>'
    )


def css(finding: str) -> str:
    """Return the class of a finding."""
    return finding.replace(" ", "-")


def p_value(p: float) -> str:
    """Return a p-value; very small ones depend on the tails of a distribution too much to tell."""
    return f"{p:.2g}" if p >= 1e-4 else "&lt;&nbsp;0.0001"


def listed(items: Sequence[str]) -> str:
    """Return items as prose: commas, and an "and" before the last."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def settings(values: Mapping[str, Any]) -> str:
    """Return settings by name in a line."""
    return ", ".join(f"{escape(name)}&nbsp;{escape(value)}" for name, value in values.items())


def table(kind: str, label: str, heads: Sequence[str], rows: Sequence[str], axes: str = "") -> str:
    """Return a table that scrolls inside its own box.

    Args:
        kind: Its class.
        label: What it is, for those who can't see it.
        heads: Cells of the head, HTML.
        rows: ``<tr>`` elements.
        axes: Cells below the head, HTML.
    """
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads)
    second = f'<tr class="axes">{axes}</tr>' if axes else ""
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">'
        f'<table class="{kind}"><thead><tr>{head}</tr>{second}</thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
