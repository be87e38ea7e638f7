"""The commands of ``mosaic bench`` beside the comparison; importing this file adds them to it.

Heavy imports stay inside the commands that need them.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mosaic_core.cli_bench import bench
from mosaic_core.cli_common import TrainerOption, told, trainer_named, trainer_text


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
        from mosaic_core.bench.turns import Turns

        plugins.load(controls.__name__)
        adapter, chosen, console = trainer_named(trainer), plugins.workload(workload), Console()
        train, runs = adapter.load("trainer"), controls.runs_of(comparisons)
        with (
            display(console, runs) as shown,
            Turns(chosen, train, data_dir, shown.step, plugins=(controls.__name__,)) as perform,
        ):
            results, trials = controls.run(
                chosen,
                adapter.name,
                perform,
                Store(output / "runs"),
                comparisons=comparisons,
                epochs=epochs,
                done=shown.done,
            )
        text = controls.to_json(results, trials, chosen, adapter.name, epochs)
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


@bench.command("profile")
def bench_profile(
    summaries: Annotated[
        list[Path], typer.Argument(help="Files summary.json, one for each workload.")
    ],
    tau_max: Annotated[
        float, typer.Option(help="How many times the best time still counts; above 1.")
    ] = 4.0,
) -> None:
    """Rank arms over several workloads by the area under their performance profiles."""
    with told():
        from mosaic_core.bench.profiles import median_times, performance_ratios, profile_area

        workloads, times = median_times(summaries)
        ratios = performance_ratios(list(times.values()))
        areas = profile_area(ratios, tau_max)
        table = Table("arm", title=f"Times the best median time; area up to {tau_max:g}")
        for column in (*workloads, "area"):
            table.add_column(column, justify="right")
        for area, arm, row in sorted(
            zip(areas.tolist(), times, ratios.tolist(), strict=True), key=lambda item: -item[0]
        ):
            cells = ("missed" if ratio == float("inf") else f"{ratio:.2f}" for ratio in row)
            table.add_row(arm, *cells, f"{area:.3f}")
        Console().print(table)


@bench.command("publish")
def bench_publish(
    folder: Annotated[Path, typer.Argument(help="Folder of summaries, such as bench/results.")],
) -> None:
    """Write what summaries show of each algorithm into the cards of the catalogue."""
    with told():
        from mosaic_core import measured

        measured.publish(folder)
        typer.echo(f"{measured.PATH}: written")
