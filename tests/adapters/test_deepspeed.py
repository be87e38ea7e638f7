"""What is particular to DeepSpeed: see ``deepspeed_checks.py``, which runs in other processes."""

from pathlib import Path

import pytest
from deepspeed_checks import ONE, TWO
from launched import outcome

from mosaic_core import plugins
from mosaic_core.algorithm import Need

CHECKS = Path(__file__).with_name("deepspeed_checks.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE)
def test_in_one_process(name):
    (found,) = outcome(CHECKS, 1)
    assert name in found["ran"]
    assert name not in found["failed"], found["failed"][name]


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO)
def test_in_two_processes(name):
    for found in outcome(CHECKS, 2):
        assert name in found["ran"]
        assert name not in found["failed"], found["failed"][name]


def test_it_delivers_all_but_the_optimizer():
    described = plugins.adapter("deepspeed")
    assert described.delivers == frozenset(Need) - {Need.OPTIMIZER}
    assert {mode.options["stage"] for mode in described.modes} == {0, 1, 2, 3}
