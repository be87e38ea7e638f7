"""The plain PyTorch loop as a trainer of workloads, which needs no adapter."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaic_core.adapter import Adapter
from mosaic_core.algorithm import Algorithm, Need
from mosaic_core.algorithms import NoOp
from mosaic_core.loop import train_steps
from mosaic_core.recipe import Recipe
from mosaic_core.run import Run
from mosaic_core.training import History, Recorder, Report
from mosaic_core.workloads import Workload

__all__ = ["PLAIN", "overhead", "train"]


def train(
    workload: Workload,
    recipe: Iterable[Algorithm] | Recipe,
    *,
    seed: int = 0,
    epochs: int | None = None,
    data_dir: Path | None = None,
    report: Report | None = None,
) -> History:
    """Train a workload with the plain PyTorch loop; see :class:`mosaic_core.training.Train`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader, evaluation_loader = workload.loaders(workload.load(data_dir), seed)
    epochs = workload.epochs if epochs is None else epochs
    recorder = Recorder(epochs, len(loader), workload.evaluations, report)
    model = workload.new_model(seed)
    run = Run(recipe, model=model, seed=seed)
    model.to(device)
    optimizer, scheduler = workload.optimizer(model, recorder.total_steps)
    run.start([optimizer], total_steps=recorder.total_steps, steps_per_epoch=len(loader))

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return workload.loss(model(batch[0]), batch[1])

    def evaluate() -> None:
        recorder.pause()
        with run.evaluation():
            accuracy = _accuracy(model, evaluation_loader, device)
        model.train()
        recorder.evaluated(accuracy)

    def batches() -> Iterator[list[Tensor]]:
        for batch in loader:
            yield [tensor.to(device, non_blocking=True) for tensor in batch]
            recorder.end_step()  # the loop asks for the next batch when it has taken the step
            if recorder.due:
                evaluate()

    model.train()
    recorder.start()
    for _ in range(epochs):
        train_steps(run, batches(), loss, scheduler=scheduler)
        run.end_epoch()
        evaluate()
    run.enter_evaluation()
    return recorder.history(model)


@torch.no_grad()
def _accuracy(model: nn.Module, loader: Iterable[Any], device: torch.device) -> float:
    model.eval()
    right = count = 0
    for input, target in loader:
        right += int((model(input.to(device)).argmax(1) == target.to(device)).sum())
        count += target.numel()
    return right / count


def overhead(arm: str, steps: int) -> list[float]:
    """Time steps of a tiny model in the plain loop; see :mod:`mosaic_core.bench.overhead`.

    Args:
        arm: ``"empty callback"`` is the loop without mosaic.
        steps: Number of steps.

    Returns:
        Seconds of each step.
    """
    model = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = [NoOp()] if arm == "NoOp" else []
    run = None if arm == "empty callback" else Run(recipe, model=model, optimizer=optimizer)
    batch = (torch.ones(4, 8), torch.zeros(4, dtype=torch.int64))
    seconds, last = [], time.perf_counter()
    for _ in range(steps):
        x, y = batch if run is None else run.on_batch(*batch)
        F.cross_entropy(model(x), y).backward()
        if run is None:
            optimizer.step()
        else:
            run.step()
        optimizer.zero_grad()
        now = time.perf_counter()
        seconds.append(now - last)
        last = now
    return seconds


PLAIN = Adapter(
    name="torch",
    title="plain PyTorch",
    delivers=frozenset(Need),
    trainers=("torch",),
    trainer=f"{__name__}:{train.__name__}",
    overhead=f"{__name__}:{overhead.__name__}",
    precedence=100,
)
"""The plain loop, described as an adapter that delivers everything."""
