"""The command line, as a person runs it."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mosaic_core import catalog, datasets, plugins
from mosaic_core.cli import app

ALGORITHMS = plugins.algorithms()
README = Path(__file__).parents[2] / "README.md"


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_list_shows_every_algorithm():
    for options in ([], ["--markdown"]):
        output = run("list", *options)
        assert all(name in output for name in ALGORITHMS)


@pytest.mark.parametrize("options", [[], ["--markdown"]])
def test_the_matrix_shows_every_mode_and_what_is_refused(options, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    output = run("list", "--matrix", *options)
    for adapter in plugins.adapters().values():
        assert adapter.title in output
        for mode in adapter.modes:
            refused = [n for n, a in ALGORITHMS.items() if adapter.missing(a, mode)]
            (row,) = (r for r in catalog.matrix_rows()[adapter.title] if r[0] == mode.name)
            assert row[1] == f"{len(ALGORITHMS) - len(refused)} of {len(ALGORITHMS)}"
            assert all(name in row[2] for name in refused)
            assert mode.name in output
            assert row[1] in output


def test_the_table_is_derived():
    rows = {row.cells()[0]: row.cells() for row in catalog.table()}
    for name, algorithm in ALGORITHMS.items():
        (cells,) = (cells for key, cells in rows.items() if name in key)
        assert all(need.value in cells[2] for need in algorithm.needs())
        titles = [a.title for a in plugins.adapters().values() if a.supports(algorithm)]
        assert all(title in cells[3] for title in titles)


def test_the_readme_is_checked_and_written(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text(README.read_text())
    run("list", "--check-readme", copy)
    copy.write_text(README.read_text().replace("LabelSmoothing", "LabelRoughening"))
    assert "stale" in run("list", "--check-readme", copy, code=1)
    run("list", "--write-readme", copy)
    run("list", "--check-readme", copy)
    copy.write_text("no markers")
    run("list", "--write-readme", copy, code=2)
    assert copy.read_text() == "no markers"


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_show_tells_all_of_the_card(name):
    output = " ".join(run("show", name).split())
    card = ALGORITHMS[name].card
    for text in (card.summary, card.effect, card.use_when, card.interactions):
        assert " ".join(text.split()) in output


def test_show_suggests_the_nearest_name():
    assert "MixUp" in run("show", "MixUpp", code=2)


def test_doctor_finds_the_adapter():
    assert "lightning" in run("doctor").lower()


def test_doctor_survives_a_broken_plugin(monkeypatch):
    broken = metadata.EntryPoint("broken", "no_such_module_at_all", "mosaic")
    found = [*metadata.entry_points(group="mosaic"), broken]
    monkeypatch.setattr(metadata, "entry_points", lambda **_: found)
    output = run("doctor", code=1)
    assert "broken" in output
    assert "no_such_module_at_all" in output


def test_listing_imports_no_trainer():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom mosaic_core.cli import app\n"
        "assert CliRunner().invoke(app, ['list']).exit_code == 0\n"
        "print([m for m in ('pytorch_lightning', 'lightning', 'fastai', 'transformers',"
        " 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("trainer", ["torch", "lightning"])
def test_demo_prints_a_table_and_saves_a_plot(tmp_path, trainer):
    plot = tmp_path / "plot.png"
    options = ("--trainer", trainer, "--epochs", 1, "--seeds", 1, "--output", plot)
    output = run("demo", *options)
    assert "baseline" in output
    assert "ms/step" in output
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options",
    [
        ("--trainer", "nothing"),
        ("--workload", "nothing"),
        ("--recipe", "nothing"),
        ("--output", "no/such/folder/plot.png"),
        ("--output", "plot.nothing"),
    ],
    ids=str,
)
def test_demo_refuses_what_it_does_not_know_before_training(options):
    run("demo", *options, code=2)


def test_missing_data_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_DEBIAN", ())
    monkeypatch.delenv("MOSAIC_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    output = run("demo", "--workload", "fashion-mnist", "--trainer", "torch", code=2)
    assert "dataset-fashion-mnist" in output
    assert "--data-dir" in output
    assert not (tmp_path / "cache" / "mosaic").exists()  # matplotlib may have its own


def test_overhead_measures_all_arms():
    output = run("bench", "overhead", "--trainer", "torch", "--steps", 200)
    assert all(arm in output for arm in ("empty callback", "empty recipe", "NoOp"))
