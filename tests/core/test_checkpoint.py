"""What is in the state of a run, and which runs may go on from it.

That a resumed run equals the uninterrupted one is in ``test_run.py``, where the loop is.
"""

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from mosaic_core import Algorithm, Run, UnsupportedError, checkpoint
from mosaic_core.algorithms import EMA, SAM, Backdrop, LabelSmoothing, MixUp


def make(*recipe: Algorithm, steps: int = 0, **options: Any) -> Run:
    """Return a run that took some steps: the weights are the number of the step."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    run = Run(recipe, model=model, **options)
    run.start([torch.optim.SGD(model.parameters(), lr=0.1)], total_steps=10, steps_per_epoch=2)
    for step in range(1, steps + 1):
        run.on_batch(torch.ones(3, 2), torch.zeros(3, dtype=torch.int64))
        set_weights(run, step)
        run.end_step()
    return run


@torch.no_grad()
def set_weights(run: Run, value: float) -> None:
    for parameter in run.model.parameters():
        parameter.fill_(value)


def weights(run: Run) -> set[float]:
    return {v for p in run.model.parameters() for v in p.flatten().tolist()}


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_the_state_is_of_plain_values_and_tensors() -> None:
    run = make(MixUp(), EMA("2ba"), SAM(), steps=3, seed=7)
    state = run.state_dict()
    assert state == checkpoint.state_of(run)
    assert list(state) == ["version", "recipe", "seed", "progress", "states", "training_weights"]
    assert state["version"] == 1
    assert state["seed"] == 7
    assert yaml.safe_load(state["recipe"])[0] == {"MixUp": {"alpha": 0.2}}
    assert state["states"].keys() == {"MixUp", "SAM", "EMA"}
    assert state["training_weights"] is None
    json.dumps({k: v for k, v in state.items() if k != "states"})
    assert state["states"]["EMA"].pop("averages")
    json.dumps(state)


def test_progress_is_a_copy() -> None:
    run = make(MixUp(), steps=2)
    state = run.state_dict()
    run.end_step()
    assert state["progress"]["step"] == 2


def test_progress_goes_on_but_not_the_window_nor_the_length() -> None:
    saved = make(MixUp(), steps=4)
    saved.end_epoch()
    saved.on_batch(torch.ones(3, 2), torch.zeros(3, dtype=torch.int64))  # of an unfinished window
    state = saved.state_dict()
    run = make(MixUp())
    run.start(run.optimizers, total_steps=99, steps_per_epoch=9)
    run.on_batch(torch.ones(3, 2), torch.zeros(3, dtype=torch.int64))
    run.load_state_dict(state)
    progress = run.progress
    assert (progress.step, progress.epoch, progress.samples) == (4, 1, 15)
    assert progress.micro_batch == 0
    assert (progress.total_steps, progress.steps_per_epoch) == (99, 9)


@pytest.mark.parametrize(
    ("saved", "other"),
    [
        (MixUp(1), MixUp(1.0)),
        (MixUp(1.0), MixUp(1)),
        (MixUp(np.float64(0.5)), MixUp(0.5)),
        (MixUp(np.float32(0.5)), MixUp(0.5)),
        (SAM(rho=1, interval=2), SAM(rho=1.0, interval=2)),
        (LabelSmoothing(0), LabelSmoothing(0.0)),
        (Backdrop(["0", "1"]), Backdrop(("0", "1"))),
        (EMA("2ba"), EMA(half_life="2ba", smoothing=None)),
    ],
    ids=str,
)
def test_settings_are_compared_as_values(saved: Algorithm, other: Algorithm) -> None:
    state = through_a_file(make(saved, steps=2).state_dict())
    run = make(other)
    run.load_state_dict(state)
    assert run.progress.step == 2


@pytest.mark.parametrize(
    ("saved", "other"),
    [
        ([MixUp(1)], [MixUp(1.5)]),
        ([SAM()], [SAM(adaptive=True)]),
        ([Backdrop("0")], [Backdrop(["0", "1"])]),
        ([EMA("2ba")], [EMA("3ba")]),
        ([EMA("2ba")], [EMA("2ba"), SAM()]),
        ([EMA("2ba")], []),
    ],
    ids=str,
)
def test_other_recipes_are_refused_and_nothing_changes(
    saved: list[Algorithm], other: list[Algorithm]
) -> None:
    state = make(*saved, steps=2).state_dict()
    run = make(*other)
    set_weights(run, 9)
    with pytest.raises(
        UnsupportedError,
        match=r"^Run: a run must go on with the recipe and seed it began with\. The checkpoint has"
        r" seed 0 and\n(.|\n)*this run has seed 0 and\n(.|\n)*load the model's weights only$",
    ):
        run.load_state_dict(state)
    assert run.progress.step == 0
    assert weights(run) == {9}


def test_another_seed_is_refused() -> None:
    state = make(MixUp(), seed=1, steps=2).state_dict()
    with pytest.raises(
        UnsupportedError, match=r"has seed 1 and\n- MixUp(.|\n)*this run has seed 2 and\n- MixUp"
    ):
        make(MixUp(), seed=2).load_state_dict(state)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_an_unknown_version_is_refused_whatever_else_is_in_it(version: Any) -> None:
    state = {} if version is None else {"version": version}
    with pytest.raises(
        UnsupportedError,
        match=rf"^Run: unknown checkpoint version {version}, this is 1; to begin a new run, load"
        r" the model's weights only$",
    ):
        checkpoint.restore(make(MixUp()), state)


# The weights.


def saved_inside(run: Run) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with run.evaluation():
        return through_a_file((run.model.state_dict(), run.state_dict()))


def test_inside_evaluation_the_training_weights_are_in_the_state() -> None:
    run = make(EMA(smoothing=0.5), steps=3)
    model, state = saved_inside(run)
    assert {float(v) for t in model.values() for v in t.flatten()} == {2.25}  # of 1, 2, 3
    assert {float(v) for t in state["training_weights"].values() for v in t.flatten()} == {3.0}
    other = make(EMA(smoothing=0.5))
    other.model.load_state_dict(model)
    other.load_state_dict(state)
    assert not other.in_evaluation
    assert weights(other) == {3.0}
    with other.evaluation():
        assert weights(other) == {2.25}


def test_a_run_that_is_being_evaluated_takes_the_checkpoint_not_what_it_parked() -> None:
    model, state = saved_inside(make(EMA(smoothing=0.5), steps=3))
    other = make(EMA(smoothing=0.5), steps=8)
    other.enter_evaluation()
    other.model.load_state_dict(model)
    other.load_state_dict(state)
    assert not other.in_evaluation
    assert weights(other) == {3.0}
    other.leave_evaluation()
    assert weights(other) == {3.0}


def test_without_parked_weights_the_model_is_left_alone() -> None:
    state = make(MixUp(), steps=2).state_dict()
    run = make(MixUp())
    set_weights(run, 5)
    run.load_state_dict(state)
    assert weights(run) == {5}
