"""What cards say was measured is what the committed results show."""

import json
from pathlib import Path

import pytest

from mosaic_core import catalog, measured, plugins

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def test_what_is_shipped_is_what_the_results_show():
    assert json.loads(measured.PATH.read_text()) == measured.collect(RESULTS)


# No network of a shipped workload has the nn.Dropout that GyroDropout replaces.
@pytest.mark.parametrize("name", sorted(plugins.algorithms().keys() - {"GyroDropout"}))
def test_every_card_shows_its_own_lines(name):
    lines = measured.lines(name)
    assert lines
    text = " ".join(catalog.card(name).split())
    for line in lines:
        assert f"{name}(" in line
        assert " ".join(line.split()) in text


def test_a_folder_without_summaries_is_refused(tmp_path):
    (tmp_path / "other.json").write_text('{"kernels": []}')
    with pytest.raises(ValueError, match="no summary of a benchmark lies in"):
        measured.collect(tmp_path)


def test_nothing_measured_is_no_line():
    assert measured.lines("NoSuchAlgorithm") == []
