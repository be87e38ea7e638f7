"""A comparison in JSON and in Markdown: ``summary.json`` and ``summary.md``."""

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mosaic_core.bench.comparison import Comparison
from mosaic_core.bench.runs import SCHEMA

__all__ = ["to_json", "to_markdown"]


def to_json(comparison: Comparison) -> str:
    """Return all figures and the names of the files they come from; infinity is null."""
    plan = comparison.plan
    data = {
        "schema": SCHEMA,
        "workload": plan.workload.name,
        "trainer": plan.trainer,
        "seeds": list(plan.seeds),
        "target": comparison.target,
        "delta": plan.delta,
        "environment": dict(comparison.records[plan.baseline][0].environment),
        "arms": {arm: _arm(comparison, arm) for arm in plan.arms},
    }
    return json.dumps(_finite(data), indent=1, allow_nan=False) + "\n"


def _arm(comparison: Comparison, name: str) -> dict[str, Any]:
    arm, records = comparison.plan.arms[name], comparison.records[name]
    data: dict[str, Any] = {
        "recipe": arm.recipe.to_yaml(),
        "epochs": arm.epochs,
        "settings": dict(records[0].job.settings),
        "final_accuracy": comparison.final(name),
        "seconds": [record.seconds for record in records],
        "seconds_to_target": [o.seconds if o.reached else None for o in comparison.outcomes(name)],
        "ms_per_step": comparison.ms_per_step(name),
        "start_up_seconds": [record.start_up for record in records],
        "phases_ms": dict(records[0].phases),
        "memory_bytes": records[0].memory,
        "runs": [record.job.file for record in records],
        "runs_in_turns_with_baseline": comparison.in_turns(name),
    }
    if name in comparison.trials:
        data["trials"] = [asdict(trial) for trial in comparison.trials[name]]
    if name in comparison.verdicts:
        verdict = comparison.verdicts[name]
        data["verdict"] = {"text": str(verdict), **asdict(verdict)}
    return data


def to_markdown(comparison: Comparison) -> str:
    """Return a table of the arms, and a line for what each recipe shows."""
    plan = comparison.plan
    seeds = len(plan.seeds)
    lines = [
        f"# {plan.workload.name} with {plan.trainer}",
        "",
        f"Target {comparison.target:.1%}, {seeds} seeds.",
        "",
        "| Arm | Epochs | Final accuracy | ms/step | MiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, arm in plan.arms.items():
        final = comparison.final(name)
        spread = f" ± {statistics.stdev(final):.1%}" if seeds > 1 else ""
        memory = comparison.records[name][0].memory / 2**20
        lines.append(
            f"| {name} | {arm.epochs} | {statistics.mean(final):.1%}{spread}"
            f" | {comparison.ms_per_step(name):.1f} | {memory:.1f} |"
        )
    lines += ["", *(f"- {name}: {verdict}" for name, verdict in comparison.verdicts.items())]
    return "\n".join(lines) + "\n"


def _finite(value: Any) -> Any:
    """Return a copy in which what JSON has no number for is None."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
