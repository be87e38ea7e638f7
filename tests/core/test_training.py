"""The recorder: what counts as time of training."""

import pytest
from torch import nn

from mosaic_core import training
from mosaic_core.training import WARM_UP, Recorder


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
