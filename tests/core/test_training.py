"""The recorder: what counts as time of training."""

import pickle

import pytest
import torch
from torch import nn

from mosaic_core import training
from mosaic_core.training import WARM_UP, Evaluation, Recorder, Update


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def passes(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock.now)
    return clock


def run(recorder, clock, durations):
    for seconds in durations:
        clock.passes(seconds)
        recorder.end_step()


def test_evaluations_and_waiting_do_not_count(clock):
    waits = []

    def report(update):
        if update.step == 2 and update.evaluation is None:
            with update.clock_stopped():
                clock.passes(50)
            clock.passes(0.5)  # what a report does besides counts
            waits.append(update.step)
        if update.evaluation is not None:
            clock.passes(9)

    recorder = Recorder(2, 4, report=report)
    clock.passes(7)  # before the start
    recorder.start()
    for _ in range(2):
        run(recorder, clock, [1.0] * 4)
        clock.passes(0.25)  # of training, after the last step
        recorder.pause()
        clock.passes(30)
        recorder.evaluated(0.5)
    history = recorder.history(nn.Linear(1, 1))
    assert [point.seconds for point in history.evaluations] == [4.75, 9.0]
    assert [(point.step, point.epoch) for point in history.evaluations] == [(4, 1), (8, 2)]
    assert history.ms_per_step == 1e3
    assert history.start_up == 0
    assert waits == [2]


def test_what_the_first_steps_take_longer_is_told_apart(clock):
    recorder = Recorder(2, 20)
    recorder.start()
    for slow in (40.0, 1.0):
        run(recorder, clock, [slow, 3.0, *[1.0] * 18])
        recorder.pause()
        recorder.evaluated(0.5)
    history = recorder.history(nn.Linear(1, 1))
    assert history.start_up == 41.0
    assert [point.seconds for point in history.evaluations] == [20.0, 42.0]
    assert history.ms_per_step == 1e3


def test_first_steps_that_are_faster_are_no_start_up(clock):
    recorder = Recorder(1, 20)
    recorder.start()
    run(recorder, clock, [*[0.5] * WARM_UP, *[1.0] * (20 - WARM_UP)])
    recorder.pause()
    recorder.evaluated(0.5)
    history = recorder.history(nn.Linear(1, 1))
    assert history.start_up == 0
    assert history.evaluations[0].seconds == 17.5


def test_evaluations_are_due_at_equal_distances(clock):
    recorder = Recorder(2, 6, 3)
    recorder.start()
    due = []
    for step in range(1, 13):
        run(recorder, clock, [1.0])
        if recorder.due:
            due.append(step)
    assert due == [2, 4, 8, 10]
    with pytest.raises(ValueError, match="evaluations must divide the 7 steps of an epoch, got 2"):
        Recorder(1, 7, 2)


@pytest.mark.parametrize("steps", [2 * WARM_UP, 2 * WARM_UP + 1])
def test_too_few_steps_before_the_first_evaluation_tell_no_start_up(clock, steps):
    recorder = Recorder(1, steps)
    recorder.start()
    run(recorder, clock, [*[8.0] * WARM_UP, *[1.0] * (steps - WARM_UP)])
    recorder.pause()
    recorder.evaluated(0.5)
    history, long = recorder.history(nn.Linear(1, 1)), steps > 2 * WARM_UP
    assert history.start_up == (7.0 * WARM_UP if long else 0)
    assert history.evaluations[0].seconds == (float(steps) if long else 9.0 * WARM_UP)
    assert history.ms_per_step == (1e3 if long else 4.5e3)


def test_a_clock_is_stopped_for_the_steps_as_well(clock):
    def report(update):
        with update.clock_stopped():
            clock.passes(100.0 * update.step)

    recorder = Recorder(1, 12, 2, report)
    recorder.start()
    for _ in range(2):
        run(recorder, clock, [1.0] * 6)
        recorder.pause()
        recorder.evaluated(0.5)
    history = recorder.history(nn.Linear(1, 1))
    assert [point.seconds for point in history.evaluations] == [6.0, 12.0]
    assert history.ms_per_step == 1e3


def test_a_clock_runs_on_after_a_wait_that_failed(clock):
    def fail():
        clock.passes(50)
        raise RuntimeError

    def report(update):
        if update.step == 1:
            with pytest.raises(RuntimeError), update.clock_stopped():
                fail()

    recorder = Recorder(1, 2, report=report)
    recorder.start()
    run(recorder, clock, [1.0, 1.0])
    recorder.pause()
    recorder.evaluated(0.5)
    assert recorder.history(nn.Linear(1, 1)).evaluations[0].seconds == 2.0


def test_what_the_device_still_has_to_do_is_training(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: clock.passes(3))

    def report(update):
        if update.step == 1:
            with update.clock_stopped():
                clock.passes(50)

    recorder = Recorder(1, 2, report=report)
    recorder.start()
    run(recorder, clock, [1.0, 1.0])
    recorder.pause()
    recorder.evaluated(0.5)
    history = recorder.history(nn.Linear(1, 1))
    assert history.evaluations[0].seconds == 1 + 3 + 1 + 3  # before the wait, and at the end
    assert history.ms_per_step == 1e3 * (1 + 4) / 2


def test_updates_are_equal_and_go_elsewhere_without_their_clock(clock):
    updates = []
    recorder = Recorder(1, 2, report=updates.append)
    recorder.start()
    run(recorder, clock, [1.0, 1.0])
    recorder.pause()
    recorder.evaluated(0.5)
    point = Evaluation(2, 1, 2.0, 0.5)
    assert updates == [Update(1, 2), Update(2, 2), Update(2, 2, point)]
    assert repr(updates[0]) == "Update(step=1, total_steps=2, evaluation=None)"
    copies = pickle.loads(pickle.dumps(updates))
    assert copies == updates
    with copies[0].clock_stopped():
        clock.passes(1)
