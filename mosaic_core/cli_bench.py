"""``mosaic bench``: what a recipe gains and what it costs.

Heavy imports stay inside the commands that need them.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mosaic_core.cli_common import TrainerOption, told, trainer_named, trainer_text

__all__ = ["bench"]

bench = typer.Typer(help="Measure what a recipe gains and what it costs.", no_args_is_help=True)


@bench.command("compare")
def bench_compare(
    workload: Annotated[str, typer.Option(help="A workload, such as digits.")] = "digits",
    trainer: TrainerOption = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RECIPE", help="Names with + and - between them, or YAML; repeatable."
        ),
    ] = None,
    baseline: Annotated[
        str, typer.Option(metavar="RECIPE", help="What they are compared with.")
    ] = "none",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 8,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Length of each run.", show_default="the workload's")
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            help="Accuracy to reach, in (0, 1].", show_default="the median of the baseline"
        ),
    ] = None,
    delta: Annotated[
        float, typer.Option(min=0, help="Loss of final accuracy that does not matter.")
    ] = 0.005,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder to look for the data first.")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder of the runs and their summary; what is there is kept.")
    ] = Path("mosaic-bench"),
) -> None:
    """Tell with an error bar whether recipes train faster, on the same seeds as a baseline."""
    with told():
        import torch
        from rich.progress import Progress

        from mosaic_core import plugins
        from mosaic_core.bench.comparison import BASELINE, Plan, compare
        from mosaic_core.bench.runs import Job
        from mosaic_core.training import Update

        adapter, chosen, console = trainer_named(trainer), plugins.workload(workload), Console()
        arms = {BASELINE: plugins.recipe(baseline)}
        arms |= {name: plugins.recipe(name) for name in recipe or ["demo"]}
        length = chosen.epochs if epochs is None else epochs
        plan = Plan(chosen, adapter.name, arms, range(seeds), length, target, delta)
        if chosen.threads is not None:
            torch.set_num_threads(chosen.threads)
        console.print(f"{chosen.name} with {trainer_text(adapter)}, {seeds} seeds, {length} epochs")
        with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
            task = bar.add_task("runs")

            def report(arm: str, job: Job, update: Update) -> None:
                about = f"{arm}, seed {job.seed}"
                bar.update(task, description=about, completed=update.step, total=update.total_steps)

            train = adapter.load("trainer")
            comparison = compare(plan, train, output, data_dir=data_dir, report=report)
        table = Table("arm", title=f"Target {comparison.target:.1%}")
        for column in ("final accuracy", "ms/step"):
            table.add_column(column, justify="right")
        for arm in arms:
            final = comparison.final(arm)
            mean = f"{sum(final) / len(final):.1%}"
            table.add_row(arm, mean, f"{comparison.ms_per_step(arm):.1f}")
        console.print(table)
        for arm, verdict in comparison.verdicts.items():
            console.print(f"{arm}: {verdict}", highlight=False)
        console.print(f"Figures: {output / 'summary.json'}")


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
