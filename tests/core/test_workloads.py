"""Workloads, and that two trainers train them to the same accuracies."""

import numpy as np
import pytest
import torch

from mosaic_core import datasets, plugins
from mosaic_core.training import PLAIN, train
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


def test_idx_files_are_read(tmp_path):
    images = np.arange(5 * 28 * 28, dtype=np.uint8).reshape(5, 28, 28)
    for role, name in datasets._FASHION_MNIST.items():
        values = images if role.endswith("inputs") else np.arange(5, dtype=np.uint8)
        header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
        (tmp_path / name).write_bytes(header + values.tobytes())
    data = plugins.workload("fashion-mnist").load(tmp_path)
    assert data.train_inputs.shape == (5, 1, 28, 28)
    assert data.eval_labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("recipe", [(), DEMO_RECIPE], ids=["baseline", "recipe"])
def test_every_trainer_gives_the_same_accuracies(recipe):
    workload = plugins.workload("digits")
    plain = train(workload, recipe, epochs=3)
    assert [e.step for e in plain.evaluations] == [15, 30, 45]
    for adapter in plugins.adapters().values():
        history = adapter.load("trainer")(workload, recipe, epochs=3)
        accuracies = [e.accuracy for e in history.evaluations]
        assert accuracies == pytest.approx([e.accuracy for e in plain.evaluations], abs=1e-6)
        assert [e.step for e in history.evaluations] == [15, 30, 45]


def test_training_learns():
    history = PLAIN.load("trainer")(plugins.workload("digits"), (), epochs=10)
    assert history.final_accuracy > 0.85
