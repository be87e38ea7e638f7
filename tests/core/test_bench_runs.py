"""Runs of a benchmark: a file each, none done twice, nothing lost to a kill."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mosaic_core import Recipe
from mosaic_core.algorithms import EMA, MixUp
from mosaic_core.bench.runs import SCHEMA, Job, Record, Store, complete
from mosaic_core.training import Evaluation, History
from mosaic_core.workloads import WORKLOADS

DIGITS = next(w for w in WORKLOADS if w.name == "digits")


def job(seed=0, recipe=(), epochs=2, learning_rate=0.1) -> Job:
    settings = {**DIGITS.settings, "learning_rate": learning_rate}
    return Job("digits", "torch", Recipe(recipe).to_yaml(), seed, epochs, settings)


def history(accuracy=0.5) -> History:
    return History((Evaluation(10, 1, 0.25, 0.1), Evaluation(20, 2, 0.5, accuracy)), 1.5, {})


def record(of: Job, accuracy=0.5) -> Record:
    return Record.of(of, history(accuracy), memory=5, phases={"data": 0.5}, turns=["a", "b"])


class Fake:
    """Trains nothing, and notes what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, jobs):
        for job in jobs:
            self.asked.append(job.seed)
            yield record(job, job.seed / 10)


def test_a_record_is_what_was_written():
    first = record(job(3, [MixUp(0.4), EMA("0.1dur")]))
    text = first.to_json()
    assert Record.from_json(text) == first
    assert json.loads(text)["schema"] == SCHEMA
    assert first.final_accuracy == 0.5
    assert {"date", "machine", "threads", "torch"} <= first.environment.keys()


@pytest.mark.parametrize("change", ["{", "[]", "{}", '{"schema": 0}', '{"schema": 1, "job": {}}'])
def test_what_is_no_record_is_refused(change, tmp_path):
    store = Store(tmp_path)
    store.save(record(job()))
    path = tmp_path / job().file
    path.write_text(change)
    with pytest.raises(ValueError, match=r"mosaic: .*; remove .*to have it done again"):
        store.load(job())
    assert path.read_text() == change


def test_the_record_of_another_run_is_refused(tmp_path):
    (tmp_path / job(0).file).write_text(record(job(1)).to_json())
    with pytest.raises(ValueError, match=r"is the record of another run"):
        Store(tmp_path).load(job(0))


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"epochs": 3},
        {"settings": {"learning_rate": 0.2}},
        {"replica": 1},
        {"trainer": "other"},
        {"workload": "other"},
        {"recipe": Recipe([MixUp()]).to_yaml()},
    ],
    ids=str,
)
def test_everything_that_decides_a_run_is_in_the_name_of_its_file(change):
    assert dataclasses.replace(job(), **change).file != job().file
    assert job().file == job().file


def test_runs_that_are_done_are_not_done_again(tmp_path):
    jobs, fake, store = [job(0), job(1), job(2)], Fake(), Store(tmp_path / "new")
    first = complete(jobs[:2], fake, store)
    again = complete(jobs, fake, store)
    assert fake.asked == [0, 1, 2]
    assert again[:2] == first
    assert [r.final_accuracy for r in again] == [0.0, 0.1, 0.2]


def test_a_run_that_fails_leaves_the_others(tmp_path):
    def fail(jobs):
        yield record(jobs[0])
        raise RuntimeError("of the run")

    with pytest.raises(RuntimeError, match="of the run"):
        complete([job(0), job(1)], fail, Store(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [job(0).file]


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / "half.json.123.part").write_text("{")
    complete([job()], Fake(), Store(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [job().file]


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, str(Path({tests!r})))
from test_bench_runs import DIGITS, job
from mosaic_core.bench.runs import Store, complete
from mosaic_core.bench.turns import Turns
from mosaic_core.plain import train
print("begins", flush=True)
with Turns(DIGITS, train, turn=5) as turns:
    for pair in ((0, 1), (2, 3)):
        complete([job(s, epochs=1) for s in pair], turns, Store(Path(sys.argv[1])))
"""


def outcomes(folder: Path):
    store = Store(folder)
    records = [store.load(job(s, epochs=1)) for s in range(4)]
    return [[(e.step, e.accuracy) for e in r.evaluations] for r in records if r is not None]


@pytest.mark.slow
def test_killed_at_random_and_continued_it_ends_as_if_nothing_had_been(tmp_path):
    script = SCRIPT.format(tests=str(Path(__file__).parent))

    def start(folder):
        command = [sys.executable, "-c", script, str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    kills = int(os.environ.get("MOSAIC_KILLS", "3"))
    generator, killed = random.Random(0), 0
    for _ in range(kills):
        process = start(tmp_path / "killed")
        assert process.stdout.readline() == "begins\n"
        time.sleep(generator.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
    assert killed
    for name in ("killed", "straight"):
        process = start(tmp_path / name)
        process.communicate(timeout=240)
        assert process.returncode == 0
    assert outcomes(tmp_path / "killed") == outcomes(tmp_path / "straight")
    assert len(outcomes(tmp_path / "killed")) == 4
    assert {p.suffix for p in (tmp_path / "killed").iterdir()} == {".json"}
