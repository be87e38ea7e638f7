"""Recipes against a baseline: arms, tuning, the target, the summary, the command."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mosaic_core import Recipe
from mosaic_core.algorithms import EMA, SAM, MixUp
from mosaic_core.bench.comparison import compare
from mosaic_core.bench.plan import BASELINE, Arm, Plan, ablation
from mosaic_core.bench.runs import Record, Store
from mosaic_core.bench.summary import to_json, to_markdown
from mosaic_core.bench.tuning import TUNING_SEED, points
from mosaic_core.cli import app
from mosaic_core.training import Evaluation, History
from mosaic_core.workloads import WORKLOADS

DIGITS = next(w for w in WORKLOADS if w.name == "digits")
ARMS = {BASELINE: Recipe(), "MixUp": Recipe([MixUp()]), "SAM": Recipe([SAM()])}


def plan(arms=ARMS, seeds=range(6), **options) -> Plan:
    arms = {name: Arm(recipe, 10) for name, recipe in arms.items()}
    return Plan(DIGITS, "torch", arms, seeds, **options)


class Fake:
    """Learns faster by a factor for each algorithm, and notes the order of the runs."""

    def __init__(self, factors=(), cost=(), ceiling=0.9, best_rate=0.1):
        self.factors, self.cost, self.ceiling = dict(factors), dict(cost), ceiling
        self.best_rate = best_rate
        self.order = []

    def __call__(self, jobs):
        self.order.append([(job.names, job.seed) for job in jobs])
        together = [job.file for job in jobs]
        for job in jobs:
            yield Record.of(job, self.history(job), memory=2**20, turns=together)

    def history(self, job):
        names = [a.name for a in Recipe.from_yaml(job.recipe)]
        speed = math.prod(self.factors.get(name, 1.0) for name in names)
        speed /= 1 + abs(math.log(job.settings["learning_rate"] / self.best_rate))
        seconds = math.prod(self.cost.get(name, 1.0) for name in names)
        noise = 1 + 0.01 * math.sin(17.0 * job.seed)

        def accuracy(epoch):
            return self.ceiling * (1 - math.exp(-0.5 * speed * noise * epoch))

        epochs = range(1, job.epochs + 1)
        points = (Evaluation(15 * e, e, seconds * noise * e, accuracy(e)) for e in epochs)
        return History(tuple(points), 1e3 * seconds / 15, {})


def run(plan, fake, folder, **options):
    return compare(plan, fake, Store(folder), **options)


def test_runs_of_a_seed_are_given_together_and_once(tmp_path):
    fake = Fake()
    first = run(plan(seeds=range(2)), fake, tmp_path)
    names = ("none", "MixUp", "SAM")
    assert fake.order == [[(name, seed) for name in names] for seed in (0, 1)]
    again = run(plan(seeds=range(3)), fake, tmp_path)
    assert fake.order[2:] == [[(name, 2) for name in names]]
    assert [list(records)[:2] for records in again.records.values()] == [
        list(records) for records in first.records.values()
    ]


def test_an_interrupted_group_is_completed(tmp_path):
    whole = run(plan(), Fake(), tmp_path / "whole")
    partly = run(plan(seeds=[0]), Fake(), tmp_path / "killed")
    store, lost = Store(tmp_path / "killed"), partly.records["SAM"][0].job
    (store.folder / lost.file).unlink()
    fake = Fake()
    result = run(plan(), fake, tmp_path / "killed")
    assert fake.order[0] == [("SAM", 0)]
    assert result.verdicts == whole.verdicts
    assert (result.in_turns("MixUp"), result.in_turns("SAM")) == (6, 5)


def test_arms_that_are_alike_are_replicas(tmp_path):
    alike = plan({BASELINE: Recipe(), "same": Recipe(), "again": Recipe()})
    jobs = alike.jobs(0)
    assert [job.replica for job in jobs.values()] == [0, 1, 2]
    assert len({job.file for job in jobs.values()}) == 3
    assert len(run(alike, Fake(), tmp_path).records["again"]) == 6


def test_an_arm_has_a_length_and_settings_of_its_own(tmp_path):
    arms = {
        BASELINE: Arm(Recipe(), 10),
        "short": Arm(Recipe(), 3),
        "low": Arm(Recipe(), 10, {"learning_rate": 0.01}),
    }
    jobs = Plan(DIGITS, "torch", arms, [0]).jobs(0)
    assert [job.epochs for job in jobs.values()] == [10, 3, 10]
    assert [job.settings["learning_rate"] for job in jobs.values()] == [0.1, 0.1, 0.01]
    assert jobs["low"].of(DIGITS) == dataclasses.replace(DIGITS, learning_rate=0.01)
    assert jobs["low"].settings["batch_size"] == DIGITS.batch_size
    result = run(Plan(DIGITS, "torch", arms, range(3)), Fake(), tmp_path)
    assert result.verdicts["low"].finding == "less accurate"
    assert result.verdicts["short"].seconds.misses[1] == 3


def test_the_target_is_the_median_of_the_baseline_alone(tmp_path):
    result = run(plan(), Fake(factors={"MixUp": 5, "SAM": 5}), tmp_path)
    final = sorted(result.final(BASELINE))
    assert result.target == pytest.approx((final[2] + final[3]) / 2)
    assert run(plan(target=0.5), Fake(), tmp_path).target == 0.5


def test_every_record_is_told_of(tmp_path):
    told = []
    run(plan(seeds=range(2)), Fake(), tmp_path, done=told.append)
    run(plan(seeds=range(3)), Fake(), tmp_path, done=told.append)
    assert len(told) == 6 + 9


# Tuning.


def test_points_are_spread_over_the_ranges():
    space = {"learning_rate": (0.01, 1.0), "weight_decay": (1e-5, 1e-1)}
    found = points(space, 16)
    assert found[:5] == points(space, 5)
    for name, (low, high) in space.items():
        places = sorted(math.log(p[name] / low) / math.log(high / low) for p in found)
        # Of a (0, 4, 2)-net in base 2, each sixteenth of either range holds one point.
        assert [math.floor(16 * place) for place in places] == list(range(16))


@pytest.mark.parametrize("ends", [(0.0, 1.0), (2.0, 1.0), (1.0, 1.0), (1.0, math.inf)])
def test_points_need_a_range(ends):
    with pytest.raises(ValueError, match=r"points: x must range from above 0 upwards, got"):
        points({"x": ends}, 5)


def test_each_arm_gets_its_best_settings_after_as_many_trials(tmp_path):
    fake = Fake(best_rate=0.25)
    result = run(plan(), fake, tmp_path, trials=6)
    assert {name: len(trials) for name, trials in result.trials.items()} == dict.fromkeys(ARMS, 7)
    tried = [0.1, *(p["learning_rate"] for p in points(DIGITS.search_space, 6))]
    best = min(tried, key=lambda rate: abs(math.log(rate / 0.25)))
    assert best != 0.1
    for records in result.records.values():
        assert {record.job.settings["learning_rate"] for record in records} == {best}
        assert {record.job.seed for record in records} == set(plan().seeds)
    assert fake.order[:3] == [
        [(name, TUNING_SEED + n) for name in ("none", "MixUp", "SAM")] for n in range(3)
    ]


def test_a_trial_is_the_mean_over_its_seeds(tmp_path):
    class Lucky(Fake):
        """One point does well on one seed, and badly on the others."""

        def __call__(self, jobs):
            for record in super().__call__(jobs):
                job, last = record.job, record.evaluations[-1]
                accuracy = 0.5
                if job.settings["learning_rate"] == lucky:
                    accuracy = 0.9 if job.seed == TUNING_SEED else 0.2
                points = (dataclasses.replace(last, accuracy=accuracy),)
                yield Record.of(job, History(points, record.ms_per_step, {}))

    lucky = points(DIGITS.search_space, 5)[1]["learning_rate"]

    def tuned(folder, **options):
        result = run(plan(target=0.5), Lucky(), tmp_path / folder, trials=5, **options)
        trial = next(t for t in result.trials[BASELINE] if t.settings.get("learning_rate") == lucky)
        return trial, result.plan.arms[BASELINE].settings

    trial, settings = tuned("one", tuning_seeds=1)
    assert (trial.accuracy, trial.seeds, settings) == (0.9, 1, {"learning_rate": lucky})
    trial, settings = tuned("more")
    assert (trial.accuracy, trial.seeds, settings) == (pytest.approx(1.3 / 3), 3, {})


def test_tuning_that_is_shared_is_the_baselines(tmp_path):
    result = run(plan(), Fake(best_rate=0.25), tmp_path, trials=5, shared=True)
    assert list(result.trials) == [BASELINE]
    rates = {r.job.settings["learning_rate"] for rs in result.records.values() for r in rs}
    assert len(rates) == 1
    assert rates != {0.1}


def test_few_trials_are_refused(tmp_path):
    with pytest.raises(ValueError, match="tune: count must be at least 5, got 4"):
        run(plan(), Fake(), tmp_path, trials=4)
    with pytest.raises(ValueError, match="tune: seeds must be at least 1, got 0"):
        run(plan(), Fake(), tmp_path, trials=5, tuning_seeds=0)


def test_an_ablation_has_each_alone_and_all_but_each():
    parts = ablation(Recipe([MixUp(0.3), EMA("0.1dur"), SAM()]))
    assert {name: [a.name for a in part] for name, part in parts.items()} == {
        "+MixUp": ["MixUp"],
        "+SAM": ["SAM"],
        "+EMA": ["EMA"],
        "-MixUp": ["SAM", "EMA"],
        "-SAM": ["MixUp", "EMA"],
        "-EMA": ["MixUp", "SAM"],
    }
    assert parts["+MixUp"] == Recipe([MixUp(0.3)])
    assert list(ablation(Recipe([MixUp(), SAM()]))) == ["+MixUp", "+SAM"]
    with pytest.raises(ValueError, match="recipe must have at least two algorithms, got 1"):
        ablation(Recipe([MixUp()]))


# What the runs show.


def test_verdicts_follow_the_runs(tmp_path):
    fake = Fake(factors={"MixUp": 2.0}, cost={"SAM": 2.0})
    result = run(plan(target=0.6), fake, tmp_path)
    assert result.verdicts.keys() == {"MixUp", "SAM"}
    assert result.verdicts["MixUp"].finding == "faster"
    assert result.verdicts["SAM"].finding == "slower"
    assert result.verdicts["SAM"].per_step == pytest.approx(0.5)
    assert result.verdicts["MixUp"].steps.ratio.estimate > 1.2


def test_a_recipe_against_itself_is_not_found_to_differ(tmp_path):
    arms = {BASELINE: Recipe([EMA("0.1dur")]), "same": Recipe([EMA("0.1dur")])}
    result = run(plan(arms, target=0.6), Fake(), tmp_path)
    ratio = result.verdicts["same"].seconds.ratio
    assert ratio.low <= 1 <= ratio.high
    assert result.verdicts["same"].finding == "cannot tell"


def test_the_summary_holds_all_figures(tmp_path):
    result = run(plan(seeds=[3]), Fake(), tmp_path)  # of one seed intervals are infinite
    data = json.loads(to_json(result), parse_constant=pytest.fail)
    assert data["target"] == result.target
    assert list(data["arms"]) == list(ARMS)
    assert data["arms"]["MixUp"]["verdict"]["seconds"]["ratio"]["high"] is None
    for arm in data["arms"].values():
        assert all((tmp_path / name).is_file() for name in arm["runs"])
        assert Recipe.from_yaml(arm["recipe"]) in ARMS.values()
    text = to_markdown(result)
    assert all(f"| {arm} |" in text for arm in ARMS)
    assert str(result.verdicts["SAM"]) in text


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"arms": {BASELINE: Recipe()}}, r"arms must be a baseline and at least one more"),
        ({"seeds": []}, r"seeds must hold at least one"),
        ({"target": 0.0}, r"target must be in \(0, 1\], got 0.0"),
    ],
)
def test_bad_plans(options, match):
    with pytest.raises(ValueError, match=match):
        plan(**options)


# The command.


def bench(*arguments) -> Any:
    return CliRunner().invoke(app, ["bench", "--trainer", "torch", *arguments])


def test_the_command_compares_on_real_data(tmp_path):
    command = ["--recipe", "MixUp+LabelSmoothing", "--recipe", "none@1", "--target", "0.3"]
    command += ["--seeds", "2", "--epochs", "2", "--output", str(tmp_path / "out")]
    result = bench(*command)
    assert result.exit_code == 0, result.output
    assert "MixUp+LabelSmoothing: " in result.output
    assert "2 seeds" in result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "runs",
        "report.html",
        "summary.json",
        "summary.md",
    }
    files = sorted((tmp_path / "out" / "runs").glob("*.json"))
    assert len(files) == 6
    before = [file.read_bytes() for file in files]
    records = [Record.from_json(text.decode()) for text in before]
    assert all(len(record.turns) == 3 for record in records)
    assert all(record.memory > 2**16 and record.ms_per_step > 0 for record in records)
    again = bench(*command)
    assert "seed 0" in again.output  # runs of before are listed too
    assert again.output.split("Target")[1] == result.output.split("Target")[1]
    assert [file.read_bytes() for file in files] == before  # nothing was trained again


def test_the_command_speaks_to_programs(tmp_path):
    result = bench("--json", "--seeds", "1", "--epochs", "1", "--output", str(tmp_path / "o"))
    assert result.exit_code == 0, result.output
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [e["event"] for e in events[-3:]] == ["run", "run", "summary"]
    assert {e["event"] for e in events} >= {"evaluation", "run", "summary"}
    assert Path(events[-1]["file"]).is_file()


def test_one_after_another_gives_the_same_accuracies(tmp_path):
    found = []
    for turn in ("0", "7"):
        bench("--seeds", "2", "--epochs", "1", "--turn", turn, "--output", str(tmp_path / turn))
        data = json.loads((tmp_path / turn / "summary.json").read_text())
        found.append({name: arm["final_accuracy"] for name, arm in data["arms"].items()})
        turns = {name: arm["runs_in_turns_with_baseline"] for name, arm in data["arms"].items()}
        assert turns["demo"] == (2 if turn == "7" else 0)
    assert found[0] == found[1]


MINE = """
import dataclasses
from dataclasses import dataclass

from mosaic_core import plugins
from mosaic_core.algorithms import NoOp
from mosaic_core.workloads import WORKLOADS

few = dataclasses.replace(WORKLOADS[0], name="few", epochs=1)


@dataclass(frozen=True)
class Own(NoOp):
    pass


@plugins.hookimpl
def mosaic_algorithms():
    return [Own]
"""


def test_a_module_of_the_users_brings_workload_and_algorithm(tmp_path):
    (tmp_path / "mine_of_the_user.py").write_text(MINE)
    script = "import sys; from mosaic_core.cli import app; app(sys.argv[1:])"
    command = [sys.executable, "-P", "-c", script, "bench", "--trainer", "torch", "--seeds", "1"]
    command += ["--workload", "mine_of_the_user:few", "--plugin", "mine_of_the_user"]
    command += ["--recipe", "Own"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "Own, seed 0" in run.stdout
    data = json.loads((tmp_path / "mosaic-bench" / "summary.json").read_text())
    assert (data["workload"], list(data["arms"])) == ("few", [BASELINE, "Own"])


def test_interrupted_it_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mosaic_core.bench.comparison.complete", interrupted)
    result = bench("--output", str(tmp_path))
    assert result.exit_code == 130
    assert "the same command goes on from there" in result.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recipe", "MixUpp"], "MixUpp"),
        (["--workload", "digit"], "did you mean 'digits'"),
        (["--workload", "nowhere:x"], "could not be loaded"),
        (["--target", "2"], "target must be in"),
        (["--target", "much"], "--target must be a number, got 'much'"),
        (["--recipe", "MixUp@0"], "a length must be a number of epochs, got 'MixUp@0'"),
        (["--recipe", "SAM", "--recipe", "SAM"], "two arms are called 'SAM'"),
        (["--recipe", "SAM", "--ablate"], "at least two algorithms"),
        (["--recipe", "SAM", "--recipe", "EMA", "--ablate"], "--ablate needs one recipe, got 2"),
        (["--tune", "3"], "count must be at least 5, got 3"),
        (["--output", __file__], "--output must be a folder"),
    ],
    ids=str,
)
def test_the_command_refuses_in_a_line(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = bench(*options)
    assert result.exit_code == 2
    lines = result.output.strip().splitlines()
    assert words in lines[-1]
    assert len(lines) == (2 if "--tune" in options else 1)
    assert not list(tmp_path.iterdir())  # nothing half-written
