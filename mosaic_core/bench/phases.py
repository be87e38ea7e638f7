"""Where the time of a training step goes, in any trainer and without its help.

A training is watched from outside, at events that all trainers share: calls of a
:class:`mosaic_core.run.Run`, the model's forward, torch's backward and torch's optimizers. The time
from one event to the next belongs to what the first of them began; only where the second begins a
micro-batch it belongs to ``"data"``. So every moment of a step is counted once:

- ``"data"``: all that is not below: the loader, moving the batch to the device, and what the
  trainer itself does between the others, such as logging and the learning-rate schedule.
- ``"forward"``: the model's forward, and the loss where the model computes it.
- ``"backward"``: from the end of forward to the end of backward, the loss between them included.
- ``"algorithm"``: what the recipe does in calls of its run. A second pass, as SAM takes it, is
  the algorithm's as a whole. Surgery is not: it shows in forward and backward, as labels that are
  mixed show in the loss.
- ``"optimizer"``: from the end of backward to that of the optimizer's step: clipping and the norm
  of the gradients, as a trainer asks for them, are in it.

Evaluations are not counted. On CUDA every event waits for the device, so that work is counted
where it was asked for; this costs what overlapped before, and is why these trainings are apart
from those that are timed as a whole.
"""

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from mosaic_core.recipe import Recipe
from mosaic_core.run import Run
from mosaic_core.second_pass import SecondPass
from mosaic_core.training import WARM_UP, Train
from mosaic_core.workloads import Workload

__all__ = ["PHASES", "measure"]

PHASES = ("data", "forward", "backward", "algorithm", "optimizer")
"""The phases of a step, in their order."""

# Calls of a run in training, which are the algorithms' time; so is a second pass.
_CALLS = ("on_batch", "skip_batch", "check_loss", "on_gradients", "end_step", "end_epoch")


def measure(
    train: Train,
    workload: Workload,
    recipe: Recipe,
    *,
    epochs: int = 1,
    steps: int = 20,
    data_dir: Path | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Return the median milliseconds of each phase over the steps of a short training.

    Medians are of each phase by itself, so their sum is the time of a step but for its spread; and
    what an algorithm does in less than half of the steps does not show. See the module for what
    belongs to which phase.

    Args:
        train: Trains it with some trainer, in this process.
        workload: What to train; of its data only as many examples as are needed.
        recipe: Algorithms; durations such as ``"0.3dur"`` are of the short training.
        epochs: Its length, for algorithms that count epochs; at least 1.
        steps: Steps to count, at least 1; a few more are taken first to warm up, and more where
            many follow an evaluation, which does not count.
        data_dir: Folder to look for the data first.
        seed: Seed of weights, data order and algorithms.

    Returns:
        Milliseconds by the names in ``PHASES``, in their order.

    Raises:
        ValueError: If ``steps`` is less than 1.
        RuntimeError: If no forward of the run's model was seen, or too few steps.
    """
    if steps < 1:
        raise ValueError(f"measure: steps must be at least 1, got {steps}")
    # The first step of an epoch follows an evaluation, so an epoch needs a second one.
    an_epoch = -(-(WARM_UP + steps + epochs - 1) // epochs)
    short, ledger = workload.shortened(max(2, an_epoch), data_dir), _Ledger()
    with _watched(ledger):
        train(short, recipe, seed=seed, epochs=epochs)
    counted = ledger.steps[WARM_UP:]
    if not (counted and ledger.forwards):
        raise RuntimeError(
            f"measure: train must take {WARM_UP + steps} steps of a Run whose model it calls, got"
            f" {len(ledger.steps)} steps and {ledger.forwards} calls of the model"
        )
    return {phase: 1e3 * statistics.median(step[phase] for step in counted) for phase in PHASES}


class _Ledger:
    """The time of each step by phases; each event ends an interval and begins the next.

    Attributes:
        steps: Seconds of each phase, for the steps that are complete.
        forwards: Training calls of the model that were seen.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.forwards = 0
        # How many are going on, one inside another.
        self._calls = self._backwards = self._optimizers = 0
        self._phase, self._since = "data", _now()
        self._begin_step()

    def _begin_step(self) -> None:
        self._step = dict.fromkeys(PHASES, 0.0)
        self._evaluated = False

    def _turn(self, phase: str, ended: str | None = None) -> None:
        """End an interval, and let one of a phase begin."""
        now = _now()
        self._step[ended or self._phase] += now - self._since
        self._phase, self._since = phase, now

    def enter(self, call: str, *_: Any) -> None:
        """Note that a call of the run begins; what happens inside it is the algorithms'."""
        if not self._calls:
            self._interrupted = self._phase
            self._turn("algorithm", "data" if call == "on_batch" else None)
        self._calls += 1

    def leave(self, call: str, *_: Any) -> None:
        """Note that a call of the run ends."""
        self._calls -= 1
        if self._calls:
            return
        self._turn("data" if call == "end_step" else self._interrupted)
        if call == "end_step":
            if not self._evaluated:
                self.steps.append(self._step)
            self._begin_step()

    def before_forward(self, model: nn.Module, *_: Any) -> None:
        """Note that the model is called; in evaluation mode this is no part of a step."""
        if self._calls:
            return
        if model.training:
            self.forwards += 1
            self._turn("forward", "data")
        else:
            self._evaluated = True

    def after_forward(self, model: nn.Module, *_: Any) -> None:
        """Note that the model has returned."""
        if not self._calls and model.training:
            self._turn("backward")

    def before_backward(self, *_: Any) -> None:
        """Note that a backward begins, perhaps inside another where activations are recomputed."""
        self._backwards += 1

    def after_backward(self, *_: Any) -> None:
        """Note that a backward has ended; the optimizer follows, unless a micro-batch does."""
        self._backwards -= 1
        if not (self._calls or self._backwards):
            self._turn("optimizer")

    def before_optimizer(self, *_: Any) -> None:
        """Note that an optimizer begins, perhaps with a closure that runs forward and backward."""
        self._optimizers += 1
        if not self._calls:
            self._turn("optimizer")

    def after_optimizer(self, *_: Any) -> None:
        """Note that an optimizer has stepped, perhaps one inside another."""
        self._optimizers -= 1
        if not self._calls:
            self._turn("optimizer" if self._optimizers else "data")


def _now() -> float:
    if torch.cuda.is_initialized():  # what was asked of the device belongs to the interval
        torch.cuda.synchronize()
    return perf_counter()


@contextlib.contextmanager
def _watched(ledger: _Ledger) -> Iterator[None]:
    """Let a ledger note what trainings in this process do.

    A trainer makes its run itself, so it is classes that are patched, unlike in an adapter.
    """

    def started(run: Run, *_: Any) -> None:
        stack.callback(run.model.register_forward_pre_hook(ledger.before_forward).remove)
        stack.callback(run.model.register_forward_hook(ledger.after_forward).remove)

    with contextlib.ExitStack() as stack:
        watch = functools.partial(_watch, stack)
        watch(Run, "start", after=started)
        for name in _CALLS:
            enter, leave = (functools.partial(f, name) for f in (ledger.enter, ledger.leave))
            watch(Run, name, enter, leave)
        # Between these two the window is run again, by the run or by the trainer's own loop.
        watch(SecondPass, "begin", before=functools.partial(ledger.enter, "second_pass"))
        watch(SecondPass, "end", after=functools.partial(ledger.leave, "second_pass"))
        # Tensor.backward calls it.
        watch(torch.autograd, "backward", ledger.before_backward, ledger.after_backward)
        stack.callback(register_optimizer_step_pre_hook(ledger.before_optimizer).remove)
        stack.callback(register_optimizer_step_post_hook(ledger.after_optimizer).remove)
        yield


def _watch(
    stack: contextlib.ExitStack,
    owner: Any,
    name: str,
    before: Callable[..., None] = lambda *_: None,
    after: Callable[..., None] = lambda *_: None,
) -> None:
    """Call functions before and after a function, with its arguments, until a stack is closed."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        before(*args)
        try:
            return function(*args, **kwargs)
        finally:
            after(*args)

    stack.callback(setattr, owner, name, function)
    setattr(owner, name, watched)
