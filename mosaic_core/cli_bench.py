"""``mosaic bench``: what a recipe gains and what it costs.

Heavy imports stay inside the commands that need them.
"""

import contextlib
import json
import sys
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
    tuning_seeds: Annotated[int, typer.Option(min=1, help="Seeds of each trial.")] = 3,
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
        from mosaic_core.bench.turns import Trainee, Turns

        if (here := str(Path.cwd())) not in sys.path:
            sys.path.insert(0, here)  # for modules of the user's
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
        what = (chosen, adapter.load("trainer"), data_dir)
        trials = (tune + 1) * tuning_seeds * (1 if share_tuning else len(arms)) if tune else 0
        with (
            display(console, trials + len(arms) * seeds, as_json=as_json) as shown,
            Turns(*what, shown.step, turn=turn, plugins=plugin or ())
            if turn
            else contextlib.nullcontext(Trainee(*what, shown.step)) as perform,
        ):
            try:
                comparison = compare(
                    plan,
                    perform,
                    Store(output / "runs"),
                    trials=tune,
                    tuning_seeds=tuning_seeds,
                    shared=share_tuning,
                    done=shown.done,
                )
            except KeyboardInterrupt:
                typer.echo(
                    f"mosaic: interrupted; what has ended is kept in {output / 'runs'}, and the"
                    " same command goes on from there",
                    err=True,
                )
                raise typer.Exit(130) from None
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
