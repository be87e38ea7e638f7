"""The benchmark in every trainer: runs take turns, and end as in the plain loop."""

import warnings

import pytest

from mosaic_core import Recipe, plugins
from mosaic_core.algorithms import SAM, BlurPool, MixUp
from mosaic_core.bench.comparison import compare
from mosaic_core.bench.plan import BASELINE, Arm, Plan
from mosaic_core.bench.runs import Store
from mosaic_core.bench.turns import Turns
from mosaic_core.plain import train

DIGITS = plugins.workload("digits")
ARMS = {
    BASELINE: Arm(Recipe(), 1),
    "recipe": Arm(Recipe([BlurPool(), MixUp(0.2), SAM()]), 1),
}


def compared(name, function, folder):
    plan = Plan(DIGITS, name, ARMS, [0], target=0.2)
    with Turns(DIGITS, function, turn=4) as turns:
        return compare(plan, turns, Store(folder))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return compared("torch", train, tmp_path_factory.mktemp("plain"))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(plugins.adapters()))
def test_a_comparison_is_the_same_in_every_trainer(name, plain, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what fastai does when it is imported
        function = plugins.adapter(name).load("trainer")
    result = compared(name, function, tmp_path)
    assert result.in_turns("recipe") == 1
    for arm in ARMS:
        assert result.final(arm) == pytest.approx(plain.final(arm), abs=1e-6)
        (record,) = result.records[arm]
        assert all(milliseconds > 0 for milliseconds in record.phases.values())
        assert record.memory > 2**16
