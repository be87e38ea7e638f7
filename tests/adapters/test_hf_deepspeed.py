"""The Trainer with DeepSpeed: see ``hf_deepspeed_checks.py``, which runs in other processes."""

from pathlib import Path

import pytest
from hf_deepspeed_checks import ONE, TWO
from launched import outcome

CHECKS = Path(__file__).with_name("hf_deepspeed_checks.py")


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
