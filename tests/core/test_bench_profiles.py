"""Arms over several workloads, from the summaries of comparisons."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from mosaic_core.bench.profiles import median_times
from mosaic_core.cli import app


def summary(folder, workload, **times):
    path = folder / f"{workload}.json"
    arms = {name: {"seconds_to_target": of} for name, of in times.items()}
    path.write_text(json.dumps({"workload": workload, "trainer": "torch", "arms": arms}))
    return path


def test_the_median_counts_misses(tmp_path):
    files = [
        summary(tmp_path, "a", baseline=[3.0, 1.0, 2.0], MixUp=[1.0, None, 3.0], SAM=[1.0] * 3),
        summary(tmp_path, "b", baseline=[4.0, 2.0], MixUp=[None, 1.0]),
    ]
    workloads, times = median_times(files)
    assert workloads == ["a with torch", "b with torch"]
    assert times == {"baseline": [2.0, 4.0], "MixUp": [3.0, np.inf]}


def test_the_command_ranks_by_area(tmp_path):
    files = [
        summary(tmp_path, "a", baseline=[2.0], fast=[1.0], lost=[None]),
        summary(tmp_path, "b", baseline=[2.0], fast=[1.0], lost=[None]),
    ]
    result = CliRunner().invoke(app, ["bench", "profile", *map(str, files)])
    assert result.exit_code == 0, result.output
    order = [line for line in result.output.splitlines() if "│" in line]
    assert [next(n for n in ("fast", "baseline", "lost") if n in line) for line in order] == [
        "fast",
        "baseline",
        "lost",
    ]
    # (4 - 2) / (4 - 1) on both.
    assert [line.split("│")[-2].strip() for line in order] == ["1.000", "0.667", "0.000"]
    assert "missed" in order[2]


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"workload": "a", "trainer": "b", "arms": []}'])
def test_what_is_no_summary_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="must be a summary"):
        median_times([tmp_path / "x.json"])


def test_summaries_must_differ_and_share_arms(tmp_path):
    a, b = summary(tmp_path, "a", x=[1.0], y=[1.0]), summary(tmp_path, "b", z=[1.0], y=[1.0])
    with pytest.raises(ValueError, match="must differ in workload, got a with torch twice"):
        median_times([a, a])
    with pytest.raises(ValueError, match="two arms or more in common"):
        median_times([a, b])
