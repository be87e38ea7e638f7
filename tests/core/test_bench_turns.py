"""Runs that take turns: what they give is what they give alone."""

import dataclasses
import multiprocessing
import time

import pytest

from mosaic_core import Recipe
from mosaic_core.algorithms import EMA, SAM
from mosaic_core.bench.runs import Job
from mosaic_core.bench.turns import Trainee, Turns
from mosaic_core.datasets import MissingError
from mosaic_core.plain import train
from mosaic_core.workloads import WORKLOADS

DIGITS = next(w for w in WORKLOADS if w.name == "digits")


def job(seed=0, recipe=(), epochs=1) -> Job:
    return Job("digits", "torch", Recipe(recipe).to_yaml(), seed, epochs, DIGITS.settings)


def nothing(data_dir):
    raise MissingError("mosaic: not here; get it there")


def curve(record):
    return [(point.step, point.accuracy) for point in record.evaluations]


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    assert not multiprocessing.active_children()


def test_runs_alternate_back_and_forth_and_end_as_alone():
    jobs, seen = [job(0, [EMA("0.1dur")]), job(1, [SAM()])], []
    with Turns(
        DIGITS, train, report=lambda of, *update: seen.append((of.seed, *update)), turn=6
    ) as t:
        began = time.perf_counter()
        records = {record.job.seed: record for record in t(jobs)}
        elapsed = time.perf_counter() - began
    assert [(seed, step) for seed, step, _, _ in seen] == [
        *[(0, 6), (1, 6), (1, 12), (0, 12)],
        *[(0, 15), (1, 15)],  # evaluated
    ]
    assert {total for _, _, total, _ in seen} == {15}
    assert [evaluation is None for *_, evaluation in seen] == [True] * 4 + [False] * 2
    for alone in Trainee(DIGITS, train)(jobs):
        record = records[alone.job.seed]
        assert curve(record) == curve(alone)
        assert record.memory == alone.memory
        assert record.phases.keys() == alone.phases.keys()
        assert record.turns == (jobs[0].file, jobs[1].file)
        assert alone.turns == ()
    # Had waiting counted, each would have taken about as long as both.
    assert sum(record.seconds for record in records.values()) < elapsed


def test_one_that_is_shorter_ends_and_the_others_go_on():
    jobs = [job(0, epochs=2), job(1), job(2)]
    with Turns(DIGITS, train, turn=10) as turns:
        assert sorted(r.job.seed for r in turns(jobs)) == [0, 1, 2]
        (again,) = turns([job(3)])  # the processes stay for the next group
    assert curve(again)[-1][0] == 15


def test_what_goes_wrong_in_a_process_is_raised_here():
    unknown = dataclasses.replace(job(), recipe="[NoSuchThing]")
    with Turns(DIGITS, train) as turns:
        with pytest.raises(LookupError, match="NoSuchThing"):
            list(turns([job(), unknown]))
        (record,) = turns([job()])  # by a process that was not in the middle of something
    assert record.turns == (job().file,)
    missing = dataclasses.replace(DIGITS, load=nothing)
    with Turns(missing, train) as turns, pytest.raises(MissingError, match="get it there"):
        list(turns([job()]))


def test_a_process_that_is_killed_is_told():
    with Turns(DIGITS, train, turn=1) as turns:
        runs = turns([job(0, epochs=50)])
        turns._report = lambda *_: turns._workers[0]._process.kill()
        with pytest.raises(RuntimeError, match=r"none-seed0.* ended with exit code -9"):
            list(runs)


@pytest.mark.parametrize(
    ("workload", "options", "match"),
    [
        (DIGITS, {"turn": 0}, "turn must be at least 1, got 0"),
        (dataclasses.replace(DIGITS, load=lambda _: None), {}, "functions and classes of a module"),
    ],
)
def test_bad_turns(workload, options, match):
    with pytest.raises(ValueError, match=match):
        Turns(workload, train, **options)


def test_without_turns_runs_follow_each_other():
    seen = []
    perform = Trainee(DIGITS, train, report=lambda of, *_: seen.append(of.seed))
    records = list(perform([job(0), job(1)]))
    assert seen == [0] * 16 + [1] * 16
    assert [record.turns for record in records] == [(), ()]
