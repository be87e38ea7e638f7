"""The phases of a step are told apart in every trainer."""

import warnings
from dataclasses import dataclass

import pytest

from mosaic_core import plugins
from mosaic_core.algorithms import NoOp
from mosaic_core.bench import phases


class Clock:
    """The real clock, and what an algorithm says it takes."""

    def __init__(self):
        self.real, self.ahead = phases.time.perf_counter, 0.0

    def __call__(self):
        return self.real() + self.ahead


CLOCK = Clock()


@dataclass(frozen=True)
class Takes(NoOp):
    """Takes an hour."""

    def on_step_end(self, run):
        """Let it pass."""
        CLOCK.ahead += 3600


@pytest.mark.parametrize("name", sorted(plugins.adapters()))
def test_all_phases_are_seen(name, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what fastai does when it is imported
        train = plugins.adapter(name).load("trainer")
    monkeypatch.setattr(phases, "_now", CLOCK)
    found = phases.measure(lambda: train(plugins.workload("digits"), [Takes()], epochs=1))
    assert 3.6e6 <= found.pop("algorithm") < 3.7e6
    assert all(0 < milliseconds < 1e5 for milliseconds in found.values())
