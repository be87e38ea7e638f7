"""``mosaic bench``: what a recipe gains and what it costs.

Heavy imports stay inside the commands that need them.
"""

import json
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from mosaic_core.cli_common import TrainerOption, number, told, trainer_named, trainer_text

if TYPE_CHECKING:
    from mosaic_core.bench.comparison import Comparison
    from mosaic_core.bench.plan import Arm

__all__ = ["bench"]

bench = typer.Typer(invoke_without_command=True, no_args_is_help=True)


@bench.callback()
def _compare(
    context: typer.Context,
    workload: Annotated[
        str, typer.Option(metavar="NAME", help="A workload, such as digits, or module:object.")
    ] = "digits",
    trainer: TrainerOption = None,
    baseline: Annotated[
        str, typer.Option(metavar="RECIPE", help="What the recipes are compared with.")
    ] = "none",
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RECIPE",
            help="Names with + and - between them, or a YAML file; with @EPOCHS behind it a length"
            " of its own; repeatable.",
            show_default="demo",
        ),
    ] = None,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Add each algorithm alone, and all but each.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 8,
    first_seed: Annotated[
        int, typer.Option(min=0, help="The first of them: a confirmation needs fresh ones.")
    ] = 0,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Length of each run.", show_default="the workload's")
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            metavar="auto|VALUE",
            help="Accuracy to reach, in (0, 1]; auto is the median of the baseline's final ones.",
        ),
    ] = "auto",
    delta: Annotated[
        float, typer.Option(min=0, help="Loss of final accuracy that does not matter.")
    ] = 0.005,
    tune: Annotated[
        int,
        typer.Option(min=0, help="Trials to tune each arm with first, at least 5; 0 for none."),
    ] = 0,
    share_tuning: Annotated[
        bool,
        typer.Option(
            "--share-tuning", help="Tune the baseline alone, and give all arms its settings."
        ),
    ] = False,
    turn: Annotated[
        int,
        typer.Option(
            min=0, help="Steps of a turn, as the arms alternate; 0 for one run after another."
        ),
    ] = 20,
    price: Annotated[
        float | None,
        typer.Option("--price-per-hour", help="Of the machine, to report costs."),
    ] = None,
    plugin: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE", help="A module with mosaic's hooks to load; repeatable."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write progress and the summary as JSON, for programs.")
    ] = False,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder to look for the data first.")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder of the runs and their summary; what is there is kept.")
    ] = Path("mosaic-bench"),
) -> None:
    """Tell with an error bar whether recipes train faster, on the same seeds as a baseline.

    Interrupted, it goes on where it was: each finished run is a file, and none is done twice. The
    commands below measure what a recipe costs.
    """
    if context.invoked_subcommand is not None:
        return
    with told():
        from mosaic_core import plugins
        from mosaic_core.bench import report, summary
        from mosaic_core.bench.comparison import compare
        from mosaic_core.bench.display import display
        from mosaic_core.bench.plan import BASELINE, Arm, Plan, ablation
        from mosaic_core.bench.runs import Store
        from mosaic_core.bench.turns import runner

        for module in plugin or []:
            plugins.load(module)
        adapter, chosen = trainer_named(trainer), plugins.workload(workload)
        report.check(price)
        if output.exists() and not output.is_dir():
            raise ValueError(f"mosaic: --output must be a folder, got the file {output}")

        length, texts = epochs or chosen.epochs, recipe or ["demo"]
        arms = {BASELINE: _arm(baseline, length)[1]}
        for name, arm in (_arm(text, length) for text in texts):
            if name in arms:
                raise ValueError(f"mosaic: two arms are called {name!r}")
            arms[name] = arm
        if ablate:
            if len(texts) != 1:
                raise ValueError(f"mosaic: --ablate needs one recipe, got {len(texts)}")
            parts = ablation(arm.recipe)
            arms |= {name: Arm(part, arm.epochs) for name, part in parts.items()}
        for each in arms.values():
            adapter.check(each.recipe)
        plan = Plan(
            workload=chosen,
            trainer=adapter.name,
            arms=arms,
            seeds=range(first_seed, first_seed + seeds),
            target=None if target == "auto" else number("--target", target),
            delta=delta,
        )
        console = Console()
        if not as_json:
            console.print(f"{chosen.name} with {trainer_text(adapter)}, {seeds} seeds")
        trials = (tune + 1) * (1 if share_tuning else len(arms)) if tune else 0
        with (
            display(console, trials + len(arms) * seeds, as_json=as_json) as shown,
            runner(
                chosen,
                adapter.load("trainer"),
                data_dir,
                shown.step,
                turn=turn,
                plugins=plugin or (),
            ) as perform,
        ):
            comparison = compare(
                plan,
                perform,
                Store(output / "runs"),
                trials=tune,
                shared=share_tuning,
                done=shown.done,
            )
        (output / "summary.json").write_text(summary.to_json(comparison), encoding="utf-8")
        (output / "summary.md").write_text(summary.to_markdown(comparison), encoding="utf-8")
        html = report.to_html(comparison, price=price)
        (output / "report.html").write_text(html, encoding="utf-8")
        if as_json:
            console.out(json.dumps({"event": "summary", "file": str(output / "summary.json")}))
            return
        console.print(_table(comparison))
        for name, verdict in comparison.verdicts.items():
            console.print(f"{name}: {verdict}", highlight=False)
        console.print(f"Report: {output / 'report.html'}")


def _arm(text: str, epochs: int) -> "tuple[str, Arm]":
    """Return what a person asks for as ``RECIPE`` or ``RECIPE@EPOCHS``, with its name."""
    from mosaic_core import plugins
    from mosaic_core.bench.plan import Arm

    recipe, at, own = text.partition("@")
    if at and not (own.isdecimal() and int(own)):
        raise ValueError(f"mosaic: a length must be a number of epochs, got {text!r}")
    path = Path(recipe)
    name = path.stem if path.suffix in (".yaml", ".yml") else recipe
    return name + at + own, Arm(plugins.recipe(recipe), int(own) if own else epochs)


def _table(comparison: "Comparison") -> Table:
    table = Table("arm", title=f"Target {comparison.target:.1%}")
    for column in ("epochs", "final accuracy", "seconds", "ms/step", "MiB"):
        table.add_column(column, justify="right")
    for name, arm in comparison.plan.arms.items():
        final, records = comparison.final(name), comparison.records[name]
        table.add_row(
            name,
            str(arm.epochs),
            f"{mean(final):.1%}" + (f" ± {stdev(final):.1%}" if len(final) > 1 else ""),
            f"{mean(record.seconds for record in records):.1f}",
            f"{comparison.ms_per_step(name):.1f}",
            f"{records[0].memory / 2**20:.1f}",
        )
    return table


@bench.command("overhead")
def bench_overhead(
    trainer: TrainerOption = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to count for each arm.")] = 2000,
) -> None:
    """Measure what an empty recipe costs a step over an empty callback."""
    with told():
        from rich.progress import Progress

        from mosaic_core.bench.overhead import measure

        adapter, console = trainer_named(trainer), Console()
        with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
            task = bar.add_task(adapter.title)
            arms = measure(
                adapter.load("overhead"),
                steps,
                lambda done, total: bar.update(task, completed=done, total=total),
            )
        table = Table("arm", title=f"Overhead with {trainer_text(adapter)}")
        for column in ("µs/step", "µs over the empty callback", "quartiles of blocks"):
            table.add_column(column, justify="right")
        for arm in arms:
            over = (f"{arm.over:+.0f}", "{:+.0f} to {:+.0f}".format(*arm.spread))
            table.add_row(arm.name, f"{arm.step:.0f}", *(over if arm is not arms[0] else ("", "")))
        console.print(table)


@bench.command("kernels")
def bench_kernels(
    blocks: Annotated[int, typer.Option(min=2, help="Blocks to time for each library.")] = 21,
    output: Annotated[
        Path | None, typer.Option(help="Write the figures and the environment as JSON.")
    ] = None,
) -> None:
    """Time our functions beside those of other libraries that are installed, in turns."""
    with told():
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


@bench.command("controls")
def bench_controls(
    workload: Annotated[str, typer.Option(metavar="NAME", help="A workload.")] = "digits",
    trainer: TrainerOption = None,
    comparisons: Annotated[
        int, typer.Option(min=1, help="Comparisons of a recipe with itself, of 6 seeds each.")
    ] = 40,
    epochs: Annotated[int, typer.Option(min=1, help="Length of each run.")] = 4,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder to look for the data first.")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder of the runs and of controls.json; what is there is kept.")
    ] = Path("mosaic-controls"),
) -> None:
    """Test the tool on comparisons of which the answer is known."""
    with told():
        from mosaic_core import plugins
        from mosaic_core.bench import controls
        from mosaic_core.bench.display import display
        from mosaic_core.bench.runs import Store
        from mosaic_core.bench.turns import runner

        plugins.load(controls.__name__)
        adapter, chosen, console = trainer_named(trainer), plugins.workload(workload), Console()
        train, runs = adapter.load("trainer"), 4 * controls.seeds_of(comparisons)
        with (
            display(console, runs) as shown,
            runner(chosen, train, data_dir, shown.step, plugins=(controls.__name__,)) as perform,
        ):
            results = controls.run(
                chosen,
                adapter.name,
                perform,
                Store(output / "runs"),
                comparisons=comparisons,
                epochs=epochs,
                done=shown.done,
            )
        text = controls.to_json(results, chosen, adapter.name, epochs)
        (output / "controls.json").write_text(text, encoding="utf-8")
        table = Table("control", "found", title=f"{chosen.name} with {trainer_text(adapter)}")
        for column in ("seeds", "right", "at least", "passed"):
            table.add_column(column, justify="right")
        for name, result in results.items():
            found = ", ".join(f"{count} {finding}" for finding, count in result.findings.items())
            right = (f"{result.right:.0%}", f"{result.least:.0%}")
            table.add_row(name, found, str(result.seeds), *right, "yes" if result.passed else "no")
        console.print(table)
        if not all(result.passed for result in results.values()):
            raise typer.Exit(1)


@bench.command("publish")
def bench_publish(
    folder: Annotated[Path, typer.Argument(help="Folder of summaries, such as bench/results.")],
) -> None:
    """Write what summaries show of each algorithm into the cards of the catalogue."""
    with told():
        from mosaic_core import measured

        measured.publish(folder)
        typer.echo(f"{measured.PATH}: written")
