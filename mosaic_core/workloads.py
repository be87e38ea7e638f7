"""Workloads: a model, real data and a budget to train with, for demos and benchmarks.

A workload says what is trained, not how: :mod:`mosaic_core.training` trains it with a plain loop,
and every adapter with its trainer, on the same data in the same order from the same weights.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from mosaic_core import algorithms
from mosaic_core.datasets import Data, cifar10, digits, fashion_mnist
from mosaic_core.models import GPT, ResNet, ViT
from mosaic_core.random import generator
from mosaic_core.texts import LENGTH, TOKENS, characters

__all__ = ["DEMO_RECIPE", "WORKLOADS", "Shuffle", "Workload"]


@dataclass(frozen=True)
class Workload:
    """A classifier to train.

    Attributes:
        name: Name on the command line.
        title: What it is, in a few words.
        load: Returns the data; its argument is a folder to look into first, or None.
        model: Makes the model, with weights from torch's default generator.
        batch_size: Examples a step.
        epochs: Length of a run.
        evaluations: Evaluations an epoch, at equal distances in steps, the last at its end; it must
            divide the steps of an epoch.
        seeds: Runs that a comparison averages over, unless told otherwise.
        learning_rate: Peak of a one-cycle schedule over the whole run.
        momentum: Of SGD with Nesterov's momentum, or the first beta of AdamW.
        weight_decay: Of all parameters.
        adam: Whether the optimizer is AdamW, as a transformer needs it, instead of SGD.
        threads: CPU threads that pay; None leaves the choice to torch.
        ranges: Lowest and highest value of settings that tuning tries, by name; the learning rate
            is among them even if it is not given.
    """

    name: str
    title: str
    load: Callable[[Path | None], Data]
    model: Callable[[], nn.Module]
    batch_size: int
    epochs: int
    seeds: int
    learning_rate: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    adam: bool = False
    threads: int | None = None
    evaluations: int = 1
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict, hash=False)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides a run beside its data and model, by name."""
        names = (
            "batch_size",
            "learning_rate",
            "momentum",
            "weight_decay",
            "adam",
            "threads",
            "evaluations",
        )
        return {name: getattr(self, name) for name in names}

    @property
    def search_space(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest value of what tuning tries, the learning rate always among it."""
        rate = self.learning_rate
        return {"learning_rate": (rate / 5, rate * 5), **self.ranges}

    def new_model(self, seed: int) -> nn.Module:
        """Return a model whose weights depend on the seed alone; no global stream is moved."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.model()

    def shortened(self, steps: int, data_dir: Path | None = None) -> "Workload":
        """Return the workload with data for a few steps an epoch and one batch to evaluate.

        The data are copies of the first examples, which repeat where there are not enough.

        Args:
            steps: Steps of an epoch.
            data_dir: Folder to look for the data first.
        """
        data = self.load(data_dir)

        def first(count: int, *parts: Tensor) -> list[Tensor]:
            return [part[torch.arange(count) % len(part)] for part in parts]

        train = first(steps * self.batch_size, data.train_inputs, data.train_labels)
        few = Data(*train, *first(self.batch_size, data.eval_inputs, data.eval_labels))
        return dataclasses.replace(self, load=lambda data_dir: few, evaluations=1)

    def loaders(
        self, data: Data, seed: int
    ) -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
        """Return loaders for training, in the order of :class:`Shuffle`, and for evaluation."""
        train = TensorDataset(data.train_inputs, data.train_labels)
        evaluation = TensorDataset(data.eval_inputs, data.eval_labels)
        return (
            DataLoader(train, self.batch_size, sampler=Shuffle(train, seed), drop_last=True),
            DataLoader(evaluation, 512),
        )

    def optimizer(
        self, model: nn.Module, total_steps: int
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """Return the optimizer and its schedule, to step after every optimizer step.

        Args:
            model: The model, after surgery.
            total_steps: Optimizer steps of the whole run.
        """
        options: dict[str, Any] = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        optimizer: torch.optim.Optimizer
        if self.adam:
            betas = (self.momentum, 0.98)
            optimizer = torch.optim.AdamW(model.parameters(), betas=betas, **options)
        else:
            options.update(momentum=self.momentum, nesterov=True)
            optimizer = torch.optim.SGD(model.parameters(), **options)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps=total_steps, cycle_momentum=False
        )
        return optimizer, schedule

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy."""
        return F.cross_entropy(logits, labels)


class Shuffle(Sampler[int]):
    """Order of the examples: a permutation that depends on seed and epoch alone.

    Epochs count by themselves; a trainer that calls ``set_epoch`` says which comes next.

    Args:
        data: What has as many examples.
        seed: Seed of the run.
    """

    def __init__(self, data: Sized, seed: int) -> None:
        self._count, self._seed, self._epoch = len(data), seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self._count, generator=generator(self._seed, "shuffle", self._epoch))
        self._epoch += 1
        return iter(order.tolist())


# What is shipped.

WORKLOADS = (
    Workload(
        name="digits",
        title="500 handwritten digits of 8x8 pixels, 1297 to evaluate",
        load=digits,
        model=ResNet,
        batch_size=32,
        epochs=20,
        seeds=3,
        learning_rate=0.1,
        threads=1,  # too small for two to gain, and two wait for each other on a busy machine
    ),
    Workload(
        name="fashion-mnist",
        title="60,000 pictures of clothes of 28x28 pixels, 10,000 to evaluate",
        load=fashion_mnist,
        model=ResNet,
        batch_size=128,
        epochs=5,
        seeds=1,
        evaluations=4,  # of 468 steps
        learning_rate=0.1,
    ),
    Workload(
        name="fashion-mnist-vit",
        title="the same pictures of clothes for a small vision transformer",
        load=fashion_mnist,
        model=ViT,
        batch_size=128,
        epochs=5,
        seeds=1,
        evaluations=4,  # of 468 steps
        learning_rate=3e-3,
        weight_decay=0.05,
        adam=True,
    ),
    Workload(
        name="cifar10",
        title="50,000 colour pictures of 32x32 pixels, 10,000 to evaluate",
        load=cifar10,
        model=functools.partial(ResNet, channels=3, widths=(32, 64, 128)),
        batch_size=128,
        epochs=10,
        seeds=1,
        evaluations=3,  # of 390 steps
        learning_rate=0.1,
    ),
    Workload(
        name="char-lm",
        title="the next character of a text, Jane Austen's Emma, for a small GPT",
        load=characters,
        model=functools.partial(GPT, tokens=TOKENS, length=LENGTH),
        batch_size=32,
        epochs=5,
        seeds=1,
        evaluations=4,  # a group of windows is four steps
        learning_rate=3e-3,
        weight_decay=0.05,
        adam=True,
    ),
)

DEMO_RECIPE = (
    algorithms.ChannelsLast(),
    algorithms.BlurPool(),
    algorithms.MixUp(alpha=0.2),
    algorithms.LabelSmoothing(smoothing=0.1),
    algorithms.EMA(half_life="0.05dur"),  # a twentieth of the run, however long it is
)
