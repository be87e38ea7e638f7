"""The table, the cards and the capability matrix: derived from the code, never written by hand."""

import dataclasses
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosaic_core import measured, plugins
from mosaic_core.algorithm import Algorithm
from mosaic_core.errors import nearest

__all__ = [
    "HEADER",
    "MATRIX_HEADER",
    "Row",
    "Setting",
    "card",
    "check_readme",
    "functions",
    "markdown",
    "matrix",
    "matrix_markdown",
    "matrix_rows",
    "settings",
    "table",
    "write_readme",
]

HEADER = ("Method", "Category", "Needs", "Trainers", "Reference")
MATRIX_HEADER = ("Mode", "Exact", "Refused")

_BEGIN = "<!-- mosaic table: begin (written by nox -s readme) -->"
_END = "<!-- mosaic table: end -->"


@dataclass(frozen=True)
class Row:
    """One algorithm in the table.

    Attributes:
        method: Name of the algorithm.
        category: Field of use.
        needs: What it needs of a trainer.
        trainers: Titles of the installed adapters that deliver it.
        reference: Authors and year of the source.
        url: Address of the source, or nothing.
    """

    method: str
    category: str
    needs: tuple[str, ...]
    trainers: tuple[str, ...]
    reference: str
    url: str

    def cells(self, markdown: bool = False) -> tuple[str, ...]:
        """Return the texts under ``HEADER``."""
        linked = markdown and self.url
        return (
            self.method,
            self.category,
            ", ".join(self.needs) or "-",
            ", ".join(self.trainers) or "-",
            f"[{self.reference}]({self.url})" if linked else self.reference,
        )


def table() -> list[Row]:
    """Return a row for every algorithm of every installed plugin, by name."""
    adapters = plugins.adapters().values()
    return [
        Row(
            method=name,
            category=cls.card.category,
            needs=tuple(sorted(cls.needs())),
            trainers=tuple(sorted(a.title for a in adapters if a.supports(cls))),
            reference=cls.card.reference,
            url=cls.card.url,
        )
        for name, cls in plugins.algorithms().items()
    ]


def matrix() -> dict[str, dict[str, dict[str, tuple[str, ...]]]]:
    """Return trainer -> algorithm -> mode: what is not delivered there, nothing where all is well.

    The adapter contract suite trains, or sees refused, exactly these cells.
    """
    adapters = sorted(plugins.adapters().values(), key=lambda adapter: adapter.title)
    return {
        adapter.title: {
            name: {mode.name: adapter.missing(cls, mode) for mode in adapter.modes}
            for name, cls in plugins.algorithms().items()
        }
        for adapter in adapters
    }


def markdown() -> str:
    """Return the table in Markdown."""
    return _markdown(HEADER, (row.cells(markdown=True) for row in table()))


def matrix_rows() -> dict[str, list[tuple[str, str, str]]]:
    """Return trainer -> a row of texts under ``MATRIX_HEADER`` for each mode."""
    texts: dict[str, list[tuple[str, str, str]]] = {}
    for title, algorithms in matrix().items():
        texts[title] = []
        for mode in next(iter(algorithms.values()), {}):
            missing = {name: row[mode] for name, row in algorithms.items() if row[mode]}
            refused = [f"{name} ({_without(what)})" for name, what in missing.items()]
            exact = len(algorithms) - len(missing)
            texts[title].append((mode, f"{exact} of {len(algorithms)}", ", ".join(refused) or "-"))
    return texts


def matrix_markdown() -> str:
    """Return the matrix in Markdown, a table for each trainer."""
    return "\n".join(
        f"### {title}\n\n{_markdown(MATRIX_HEADER, rows)}" for title, rows in matrix_rows().items()
    )


def _without(missing: Iterable[str]) -> str:
    return f"no {', no '.join(missing)}"


def _markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# The table in a README.


def write_readme(path: Path) -> bool:
    """Write the table between its markers, and tell whether that changed the file.

    Raises:
        ValueError: If the file has no markers.
    """
    old = path.read_text(encoding="utf-8")
    new = _current(path, old)
    if new != old:
        path.write_text(new, encoding="utf-8")
    return new != old


def check_readme(path: Path) -> bool:
    """Tell whether the table in a file is the one that would be written.

    Raises:
        ValueError: If the file has no markers.
    """
    text = path.read_text(encoding="utf-8")
    return _current(path, text) == text


def _current(path: Path, text: str) -> str:
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"mosaic: {path} must have the lines\n{_BEGIN}\n{_END}")
    return f"{before}{begin}\n\n{markdown()}\n{end}{after}"


# Cards.


@dataclass(frozen=True)
class Setting:
    """One hyper-parameter.

    Attributes:
        name: Its name.
        default: Its default as Python writes it, or None where it has none.
        meaning: What the docstring says of it.
    """

    name: str
    default: str | None
    meaning: str


def settings(cls: type[Algorithm]) -> list[Setting]:
    """Return the settings of an algorithm, with what the docstring of its class says of them."""
    meanings = _arguments(inspect.getdoc(cls) or "")
    return [
        Setting(field.name, _default(field), meanings.get(field.name, ""))
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]  # subclasses are dataclasses
    ]


def _default(field: "dataclasses.Field[Any]") -> str | None:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return None


def _arguments(docstring: str) -> dict[str, str]:
    """Read the ``Args:`` section of a docstring in Google's style."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", docstring, re.MULTILINE)
    if section is None:
        return {}
    entries = re.split(r"^(\w+):", textwrap.dedent(section.group(1)), flags=re.MULTILINE)
    texts = (" ".join(text.split()) for text in entries[2::2])
    return dict(zip(entries[1::2], texts, strict=True))


def functions(cls: type[Algorithm]) -> list[str]:
    """Return the pure functions beneath an algorithm, those its module offers, as they are called.

    Example:
        >>> from mosaic_core.algorithms import LabelSmoothing
        >>> functions(LabelSmoothing)
        ['smooth_labels(logits, target, smoothing=0.1)']
    """
    module = sys.modules[cls.__module__]
    offered = [getattr(module, name) for name in getattr(module, "__all__", ())]
    return [f"{f.__name__}({_call(f)})" for f in offered if isinstance(f, types.FunctionType)]


def _call(function: Callable[..., Any]) -> str:
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(str(p.replace(annotation=p.empty)).replace(" = ", "=") for p in parameters)


def card(name: str, width: int = 88) -> str:
    """Return all that is known of an algorithm, as text: titles, and indented paragraphs.

    Args:
        name: Name of the algorithm.
        width: Columns to fill.

    Raises:
        LookupError: If it is unknown; the nearest name is suggested.
    """
    known = plugins.algorithms()
    if name not in known:
        raise LookupError(f"mosaic: unknown algorithm {name!r}{nearest(name, known)}")
    cls = known[name]
    adapters = sorted(plugins.adapters().values(), key=lambda adapter: adapter.title)
    supporting = [a.title for a in adapters if a.supports(cls)]
    refusing = [
        f"{a.title} {mode.name} ({_without(missing)})"
        for a in adapters
        for mode in a.modes
        if (missing := a.missing(cls, mode))
    ]
    home = cls.__module__.partition("._")[0]  # a private module shows in its package
    sections = {
        "Settings": "\n".join(_setting(setting) for setting in settings(cls)),
        "Effect": cls.card.effect,
        "Measured": "\n".join(measured.lines(name)),
        "Use when": cls.card.use_when,
        "Interactions": cls.card.interactions,
        "Excludes": ", ".join(sorted(cls.excludes)),
        "Needs": ", ".join(sorted(cls.needs())),
        "Trainers": ", ".join(supporting) or "none of those installed",
        "Refused by": ", ".join(refusing),
        "Import": f"from {home} import {name}",
        "Functions": "\n".join(functions(cls)),
        "Reference": f"{cls.card.reference} {cls.card.url}".strip(" -"),
    }
    lines = [f"{name} ({cls.card.category})", _wrapped(cls.card.summary, width, "  ")]
    for title, text in sections.items():
        if text:
            hang = "    " if title in ("Settings", "Functions", "Measured") else "  "
            lines += ["", title, *(_wrapped(line, width, hang) for line in text.splitlines())]
    return "\n".join(lines)


def _setting(setting: Setting) -> str:
    default = " (required)" if setting.default is None else f" = {setting.default}"
    return f"{setting.name}{default}: {setting.meaning}".replace("``", "")


def _wrapped(text: str, width: int, hang: str) -> str:
    return textwrap.fill(
        text,
        width,
        initial_indent="  ",
        subsequent_indent=hang,
        break_long_words=False,
        break_on_hyphens=False,
    )
