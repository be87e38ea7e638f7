"""The published schema of summary.json: what we write keeps it, and nothing else does."""

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mosaic_core import Recipe
from mosaic_core.algorithms import EMA, MixUp
from mosaic_core.bench.comparison import compare
from mosaic_core.bench.plan import BASELINE, Arm, Plan
from mosaic_core.bench.runs import Record, Store
from mosaic_core.bench.summary import to_json
from mosaic_core.training import Evaluation, History
from mosaic_core.workloads import WORKLOADS

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/bench-summary.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def summary(folder: Path, seeds: int = 4, target: float | None = None, trials: int = 5) -> Any:
    """Return a real summary, read again."""
    arms = {
        BASELINE: Arm(Recipe(), 8),
        "MixUp": Arm(Recipe([MixUp()]), 8),
        "EMA": Arm(Recipe([EMA("0.1dur")]), 8, {"learning_rate": 0.05}),
    }

    def runner(jobs):
        for job in jobs:
            speed = (1.5 if "MixUp" in job.recipe else 1) * (1 + 0.05 * math.sin(7 * job.seed))
            points = (
                Evaluation(15 * e, e, 0.9 * e, 0.9 * (1 - math.exp(-0.6 * speed * e)))
                for e in range(1, job.epochs + 1)
            )
            together = [job.file for job in jobs]
            phases = {"forward": 1.0, "backward": 2.0}
            yield Record.of(job, History(tuple(points), 60.0, {}), phases=phases, turns=together)

    workload = next(w for w in WORKLOADS if w.name == "digits")
    plan = Plan(workload, "torch", arms, range(seeds), target=target)
    return json.loads(to_json(compare(plan, runner, Store(folder), trials=trials)))


def objects(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every object whose keys the schema fixes."""
    if isinstance(value, dict):
        if not path or path[-1] not in ("arms", "environment", "settings", "phases_ms"):
            yield path
        for key, item in value.items():
            yield from objects(item, (*path, key))
    elif isinstance(value, list):
        for n, item in enumerate(value):
            yield from objects(item, (*path, n))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("options", [{}, {"seeds": 1, "trials": 0}, {"target": 0.999}])
def test_a_summary_keeps_the_schema(tmp_path: Path, options: dict[str, Any]) -> None:
    VALIDATOR.validate(summary(tmp_path, **options))


RESULTS = sorted((Path(__file__).parents[2] / "bench/results").glob("*.json"))
PUBLISHED = [path for path in RESULTS if "arms" in json.loads(path.read_text())]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_published_summaries_keep_it_and_took_turns(path: Path) -> None:
    data = json.loads(path.read_text())
    VALIDATOR.validate(data)
    for name, arm in data["arms"].items():
        if name != "baseline":  # or the machine's other work would be in the ratio of the times
            assert arm["runs_in_turns_with_baseline"] == len(data["seeds"])


def test_an_unknown_or_a_missing_key_fails(tmp_path: Path) -> None:
    data = summary(tmp_path)
    paths = list(objects(data))
    assert ("arms", "MixUp", "verdict", "seconds", "bca") in paths
    assert ("arms", "baseline", "trials", 0) in paths
    for path in paths:
        changed = copy.deepcopy(data)
        at(changed, path)["unknown"] = 1
        assert not VALIDATOR.is_valid(changed), path
        for key in at(data, path):
            if key in ("trials", "verdict"):  # of arms that were tuned; of all but the baseline
                continue
            changed = copy.deepcopy(data)
            del at(changed, path)[key]
            assert not VALIDATOR.is_valid(changed), (*path, key)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema",), 1),
        (("seeds",), []),
        (("target",), 91.0),
        (("arms", "MixUp", "verdict", "finding"), "fast"),
        (("arms", "MixUp", "verdict", "seconds", "misses"), [0]),
        (("arms", "MixUp", "verdict", "adjusted_p"), 1.5),
        (("arms", "MixUp", "final_accuracy"), ["0.9"]),
        (("arms", "MixUp", "epochs"), 2.5),
    ],
)
def test_a_value_of_another_kind_fails(tmp_path: Path, path: tuple[Any, ...], value: Any) -> None:
    data = summary(tmp_path)
    at(data, path[:-1])[path[-1]] = value
    assert not VALIDATOR.is_valid(data)
