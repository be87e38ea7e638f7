"""The table, the cards and the capability matrix: derived from the code, never written by hand."""

import dataclasses
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mosaic_core import plugins
from mosaic_core.algorithm import Algorithm
from mosaic_core.errors import nearest

__all__ = [
    "HEADER",
    "Row",
    "Setting",
    "card",
    "check_readme",
    "functions",
    "markdown",
    "matrix",
    "matrix_markdown",
    "settings",
    "table",
    "write_readme",
]

HEADER = ("Method", "Category", "Needs", "Trainers", "Reference")

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


def matrix() -> dict[str, dict[str, tuple[str, ...]]]:
    """Return algorithm x trainer: what the trainer does not deliver, nothing where all is well."""
    adapters = sorted(plugins.adapters().values(), key=lambda adapter: adapter.title)
    return {
        name: {a.title: tuple(sorted(cls.needs() - a.delivers)) for a in adapters}
        for name, cls in plugins.algorithms().items()
    }


def markdown() -> str:
    """Return the table in Markdown."""
    return _markdown(HEADER, (row.cells(markdown=True) for row in table()))


def matrix_markdown() -> str:
    """Return the matrix in Markdown."""
    cells = matrix()
    trainers = next(iter(cells.values()), {})
    rows = ((name, *map(verdict, row.values())) for name, row in cells.items())
    return _markdown(("Method", *trainers), rows)


def verdict(missing: tuple[str, ...]) -> str:
    """Return the text of a cell of the matrix."""
    return f"no {', no '.join(missing)}" if missing else "yes"


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
    """One hyper-parameter: its name, its default as Python writes it (or nothing), its meaning."""

    name: str
    default: str
    meaning: str


def settings(cls: type[Algorithm]) -> list[Setting]:
    """Return the settings of an algorithm, with what the docstring of its class says of them."""
    meanings = _arguments(inspect.getdoc(cls) or "")
    return [
        Setting(
            name=field.name,
            default="" if field.default is dataclasses.MISSING else repr(field.default),
            meaning=meanings.get(field.name, ""),
        )
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]  # subclasses are dataclasses
    ]


def _arguments(docstring: str) -> dict[str, str]:
    """Read the ``Args:`` section of a docstring in Google's style."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", docstring, re.MULTILINE)
    if section is None:
        return {}
    entries = re.split(r"^(\w+):", textwrap.dedent(section.group(1)), flags=re.MULTILINE)
    texts = (" ".join(text.split()) for text in entries[2::2])
    return dict(zip(entries[1::2], texts, strict=True))


def functions(cls: type[Algorithm]) -> list[str]:
    """Return the names of the pure functions beneath an algorithm: those its module offers."""
    module = sys.modules[cls.__module__]
    offered = getattr(module, "__all__", ())
    return [name for name in offered if isinstance(getattr(module, name), types.FunctionType)]


def card(name: str, width: int = 88) -> str:
    """Return all that is known of an algorithm, as text.

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
    adapters = plugins.adapters().values()
    refused = [f"{a.title} (no {', no '.join(sorted(cls.needs() - a.delivers))})"
               for a in adapters if not a.supports(cls)]  # fmt: skip
    module = cls.__module__.rpartition("._")[0] or cls.__module__
    parts = {
        "Settings": [_setting(setting, width) for setting in settings(cls)],
        "Effect": [cls.card.effect],
        "Use when": [cls.card.use_when],
        "Interactions": [cls.card.interactions],
        "Excludes": [", ".join(sorted(cls.excludes))],
        "Needs": [", ".join(sorted(cls.needs()))],
        "Trainers": [", ".join(sorted(a.title for a in adapters if a.supports(cls))) or "none"],
        "Refused by": [", ".join(refused)],
        "Functions": [", ".join(functions(cls))],
        "Import": [f"from {module} import {name}"],
        "Reference": [f"{cls.card.reference} {cls.card.url}".strip()],
    }
    lines = [f"{name} ({cls.card.category})", *_wrapped(cls.card.summary, width)]
    for title, texts in parts.items():
        if any(texts):
            lines += ["", title]
            lines += [line for text in texts for line in _wrapped(text, width, "  ")]
    return "\n".join(lines)


def _setting(setting: Setting, width: int) -> str:
    return f"{setting.name} = {setting.default}" if setting.default else setting.name


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False
    )
