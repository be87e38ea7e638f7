"""Recipes against a baseline: the order of the runs, the target, the summary."""

import json
import math

import pytest
from typer.testing import CliRunner

from mosaic_core import Recipe
from mosaic_core.algorithms import EMA, SAM, MixUp
from mosaic_core.bench.comparison import BASELINE, Plan, compare
from mosaic_core.cli import app
from mosaic_core.training import Evaluation, History
from mosaic_core.workloads import WORKLOADS

DIGITS = next(w for w in WORKLOADS if w.name == "digits")
ARMS = {BASELINE: Recipe(), "MixUp": Recipe([MixUp()]), "SAM": Recipe([SAM()])}


def plan(arms=ARMS, seeds=range(6), **options) -> Plan:
    return Plan(DIGITS, "torch", arms, seeds, 10, **options)


class Fake:
    """Learns faster by a factor for each algorithm, and notes the order of the runs."""

    def __init__(self, factors=(), cost=(), ceiling=0.9):
        self.factors, self.cost, self.ceiling = dict(factors), dict(cost), ceiling
        self.order = []

    def __call__(self, workload, recipe, *, seed, epochs, data_dir, report):
        names = [a.name for a in recipe]
        self.order.append((names, seed))
        speed = math.prod(self.factors.get(name, 1.0) for name in names)
        seconds = math.prod(self.cost.get(name, 1.0) for name in names)
        noise = 1 + 0.01 * math.sin(17.0 * seed)

        def accuracy(epoch):
            return self.ceiling * (1 - math.exp(-0.5 * speed * noise * epoch))

        points = (
            Evaluation(15 * e, e, seconds * noise * e, accuracy(e)) for e in range(1, epochs + 1)
        )
        return History(tuple(points), 1e3 * seconds / 15, {})


def test_arms_alternate_back_and_forth():
    assert plan(seeds=[4, 5]).order() == [
        (BASELINE, 4),
        ("MixUp", 4),
        ("SAM", 4),
        ("SAM", 5),
        ("MixUp", 5),
        (BASELINE, 5),
    ]


def test_runs_are_done_in_this_order_and_once(tmp_path):
    fake = Fake()
    first = compare(plan(seeds=range(2)), fake, tmp_path)
    assert fake.order == [
        ([], 0),
        (["MixUp"], 0),
        (["SAM"], 0),
        (["SAM"], 1),
        (["MixUp"], 1),
        ([], 1),
    ]
    again = compare(plan(seeds=range(3)), fake, tmp_path)
    assert fake.order[6:] == [([], 2), (["MixUp"], 2), (["SAM"], 2)]
    assert [list(records)[:2] for records in again.records.values()] == [
        list(records) for records in first.records.values()
    ]


def test_the_target_is_the_median_of_the_baseline_alone(tmp_path):
    result = compare(plan(), Fake(factors={"MixUp": 5, "SAM": 5}), tmp_path)
    final = sorted(result.final(BASELINE))
    assert result.target == pytest.approx((final[2] + final[3]) / 2)
    assert compare(plan(target=0.5), Fake(), tmp_path).target == 0.5


def test_verdicts_follow_the_runs(tmp_path):
    fake = Fake(factors={"MixUp": 2.0}, cost={"SAM": 2.0})
    result = compare(plan(target=0.6), fake, tmp_path)
    assert result.verdicts.keys() == {"MixUp", "SAM"}
    assert result.verdicts["MixUp"].finding == "faster"
    assert result.verdicts["SAM"].finding == "slower"
    assert result.verdicts["SAM"].per_step == pytest.approx(0.5)
    assert result.verdicts["MixUp"].steps.ratio.estimate > 1.2


def test_a_recipe_against_itself_is_not_found_to_differ(tmp_path):
    arms = {BASELINE: Recipe([EMA("0.1dur")]), "same": Recipe([EMA("0.1dur")])}
    result = compare(plan(arms, target=0.6), Fake(), tmp_path)
    ratio = result.verdicts["same"].seconds.ratio
    assert ratio.low <= 1 <= ratio.high
    assert result.verdicts["same"].finding == "cannot tell"


def test_the_summary_holds_all_figures(tmp_path):
    result = compare(plan(seeds=[3]), Fake(), tmp_path)  # of one seed intervals are infinite
    data = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert data["target"] == result.target
    assert list(data["arms"]) == list(ARMS)
    assert data["arms"]["MixUp"]["verdict"]["seconds"]["ratio"]["high"] is None
    for arm in data["arms"].values():
        assert all((tmp_path / "runs" / name).is_file() for name in arm["runs"])
        assert Recipe.from_yaml(arm["recipe"]) in ARMS.values()
    text = (tmp_path / "summary.md").read_text()
    assert all(f"| {arm} |" in text for arm in ARMS)
    assert str(result.verdicts["SAM"]) in text


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"arms": {BASELINE: Recipe()}}, r"recipes must be a baseline and at least one more"),
        ({"seeds": []}, r"seeds must hold at least one"),
        ({"target": 0.0}, r"target must be in \(0, 1\], got 0.0"),
    ],
)
def test_bad_plans(options, match):
    with pytest.raises(ValueError, match=match):
        plan(**options)


def test_the_command_compares_on_real_data(tmp_path):
    command = ["bench", "compare", "--trainer", "torch", "--recipe", "MixUp+LabelSmoothing"]
    command += ["--seeds", "2", "--epochs", "2", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "MixUp+LabelSmoothing: " in result.output
    assert "2 seeds" in result.output
    assert len(list((tmp_path / "out" / "runs").glob("*.json"))) == 4
    again = CliRunner().invoke(app, command)
    assert again.output == result.output  # nothing was trained again


def test_the_command_refuses_in_a_line():
    for option in (["--recipe", "MixUpp"], ["--workload", "digit"], ["--target", "2"]):
        result = CliRunner().invoke(app, ["bench", "compare", "--trainer", "torch", *option])
        assert result.exit_code == 2
        assert len(result.output.strip().splitlines()) == 1
