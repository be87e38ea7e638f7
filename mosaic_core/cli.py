"""The ``mosaic`` command: what there is, what is installed, and what it does to a real training.

Heavy imports stay inside the commands that need them.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import mosaic_core
from mosaic_core import cli_bench_more  # noqa: F401  # adds its commands to those of bench
from mosaic_core.cli_bench import bench
from mosaic_core.cli_common import DEFAULT, told, trainer_named, trainer_text

if TYPE_CHECKING:
    from mosaic_core.adapter import Adapter

__all__ = ["app", "main"]

app = typer.Typer(
    name="mosaic",
    help="Training algorithms that plug into the trainer you already use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")

_TrainerOrAll = Annotated[
    str | None,
    typer.Option(
        "--trainer",
        help="The name of an installed adapter, torch for a plain loop, or all to train one seed"
        f" with every installed trainer and compare the weights.{DEFAULT}",
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

    with told():
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
    with told():
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
        str,
        typer.Option(
            metavar="RECIPE", help="Names with + and - between them, such as demo+SAM, or YAML."
        ),
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
    with told():
        from mosaic_core import demo as demo_module
        from mosaic_core import plugins

        adapters = _all_trainers() if trainer == "all" else [trainer_named(trainer)]
        chosen, composed = plugins.workload(workload), plugins.recipe(recipe)
        for adapter in adapters:
            adapter.check(composed)
        length = chosen.epochs if epochs is None else epochs
        console = Console()
        facts = Table.grid("", "", padding=(0, 2))
        facts.add_row("[bold]workload", f"{chosen.name}: {chosen.title}")
        facts.add_row("[bold]trainer", ", ".join(map(trainer_text, adapters)))
        facts.add_row("[bold]recipe", escape(composed.brief()))
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


def _all_trainers() -> "list[Adapter]":
    """Return the adapters of all trainers that are installed."""
    from mosaic_core import plugins
    from mosaic_core.datasets import MissingError
    from mosaic_core.doctor import version_of

    found = [adapter for adapter in plugins.adapters().values() if version_of(adapter)]
    if not found:
        raise MissingError("mosaic: no trainer with an adapter is installed; see mosaic doctor")
    return found
