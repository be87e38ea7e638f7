"""Evaluations in the middle of an epoch: the same in every trainer, and they disturb nothing."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from points_checks import EPOCHS, EVALUATIONS, RECIPES, STEPS, data, workload

from mosaic_core import Run, plugins
from mosaic_core.loop import train_steps
from mosaic_core.plain import PLAIN

CHECKS = Path(__file__).with_name("points_checks.py")
TRAINERS = [PLAIN.name, *plugins.adapters()]
EVERY = STEPS // EVALUATIONS


@functools.cache
def outcome(name):
    """Train with one trainer in a process of its own, as some leave a process group behind."""
    answer = Path(tempfile.mkdtemp()) / "answer"
    command = [sys.executable, str(CHECKS), name, str(answer)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=540, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return torch.load(answer, weights_only=False)


def points(history):
    # As counts, since Lightning and fastai average batches in float32.
    count = len(data(None).eval_labels)
    return [(e.step, round(count * e.accuracy)) for e in history.evaluations]


def right_after(recipe, steps):
    """Return how many a model gets right that is trained for some steps and then evaluated once."""
    task = workload(1)
    loader, _ = task.loaders(data(None), seed=3)
    run = Run(RECIPES[recipe], model=task.new_model(3), seed=3)
    optimizer, scheduler = task.optimizer(run.model, EPOCHS * STEPS)
    run.start([optimizer], total_steps=EPOCHS * STEPS, steps_per_epoch=STEPS)
    for first in range(0, steps, STEPS):
        batches = list(loader)[: steps - first]
        train_steps(run, batches, lambda m, b: task.loss(m(b[0]), b[1]), scheduler=scheduler)
        if len(batches) == STEPS:
            run.end_epoch()
    run.enter_evaluation()
    with torch.no_grad():
        right = run.model.eval()(data(None).eval_inputs).argmax(1) == data(None).eval_labels
    return int(right.sum())


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_plain_loop_gives_what_training_so_far_would(recipe):
    steps = range(EVERY, EPOCHS * STEPS + 1, EVERY)
    found = points(outcome(PLAIN.name)["histories"][recipe, EVALUATIONS])
    assert found == [(step, right_after(recipe, step)) for step in steps]
    assert len({right for _, right in found}) > 3


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_evaluates_there_alike(name, recipe):
    histories, plain = outcome(name)["histories"], outcome(PLAIN.name)["histories"]
    often, seldom = histories[recipe, EVALUATIONS], histories[recipe, 1]
    assert points(often) == points(plain[recipe, EVALUATIONS])
    assert points(seldom) == points(often)[EVALUATIONS - 1 :: EVALUATIONS]
    assert [e.epoch for e in often.evaluations] == [0, 0, 1, 1, 1, 2, 2, 2, 3]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", TRAINERS)
def test_training_goes_on_undisturbed(name, recipe):
    histories = outcome(name)["histories"]
    often, seldom = (histories[recipe, evaluations].weights for evaluations in (EVALUATIONS, 1))
    assert often.keys() == seldom.keys()
    assert all(torch.equal(often[key], seldom[key]) for key in often)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", TRAINERS)
def test_the_clock_counts_training_alone(name, recipe):
    passes = 2 if recipe == "two passes" else 1
    for evaluations in (1, EVALUATIONS):
        history = outcome(name)["histories"][recipe, evaluations]
        assert [e.seconds for e in history.evaluations] == [
            passes * e.step for e in history.evaluations
        ]
        assert history.ms_per_step == 1e3 * passes
        assert history.start_up == 0


@pytest.mark.parametrize("name", TRAINERS)
def test_evaluations_that_do_not_divide_an_epoch_are_refused(name):
    match = f"Recorder: evaluations must divide the {STEPS} steps of an epoch, got 4"
    assert outcome(name)["refusal"] == match
