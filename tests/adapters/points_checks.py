"""Trains a tiny workload with one trainer: ``points_checks.py NAME ANSWER``, alone in a process.

The clock of the recorder counts forward passes: one of training takes a second, one of evaluation a
thousand. So the seconds of an evaluation tell whether the clock stood still meanwhile, and whether
the model was in evaluation mode then and in training mode before and after.
"""

import dataclasses
import sys
import warnings
from types import SimpleNamespace

import torch
from torch import nn

from mosaic_core import plugins, training
from mosaic_core.algorithms import EMA, LAWA, SAM, BlurPool, MixUp
from mosaic_core.datasets import Data
from mosaic_core.plain import PLAIN
from mosaic_core.testing._network import examples, network
from mosaic_core.workloads import Workload

RECIPES = {
    "EMA": (BlurPool(), MixUp(0.4), EMA("3ba")),
    "two passes": (SAM(), MixUp(0.4), LAWA(window=3, update_interval="1ep")),
}
EPOCHS, STEPS, EVALUATIONS = 3, 6, 3


class Ticking(nn.Module):
    """Lets the clock run by what a forward pass of this mode takes."""

    now = 0.0

    def forward(self, x):
        Ticking.now += 1 if self.training else 1000
        return x


def data(folder):
    inputs = torch.cat([examples(index)[0] for index in range(STEPS + 8)])
    labels = inputs[:, :, :4].mean((2, 3)).matmul(torch.tensor([[1.0, -1, 0, 2, 0]] * 3)).argmax(1)
    split = 8 * STEPS + 3  # the last batch is incomplete, and is left out
    return Data(inputs[:split], labels[:split], inputs[split:], labels[split:])


def workload(evaluations):
    return Workload(
        name="tiny",
        title="a tiny network",
        load=data,
        model=lambda: nn.Sequential(Ticking(), network()),
        batch_size=8,
        epochs=EPOCHS,
        seeds=1,
        learning_rate=0.1,
        threads=1,
        evaluations=evaluations,
    )


def refusal(train):
    """Return what is said of evaluations that do not divide the steps, before a model is made."""

    def model():
        raise RuntimeError("a model was made")

    try:
        train(dataclasses.replace(workload(4), model=model), ())
    except ValueError as error:
        return str(error)
    return "nothing"


if __name__ == "__main__":
    name, answer = sys.argv[1:]
    warnings.simplefilter("ignore")  # of what fastai does when it is imported
    torch.set_num_threads(1)
    adapter = PLAIN if name == PLAIN.name else plugins.adapter(name)
    train = adapter.load("trainer")
    training.time = SimpleNamespace(perf_counter=lambda: Ticking.now)
    found = {
        (recipe, evaluations): train(workload(evaluations), algorithms, seed=3)
        for recipe, algorithms in RECIPES.items()
        for evaluations in (1, EVALUATIONS)
    }
    torch.save({"histories": found, "refusal": refusal(train)}, answer)
