"""Evaluations in the middle of an epoch: the same in every trainer, and they disturb nothing."""

import dataclasses
import warnings

import pytest
import torch

from mosaic_core import plugins
from mosaic_core.algorithms import EMA, BlurPool, MixUp
from mosaic_core.training import train

RECIPE = [BlurPool(), MixUp(0.2), EMA("4ba")]
DIGITS = plugins.workload("digits")


def function_of(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what fastai does when it is imported
        return train if name == "torch" else plugins.adapter(name).load("trainer")


def trained(function, evaluations):
    torch.set_num_threads(1)
    workload = dataclasses.replace(DIGITS, evaluations=evaluations)
    return function(workload, RECIPE, seed=3, epochs=2)


@pytest.fixture(scope="module")
def plain():
    return trained(train, 3)


def points(history):
    # As counts, since Lightning and fastai average batches in float32.
    count = 1297
    return [(e.step, e.epoch, round(count * e.accuracy)) for e in history.evaluations]


def test_the_plain_loop_evaluates_at_equal_distances(plain):
    assert [point[:2] for point in points(plain)] == [
        (5, 0),
        (10, 0),
        (15, 1),
        (20, 1),
        (25, 1),
        (30, 2),
    ]
    assert len({right for *_, right in points(plain)}) > 3


@pytest.mark.parametrize("name", ["torch", *plugins.adapters()])
def test_every_trainer_evaluates_there_and_trains_on_undisturbed(name, plain):
    function = function_of(name)
    often, seldom = (trained(function, evaluations) for evaluations in (3, 1))
    assert points(often) == points(plain)
    assert points(seldom) == points(plain)[2::3]
    for weight, same, reference in zip(
        *(history.weights.values() for history in (often, seldom, plain)), strict=True
    ):
        assert torch.equal(weight, same)
        assert torch.equal(weight, reference)


@pytest.mark.parametrize("name", ["torch", *plugins.adapters()])
def test_evaluations_that_do_not_divide_the_epoch_are_refused(name):
    function = function_of(name)
    with pytest.raises(ValueError, match="evaluations must divide the 15 steps of an epoch, got 4"):
        trained(function, 4)
