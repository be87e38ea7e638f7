"""Workloads, and that all trainers train them to the same weights."""

import dataclasses
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console

from mosaic_core import Recipe, agreement, datasets, plugins, texts
from mosaic_core.algorithms import EMA, LabelSmoothing
from mosaic_core.plain import PLAIN
from mosaic_core.training import Recorder
from mosaic_core.workloads import DEMO_RECIPE


def test_digits_are_split_without_overlap():
    data = plugins.workload("digits").load(None)
    assert data.train_inputs.shape == (500, 1, 8, 8)
    assert data.eval_inputs.shape == (1297, 1, 8, 8)
    assert torch.bincount(data.train_labels).tolist() == [50] * 10
    assert abs(data.train_inputs.mean()) < 1e-5
    assert data.train_labels.dtype == torch.int64


def test_order_and_weights_depend_on_the_seed_alone():
    workload = plugins.workload("digits")
    data = workload.load(None)
    first, again, other = (
        [y.tolist() for _, y in workload.loaders(data, seed)[0]] for seed in (0, 0, 1)
    )
    assert first == again != other
    state = torch.get_rng_state()
    weights = [next(workload.new_model(seed).parameters()) for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("steps", [3, 25])  # of which 500 examples give 15
def test_a_shortened_workload_has_data_for_so_many_steps(steps):
    whole = plugins.workload("digits")
    data, short = whole.load(None), whole.shortened(steps)
    few = short.load(None)
    loader, evaluation = short.loaders(few, seed=0)
    assert (len(loader), len(evaluation)) == (steps, 1)
    assert [len(y) for _, y in loader] == [32] * steps
    for name, count in (("train", 32 * steps), ("eval", 32)):
        inputs, labels = getattr(few, f"{name}_inputs"), getattr(few, f"{name}_labels")
        assert len(inputs) == len(labels) == count
        for i in {0, 31, min(count, 500) - 1, count - 1}:
            assert torch.equal(inputs[i], getattr(data, f"{name}_inputs")[i % 500])
            assert labels[i] == getattr(data, f"{name}_labels")[i % 500]
        # Not a part of the whole, which would count as memory of the training.
        assert inputs.untyped_storage().nbytes() == inputs.nbytes
    assert dataclasses.replace(short, load=whole.load) == whole


def test_a_shortened_workload_looks_into_the_folder(text):
    assert len(plugins.workload("char-lm").shortened(2, text).load(None).train_inputs) == 64


@pytest.fixture
def text(tmp_path):
    """Return a folder with a text whose next character is often easy to tell."""
    (tmp_path / "char-lm.txt").write_text("It is a truth universally acknowledged. " * 500)
    return tmp_path


def few(workload, data):
    """Return a workload of four small steps an epoch, on the first examples of some data."""
    part = datasets.Data(*(t[:64] for t in vars(data).values()))
    return dataclasses.replace(workload, batch_size=16, load=lambda data_dir: part, evaluations=2)


def images(*shape):
    """Return data in which the brightness of a picture tells its class."""
    torch.manual_seed(0)
    labels = torch.randint(10, (64,))
    inputs = torch.randn(64, *shape) + (labels - 4.5).view(-1, 1, 1, 1)
    return datasets.Data(inputs, labels, inputs, labels)


@pytest.mark.parametrize("name", ["fashion-mnist-vit", "cifar10", "char-lm"])
def test_a_shipped_model_learns_its_task(name, text):
    workload = plugins.workload(name)
    shapes = {"fashion-mnist-vit": (1, 28, 28), "cifar10": (3, 32, 32)}
    data = workload.load(text) if name == "char-lm" else images(*shapes[name])
    workload = few(workload, data)
    loader, _ = workload.loaders(workload.load(None), seed=0)
    x, y = next(iter(loader))
    fresh = workload.new_model(0)
    before = workload.loss(fresh(x), y).item()
    history = PLAIN.load("trainer")(workload, (), epochs=3)
    assert history.weights.keys() == dict(fresh.named_parameters()).keys()
    trained = workload.new_model(1)
    trained.load_state_dict(history.weights, strict=False)
    assert workload.loss(trained(x), y).item() < before - 0.1
    assert 0.11 < history.final_accuracy <= 1
    again = PLAIN.load("trainer")(workload, (), epochs=3)
    assert all(torch.equal(again.weights[n], w) for n, w in history.weights.items())


def test_the_accuracy_of_a_language_model_is_that_of_its_characters(text):
    workload = few(plugins.workload("char-lm"), plugins.workload("char-lm").load(text))
    history = PLAIN.load("trainer")(workload, (), epochs=1)
    model = workload.new_model(1)
    model.load_state_dict(history.weights)
    data = workload.load(None)
    right = model(data.eval_inputs).argmax(1) == data.eval_labels
    assert history.final_accuracy == pytest.approx(right.float().mean().item(), abs=1e-6)


STEPS = {  # of an epoch, with the data that is shipped
    "digits": 500 // 32,
    "fashion-mnist": 60_000 // 128,
    "fashion-mnist-vit": 60_000 // 128,
    "cifar10": 50_000 // 128,
    "char-lm": texts.GROUP // 32,
    "reuters-r8": 5_485 // 32,
}


@pytest.mark.parametrize("name", plugins.workloads())
def test_an_epoch_of_what_is_shipped_can_be_divided(name):
    workload = plugins.workload(name)
    recorder = Recorder(workload.epochs, STEPS[name], workload.evaluations)
    assert recorder.interval * workload.evaluations == STEPS[name]


def test_adam_is_the_optimizer_of_transformers_alone():
    model = torch.nn.Linear(2, 2)
    for name, kind in (("digits", torch.optim.SGD), ("char-lm", torch.optim.AdamW)):
        workload = plugins.workload(name)
        optimizer, schedule = workload.optimizer(model, total_steps=10)
        assert type(optimizer) is kind
        assert optimizer.param_groups[0]["weight_decay"] == workload.weight_decay
        lrs = []
        for _ in range(10):
            lrs.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert max(lrs) == pytest.approx(workload.learning_rate)
        assert lrs[-1] < 1e-3 * workload.learning_rate


def test_idx_files_are_read(tmp_path):
    images = np.arange(5 * 28 * 28, dtype=np.uint8).reshape(5, 28, 28)
    for role, name in datasets._FASHION_MNIST.items():
        values = images if role.endswith("inputs") else np.arange(5, dtype=np.uint8)
        header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
        (tmp_path / name).write_bytes(header + values.tobytes())
    data = plugins.workload("fashion-mnist").load(tmp_path)
    assert data.train_inputs.shape == (5, 1, 28, 28)
    assert data.eval_labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_every_trainer_ends_with_the_same_weights():
    adapters, output = list(plugins.adapters().values()), StringIO()
    console = Console(file=output, width=200)
    options = {"seed": 0, "epochs": 2, "data_dir": None, "console": console}
    workload = plugins.workload("digits")
    found = agreement.train_all(adapters, workload, Recipe(DEMO_RECIPE), **options)
    assert found.histories.keys() == {PLAIN.title, *(adapter.title for adapter in adapters)}
    for arm in agreement.ARMS:
        plain = found.histories[PLAIN.title][arm]
        for title, arms in found.histories.items():
            assert agreement.distance(arms[arm].weights, plain.weights) <= 1e-5, (title, arm)
            assert [e.step for e in arms[arm].evaluations] == [15, 30]
            accuracies = [e.accuracy for e in arms[arm].evaluations]
            assert accuracies == pytest.approx([e.accuracy for e in plain.evaluations], abs=2e-3)
    both = [found.histories[PLAIN.title][arm].weights for arm in agreement.ARMS]
    assert agreement.distance(*both) > 0.1  # the recipe does something
    agreement.show(found, console)
    assert all(adapter.title in output.getvalue() for adapter in adapters)
    assert "Largest relative difference" in output.getvalue()


@pytest.mark.slow
def test_every_trainer_trains_a_language_model_alike(text):
    adapters = list(plugins.adapters().values())
    options = {"seed": 0, "epochs": 1, "data_dir": text, "console": Console(file=StringIO())}
    recipe = Recipe([LabelSmoothing(smoothing=0.1), EMA("2ba")])
    found = agreement.train_all(adapters, plugins.workload("char-lm"), recipe, **options)
    for arm in agreement.ARMS:
        plain = found.histories[PLAIN.title][arm]
        for title, arms in found.histories.items():
            assert agreement.distance(arms[arm].weights, plain.weights) <= 1e-5, (title, arm)
            accuracies = [e.accuracy for e in arms[arm].evaluations]
            assert accuracies == pytest.approx([e.accuracy for e in plain.evaluations], abs=2e-3)


def test_distance_is_relative_and_of_the_same_names():
    a, b = (
        {"w": torch.tensor([3.0, 4.0]), "v": torch.ones(2)},
        {"w": torch.zeros(2), "v": 2 * torch.ones(2)},
    )
    assert agreement.distance(b, a) == pytest.approx(1.0)
    assert agreement.distance(a, a) == 0
    assert agreement.distance({}, {}) == 0
    assert agreement.distance({**a, "v": torch.full((2,), torch.nan)}, a) == float("inf")
    with pytest.raises(ValueError, match=r"same names, got \{'v'\}"):
        agreement.distance(a, {"w": a["w"]})


def test_a_trainer_that_fails_says_why(monkeypatch):
    broken = dataclasses.replace(PLAIN, title="Broken", trainer="mosaic_core.plain:nothing")
    options = {"seed": 0, "epochs": 1, "data_dir": None, "console": Console(file=StringIO())}
    with pytest.raises(RuntimeError, match=r"Broken failed: AttributeError.*nothing"):
        agreement.train_all([broken], plugins.workload("digits"), Recipe(), **options)


def test_training_learns():
    history = PLAIN.load("trainer")(plugins.workload("digits"), (), epochs=10)
    assert history.final_accuracy > 0.85
