"""What was measured of each algorithm: lines for its card, taken from the results of benchmarks.

``measured.json`` beside this file holds them; ``mosaic bench publish`` writes it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mosaic_core.recipe import Recipe

__all__ = ["PATH", "collect", "lines", "publish"]

PATH = Path(__file__).with_suffix(".json")


def collect(folder: Path) -> dict[str, list[str]]:
    """Return what the summaries in a folder say of algorithms that were added alone.

    Args:
        folder: Of ``summary.json`` files of ``mosaic bench``, under any name; other files are left
            alone.

    Returns:
        Lines by algorithm, in the order of the files' names.

    Raises:
        ValueError: If there is no summary in it.
    """
    found: dict[str, list[str]] = {}
    summaries = 0
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        if "arms" not in data:
            continue
        summaries += 1
        for arm in data["arms"].values():
            recipe = Recipe.from_yaml(arm["recipe"])
            if "verdict" in arm and len(recipe) == 1:
                found.setdefault(recipe.algorithms[0].name, []).append(_line(data, arm, recipe))
    if not summaries:
        raise ValueError(f"mosaic: no summary of a benchmark lies in {folder}")
    return dict(sorted(found.items()))


def _line(data: Mapping[str, Any], arm: Mapping[str, Any], recipe: Recipe) -> str:
    where = data["environment"]
    gain = arm["verdict"]["accuracy"]["gain"]
    text = f"{data['workload']} with {data['trainer']}, {recipe.algorithms[0]!r}:"
    text += f" {arm['verdict']['text']}"
    if "final metric" not in text:
        text += f"; final accuracy {100 * gain['estimate']:+.1f} points"
    return f"{text} ({where['machine']}, {where['threads']} threads, {where['date']})"


def publish(folder: Path, path: Path = PATH) -> None:
    """Write what :func:`collect` returns."""
    path.write_text(json.dumps(collect(folder), indent=1) + "\n", encoding="utf-8")


def lines(algorithm: str) -> list[str]:
    """Return what was measured of an algorithm; nothing, if nothing was."""
    found: dict[str, list[str]] = json.loads(PATH.read_text(encoding="utf-8"))
    return found.get(algorithm, [])
