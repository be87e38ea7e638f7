"""What the commands share: the trainers by name, and errors in one line."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mosaic_core.adapter import Adapter

__all__ = ["DEFAULT", "TrainerOption", "number", "told", "trainer_named", "trainer_text"]

DEFAULT = "  [default: the preferred one of those installed]"
TrainerOption = Annotated[
    str | None,
    typer.Option(
        "--trainer",
        help=f"The name of an installed adapter, or torch for a plain loop.{DEFAULT}",
        show_default=False,
    ),
]


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Turn errors that speak to the user into one message and exit code 2."""
    from mosaic_core.datasets import MissingError
    from mosaic_core.errors import UnsupportedError

    try:
        yield
    except (LookupError, ValueError, OSError, MissingError, UnsupportedError) as error:
        # str() of a KeyError is the repr of its argument.
        message = error.args[0] if isinstance(error, LookupError) and error.args else error
        typer.echo(message, err=True)
        raise typer.Exit(2) from error


def number(option: str, text: str) -> float:
    """Return the number that an option was given."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"mosaic: {option} must be a number, got {text!r}") from None


def trainer_named(name: str | None) -> "Adapter":
    """Return the adapter of a trainer that is installed, or the plain loop."""
    from mosaic_core import plugins
    from mosaic_core.datasets import MissingError
    from mosaic_core.doctor import version_of
    from mosaic_core.errors import nearest
    from mosaic_core.plain import PLAIN

    known = {**plugins.adapters(), PLAIN.name: PLAIN}
    if name is None:
        there = (adapter for adapter in known.values() if version_of(adapter))
        return min(there, key=lambda adapter: adapter.precedence)
    if name not in known:
        raise LookupError(f"mosaic: unknown trainer {name!r}{nearest(name, known)}")
    if version_of(known[name]) is None:
        raise MissingError(
            f"mosaic: trainer {name} is not installed; get it with"
            f" pip install {known[name].trainers[0]}"
        )
    return known[name]


def trainer_text(adapter: "Adapter") -> str:
    """Return the title and the version of a trainer."""
    from mosaic_core.doctor import version_of

    return f"{adapter.title} ({version_of(adapter)})"
