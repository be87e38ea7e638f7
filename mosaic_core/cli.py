"""The ``mosaic`` command: what there is, what is installed, and what it does to a real training.

Heavy imports stay inside the commands that need them.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import mosaic_core

if TYPE_CHECKING:
    from mosaic_core.adapter import Adapter
    from mosaic_core.recipe import Recipe

__all__ = ["app", "main"]

app = typer.Typer(
    name="mosaic",
    help="Training algorithms that plug into the trainer you already use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_bench = typer.Typer(help="Measure what a recipe costs.", no_args_is_help=True)
app.add_typer(_bench, name="bench")

_DEFAULT = "  [default: the preferred one of those installed]"
_Trainer = Annotated[
    str | None,
    typer.Option(
        "--trainer",
        help=f"The name of an installed adapter, or torch for a plain loop.{_DEFAULT}",
        show_default=False,
    ),
]
_TrainerOrAll = Annotated[
    str | None,
    typer.Option(
        "--trainer",
        help="The name of an installed adapter, torch for a plain loop, or all to train one seed"
        f" with every installed trainer and compare the weights.{_DEFAULT}",
        show_default=False,
    ),
]


def main() -> None:
    """Run the command line."""
    app()


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mosaic {mosaic_core.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Training algorithms that plug into the trainer you already use."""


@contextlib.contextmanager
def _told() -> Iterator[None]:
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


# What there is.


@app.command("list")
def list_(
    markdown: Annotated[bool, typer.Option("--markdown", help="Write Markdown.")] = False,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Show in which mode of which trainer each is exact.")
    ] = False,
    write_readme: Annotated[
        Path | None,
        typer.Option("--write-readme", metavar="PATH", help="Write the table between its markers."),
    ] = None,
    check_readme: Annotated[
        Path | None,
        typer.Option("--check-readme", metavar="PATH", help="Exit with 1 if the table is stale."),
    ] = None,
) -> None:
    """List all algorithms: what they need, which trainers deliver it, and where they come from."""
    from mosaic_core import catalog

    with _told():
        if write_readme is not None:
            changed = catalog.write_readme(write_readme)
            typer.echo(f"{write_readme}: {'written' if changed else 'is current'}")
        elif check_readme is not None:
            if not catalog.check_readme(check_readme):
                typer.echo(
                    f"mosaic: the table in {check_readme} is stale; write it with"
                    f" mosaic list --write-readme {check_readme}",
                    err=True,
                )
                raise typer.Exit(1)
            typer.echo(f"{check_readme}: is current")
        elif markdown:
            typer.echo(catalog.matrix_markdown() if matrix else catalog.markdown(), nl=False)
        elif matrix:
            for title, rows in catalog.matrix_rows().items():
                table = Table(*catalog.MATRIX_HEADER, title=title)
                table.columns[0].no_wrap = True
                for row in rows:
                    table.add_row(*row)
                Console().print(table)
        else:
            table = Table(*catalog.HEADER)
            table.columns[0].no_wrap = True
            for entry in catalog.table():
                table.add_row(*entry.cells(), style=None)
            Console().print(table)


@app.command()
def show(name: Annotated[str, typer.Argument(help="Name of an algorithm, such as MixUp.")]) -> None:
    """Show all that is known of one algorithm."""
    from mosaic_core import catalog

    console = Console(highlight=False, markup=False, soft_wrap=True)
    with _told():
        for line in catalog.card(name).splitlines():
            console.print(line, style=None if line.startswith(" ") else "bold")


@app.command()
def doctor() -> None:
    """Check what is installed; exit with 1 if something is broken."""
    from mosaic_core.doctor import examine

    marks = {"ok": "[green]ok[/]", "absent": "[yellow]absent[/]", "broken": "[bold red]BROKEN[/]"}
    table = Table("", "", "", "", box=None, show_header=False)
    section, broken = "", 0
    for finding in examine():
        first = finding.section if finding.section != section else ""
        section = finding.section
        broken += finding.status == "broken"
        text = escape(finding.text)
        table.add_row(f"[bold]{first}[/]", finding.name, marks[finding.status], text)
    Console(highlight=False).print(table)
    if broken:
        raise typer.Exit(1)


# What it does.


@app.command()
def demo(
    trainer: _TrainerOrAll = None,
    workload: Annotated[
        str,
        typer.Option(
            help="digits (seconds), fashion-mnist, fashion-mnist-vit, char-lm (minutes), cifar10"
            " (half an hour on a CPU), or a plugin's, such as reuters-r8."
        ),
    ] = "digits",
    recipe: Annotated[
        str, typer.Option(metavar="NAME|PATH", help="A named recipe, or a YAML file.")
    ] = "demo",
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Length of each run.", show_default="the workload's")
    ] = None,
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Number of seeds.", show_default="the workload's")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder to look for the data first.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where to save the plot.")] = Path("mosaic-demo.png"),
) -> None:
    """Train a workload with and without a recipe, on the same seeds, and compare."""
    with _told():
        from mosaic_core import demo as demo_module
        from mosaic_core import plugins

        adapters = _all_trainers() if trainer == "all" else [_trainer(trainer)]
        chosen, composed = plugins.workload(workload), _recipe(recipe)
        for adapter in adapters:
            adapter.check(composed)
        length = chosen.epochs if epochs is None else epochs
        console = Console()
        facts = Table.grid("", "", padding=(0, 2))
        facts.add_row("[bold]workload", f"{chosen.name}: {chosen.title}")
        facts.add_row("[bold]trainer", ", ".join(map(_trainer_text, adapters)))
        facts.add_row("[bold]recipe", escape(demo_module.brief(composed)))
        if trainer == "all":
            from mosaic_core import agreement

            console.print(facts)
            found = agreement.train_all(
                adapters,
                chosen,
                composed,
                seed=seed,
                epochs=length,
                data_dir=data_dir,
                console=console,
            )
            agreement.show(found, console)
            return
        demo_module.check_output(output)
        console.print(facts)
        count = chosen.seeds if seeds is None else seeds
        comparison = demo_module.compare(
            adapters[0].load("trainer"),
            chosen,
            composed,
            seeds=range(seed, seed + count),
            epochs=length,
            data_dir=data_dir,
            console=console,
        )
        demo_module.show(comparison, console)
        demo_module.plot(comparison, output, title=f"{chosen.name} with {adapters[0].title}")
        console.print(f"Plot: {output}")


@_bench.command("overhead")
def bench_overhead(
    trainer: _Trainer = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to count for each arm.")] = 2000,
) -> None:
    """Measure what an empty recipe costs a step over an empty callback."""
    with _told():
        from rich.progress import Progress

        from mosaic_core.bench.overhead import measure

        adapter, console = _trainer(trainer), Console()
        with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
            task = bar.add_task(adapter.title)
            arms = measure(
                adapter.load("overhead"),
                steps,
                lambda done, total: bar.update(task, completed=done, total=total),
            )
        table = Table("arm", title=f"Overhead with {_trainer_text(adapter)}")
        for column in ("µs/step", "µs over the empty callback", "quartiles of blocks"):
            table.add_column(column, justify="right")
        for arm in arms:
            over = (f"{arm.over:+.0f}", "{:+.0f} to {:+.0f}".format(*arm.spread))
            table.add_row(arm.name, f"{arm.step:.0f}", *(over if arm is not arms[0] else ("", "")))
        console.print(table)


@_bench.command("kernels")
def bench_kernels(
    blocks: Annotated[int, typer.Option(min=2, help="Blocks to time for each library.")] = 21,
    output: Annotated[
        Path | None, typer.Option(help="Write the figures and the environment as JSON.")
    ] = None,
) -> None:
    """Time our functions beside those of other libraries that are installed, in turns."""
    with _told():
        from mosaic_core import plugins
        from mosaic_core.bench import kernels
        from mosaic_core.doctor import version_of

        console = Console()
        peers = {
            adapter.title: adapter.load("kernels")
            for adapter in plugins.adapters().values()
            if adapter.kernels is not None and version_of(adapter)
        }
        table = Table("task", "on", "library", title="Our time by theirs: below 1, ours is faster")
        for column in ("µs/call", "ours / theirs", "quartiles of blocks"):
            table.add_column(column, justify="right")
        results = []
        with console.status("") as status:
            for kernel in kernels.kernels(peers):
                status.update(f"{kernel.name} on {kernel.on}")
                arms = kernels.measure(kernel, blocks)
                results.append((kernel, arms))
                for arm in arms:
                    spread = "{:.2f} to {:.2f}".format(*arm.spread)
                    ratio = (
                        ("", "") if arm.library == kernels.OURS else (f"{arm.ratio:.2f}", spread)
                    )
                    first = (kernel.name, kernel.on) if arm is arms[0] else ("", "")
                    table.add_row(*first, arm.library, f"{arm.call:.0f}", *ratio)
        console.print(table)
        if output is not None:
            output.write_text(kernels.to_json(results), encoding="utf-8")


def _all_trainers() -> "list[Adapter]":
    """Return the adapters of all trainers that are installed."""
    from mosaic_core import plugins
    from mosaic_core.datasets import MissingError
    from mosaic_core.doctor import version_of

    found = [adapter for adapter in plugins.adapters().values() if version_of(adapter)]
    if not found:
        raise MissingError("mosaic: no trainer with an adapter is installed; see mosaic doctor")
    return found


def _trainer(name: str | None) -> "Adapter":
    """Return the adapter of a trainer that is installed, or the plain loop."""
    from mosaic_core import plugins
    from mosaic_core.datasets import MissingError
    from mosaic_core.doctor import version_of
    from mosaic_core.errors import nearest
    from mosaic_core.training import PLAIN

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


def _trainer_text(adapter: "Adapter") -> str:
    from mosaic_core.doctor import version_of

    return f"{adapter.title} ({version_of(adapter)})"


def _recipe(name: str) -> "Recipe":
    """Return a recipe by name, or from a YAML file."""
    from mosaic_core import Recipe, plugins
    from mosaic_core.errors import nearest

    known = plugins.recipes()
    if name in known:
        return Recipe(known[name])
    if Path(name).suffix in (".yaml", ".yml"):
        return Recipe.from_yaml(Path(name))
    raise LookupError(f"mosaic: unknown recipe {name!r}, and no YAML file{nearest(name, known)}")
