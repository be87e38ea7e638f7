"""Training a workload with DeepSpeed, for ``mosaic demo`` and ``mosaic bench``."""

import atexit
import contextlib
import itertools
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mosaic_core import Algorithm, Recipe
from mosaic_core.algorithms import NoOp
from mosaic_core.training import History, Recorder, Report
from mosaic_core.workloads import Workload

__all__ = ["overhead", "train"]


def train(
    workload: Workload,
    recipe: Iterable[Algorithm] | Recipe,
    *,
    seed: int = 0,
    epochs: int | None = None,
    data_dir: Path | None = None,
    report: Report | None = None,
) -> History:
    """Train a workload with DeepSpeed; see :class:`mosaic_core.training.Train`."""
    loader, evaluation_loader = workload.loaders(workload.load(data_dir), seed)
    epochs = workload.epochs if epochs is None else epochs
    recorder = Recorder(epochs, len(loader), workload.evaluations, report)
    model = workload.new_model(seed)
    made: list[Any] = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made.extend(workload.optimizer(model, recorder.total_steps))
        return made[0]  # type: ignore[no-any-return]  # an optimizer and its schedule

    with _engine_of(
        recipe,
        model=model,
        seed=seed,
        total_steps=recorder.total_steps,
        steps_per_epoch=len(loader),
        optimizer=optimizer,
        lr_scheduler=lambda _: made[1],
        config=_config(workload.batch_size),
    ) as engine:

        def evaluate() -> None:
            recorder.pause()
            engine.eval()
            right = count = 0
            with torch.no_grad(), engine.mosaic.evaluation():
                for x, y in evaluation_loader:
                    x, y = x.to(engine.device), y.to(engine.device)
                    right += int((engine(x).argmax(1) == y).sum())
                    count += y.numel()
            engine.train()
            recorder.evaluated(right / count)

        batches = engine.mosaic.loader(loader)
        engine.train()
        recorder.start()
        for _ in range(epochs):
            for x, y in batches:
                engine.backward(workload.loss(engine(x), y))
                engine.step()
                if engine.was_step_applied():
                    recorder.end_step()
                    if recorder.due:
                        evaluate()
            evaluate()
        engine.mosaic.detach()
    return recorder.history(model)


def overhead(arm: str, steps: int) -> list[float]:
    """Time steps of a tiny model in DeepSpeed; see :mod:`mosaic_core.bench.overhead`.

    Args:
        arm: One of ``mosaic_core.bench.overhead.ARMS``.
        steps: Number of steps.

    Returns:
        Seconds of each step.
    """
    recipes: dict[str, list[Algorithm] | None] = {
        "empty callback": None,
        "empty recipe": [],
        "NoOp": [NoOp()],
    }
    data = [(torch.ones(4, 8), torch.zeros(4, dtype=torch.int64))] * steps
    ends = []
    with _engine_of(
        recipes[arm],
        model=nn.Linear(8, 2),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        config=_config(4),
    ) as engine:
        batches = data if recipes[arm] is None else engine.mosaic.loader(data)
        device = engine.device
        ends.append(time.perf_counter())
        for x, y in batches:
            engine.backward(F.cross_entropy(engine(x.to(device)), y.to(device)))
            engine.step()
            ends.append(time.perf_counter())
    return [end - start for start, end in itertools.pairwise(ends)]


def _config(batch_size: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1
        "zero_optimization": {"stage": 0},  # in one process there is nothing to share
        "steps_per_print": None,
    }


@contextlib.contextmanager
def _engine_of(recipe: Iterable[Algorithm] | Recipe | None, **kwargs: Any) -> Iterator[Any]:
    """Hold an engine, bare without a recipe, in a process that need not be launched by anything."""
    if "RANK" not in os.environ:
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))
            port = str(held.getsockname()[1])
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        atexit.register(_end)  # not before: DeepSpeed keeps its groups for the next engine
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _quiet():
        import deepspeed

        import mosaic_deepspeed

        # Or it would be compiled for a minute, where there is a compiler at all.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        make: Callable[..., Any] = deepspeed.initialize
        arguments: tuple[Any, ...] = ()
        if recipe is not None:
            make, arguments = mosaic_deepspeed.initialize, (recipe,)
        yield make(*arguments, **kwargs)[0]


def _end() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep DeepSpeed's log out of the demo."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
