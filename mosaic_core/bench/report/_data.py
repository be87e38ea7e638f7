"""What the report shows of a comparison, in numbers."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict

from mosaic_core.bench.comparison import Comparison
from mosaic_core.bench.runs import Record

FINDINGS = ("faster", "slower", "less accurate", "cannot tell")


def ratios(comparison: Comparison, arm: str) -> list[float]:
    """Return the speed-up in seconds of each pair in which both runs reached the target."""
    pairs = zip(
        comparison.outcomes(comparison.plan.baseline), comparison.outcomes(arm), strict=True
    )
    return [a.seconds / b.seconds for a, b in pairs if a.reached and b.reached]


def ranked(comparison: Comparison) -> list[str]:
    """Return the recipes by their speed-up in seconds, the fastest first."""
    verdicts = comparison.verdicts
    return sorted(verdicts, key=lambda arm: -verdicts[arm].seconds.ratio.estimate)


def memory(records: Sequence[Record]) -> float | None:
    """Return the median memory in MiB, None if it was not measured."""
    known = [record.memory / 2**20 for record in records if record.memory]
    return statistics.median(known) if known else None


def phases(records: Sequence[Record]) -> dict[str, float]:
    """Return the median milliseconds of each phase, over the runs that have it."""
    names = dict.fromkeys(name for record in records for name in record.phases)
    return {
        name: statistics.median(r.phases[name] for r in records if name in r.phases)
        for name in names
    }


def embedded(comparison: Comparison) -> str:
    """Return all records as JSON that is safe inside ``<script>``, whatever a name holds.

    Infinity and NaN, which JSON lacks, are null.
    """
    plan = comparison.plan
    data = {
        "workload": plan.workload.name,
        "trainer": plan.trainer,
        "baseline": plan.baseline,
        "target": comparison.target,
        "delta": plan.delta,
        "records": {
            arm: [json.loads(record.to_json()) for record in records]
            for arm, records in comparison.records.items()
        },
        "trials": {
            arm: [asdict(trial) for trial in trials] for arm, trials in comparison.trials.items()
        },
    }
    text = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
