"""The contract of adapters: subclass it, say how to train, and pytest does the rest.

Everything an adapter promises is checked here once, against the plain loop with the same batches:
every registered algorithm and the full recipe in every mode the adapter lists, resuming after a
kill, evaluation, and that nothing patched remains. A cell of the capability matrix that is not
delivered must be refused before the first step.
"""

import contextlib
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from mosaic_core import plugins
from mosaic_core.adapter import Adapter, Mode
from mosaic_core.algorithm import Algorithm
from mosaic_core.algorithms import EMA, SAM, BlurPool, ChannelsLast, LabelSmoothing, MixUp
from mosaic_core.errors import LossError, UnsupportedError
from mosaic_core.loop import train_steps
from mosaic_core.run import Run
from mosaic_core.testing._network import examples, network
from mosaic_core.testing._probes import Clock, Squash

__all__ = ["FULL", "AdapterContract", "Job", "Loss", "Outcome", "Session", "Trained", "difference"]

STEPS_PER_EPOCH, EPOCHS = 10, 2
FULL = (ChannelsLast(), BlurPool(), MixUp(0.4), LabelSmoothing(), SAM(), EMA("4ba"))
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Loss:
    """Cross entropy that notes the targets it is given while evaluating.

    Attributes:
        seen: Targets that came without gradients being asked for.
        ignoring: Whether it computes the loss from the plain labels, by hand.
        error: Raised by the call number ``error_at`` for training.
        overflow_at: Number of the call for training whose loss overflows in float16, or 0.
        calls: Number of calls for training.
    """

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.ignoring = False
        self.error: BaseException | None = None
        self.error_at = 3
        self.overflow_at = 0
        self.calls = 0

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross entropy."""
        if not torch.is_grad_enabled():
            self.seen.append(target)
            return F.cross_entropy(logits, target)
        self.calls += 1
        if self.error is not None and self.calls == self.error_at:
            raise self.error
        if self.ignoring:
            return _by_hand(logits, target)
        if self.calls == self.overflow_at:  # in what cross_entropy is given: its result is the loss
            logits = 2.0**24 * logits
        return F.cross_entropy(logits, target)


def _by_hand(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the cross entropy of plain labels with operations that no carrier knows."""
    one_hot = F.one_hot(target, logits.shape[1])
    return -(one_hot * logits.log_softmax(1)).sum(1).mean()


def _interpolated(logits: Tensor, target: Any) -> Tensor:
    """Compute the same of a mixture, once per component."""
    target.mixture.receipt.consumed = True
    parts = [weight * _by_hand(logits, label) for label, weight in target.mixture.components]
    return torch.stack(parts).sum()


@dataclass
class Job:
    """One training that a session is to do.

    Two epochs of ten optimizer steps, all with the same batches in the same order; no schedule.

    Attributes:
        recipe: The algorithms; None trains without mosaic.
        mode: How to train: accumulation, precision, number of processes.
        model: The model, as :meth:`AdapterContract.wrap` returned it; train this object.
        loss: The loss ``loss(logits, target)``; the wrapped model may hold it too.
        optimizer: Makes the optimizer of some parameters.
        batches: Micro-batches of one epoch as this rank sees them: pairs of images and classes.
        evaluation: Batches to evaluate after every epoch; none for no evaluation.
        clip_norm: Largest norm of all gradients together, or None.
        epochs: Number of epochs.
        seed: Seed of the recipe.
        folder: Where files may be written; checkpoints belong here.
        save: Whether to save a checkpoint, from which training can go on, after every epoch.
        resume: Whether to go on from the checkpoint that another process saved in ``folder``.
    """

    recipe: Sequence[Algorithm] | None
    mode: Mode
    model: nn.Module
    loss: Loss
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    batches: list[tuple[Tensor, Tensor]]
    folder: Path
    evaluation: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    clip_norm: float | None = None
    epochs: int = EPOCHS
    seed: int = 3
    save: bool = False
    resume: bool = False


class Session(Protocol):
    """One training with the trainer, set up and not yet begun."""

    def fit(self) -> None:
        """Train; exceptions of the job's loss come out, perhaps as the trainer turns them."""

    @property
    def run(self) -> Run | None:
        """The run of the recipe, None without one."""

    def objects(self) -> Iterable[Any]:
        """Return the objects that the adapter may have changed: trainer, model, data, optimizer."""


@dataclass
class Outcome:
    """What one cell of the matrix gave; what is not refused is compared with the plain loop.

    Attributes:
        refused: The message, if the adapter refused the recipe before the first step.
        weights: Largest relative difference of a training weight or buffer.
        averaged: The same of the weights to evaluate.
        effect: The same of the training weights and those without a recipe.
    """

    refused: str | None = None
    weights: float = 0.0
    averaged: float = 0.0
    effect: float = 0.0


@dataclass
class Trained:
    """What a training gave.

    Attributes:
        weights: Training weights and buffers by name.
        averaged: Parameters to evaluate.
        by_epoch: The same after every epoch, of the plain loop.
        left: What a user finds in the model when training has ended.
    """

    weights: dict[str, Tensor]
    averaged: dict[str, Tensor]
    by_epoch: list[dict[str, Tensor]]
    left: dict[str, Tensor] = field(default_factory=dict)


class AdapterContract:
    """What every adapter promises.

    Override ``adapter`` and :meth:`session`; and :meth:`wrap`, where the trainer asks for a model
    of its own kind.

    Example:
        In a test file::

            from mosaic_core.testing import AdapterContract

            class TestMine(AdapterContract):
                adapter = "mine"

                def session(self, job):
                    return MySession(job)
    """

    adapter: ClassVar[str] = ""
    """Name under which the adapter is registered."""

    in_process: ClassVar[bool] = True
    """Whether the trainer can be used many times in one process; otherwise each mode gets one."""

    restores_exactly: ClassVar[bool] = True
    """Whether the trainer itself, without mosaic, resumes to the last bit."""

    any_loss: ClassVar[bool] = False
    """Whether a mixture is computed with any loss, also with one that ignores what carries it."""

    tolerance: ClassVar[float] = 1e-6

    # What a subclass may override.

    def session(self, job: Job) -> Session:
        """Set one training up: what a user's script does before it calls fit."""
        raise NotImplementedError

    def wrap(self, net: nn.Module, loss: Loss) -> nn.Module:
        """Return the model a user of the trainer would write around a network."""
        return net

    def together(self, mode: Mode, other: Mode) -> bool:
        """Tell whether two modes may be trained one after the other in the same processes."""
        return mode == other

    def plain_loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], loss: Loss) -> Tensor:
        """Return the loss of a batch in the plain loop, of a model that ``wrap`` returned."""
        return loss(model(batch[0]), batch[1])

    # Tools.

    @property
    def described(self) -> Adapter:
        """The adapter as its plugin describes it."""
        return plugins.adapter(self.adapter)

    def mode(self, name: str) -> Mode:
        """Return a mode of the adapter by name."""
        return next(mode for mode in self.described.modes if mode.name == name)

    def job(
        self, recipe: Sequence[Algorithm] | None, mode: Mode, folder: Path, **options: Any
    ) -> Job:
        """Return a job with a fresh model and the batches of this rank."""
        rank, count = int(os.environ.get("RANK", 0)), STEPS_PER_EPOCH * mode.accumulate
        loss = Loss()
        loss.overflow_at = 3 if mode.precision == "fp16" else 0  # so that a step is skipped
        job = Job(
            recipe=recipe,
            mode=mode,
            model=self.wrap(network(), loss),
            loss=loss,
            optimizer=functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
            batches=[examples(mode.processes * i + rank) for i in range(count)],
            folder=folder,
        )
        return replace(job, **options)

    def train(self, job: Job) -> Trained:
        """Train with the adapter."""
        session = self.session(job)
        session.fit()
        left = self.weights(job.model, session.run)
        return replace(self.result(job.model, session.run, []), left=left)

    def train_plain(self, job: Job) -> Trained:
        """Train with the plain loop, which defines what is right."""
        model, mode = job.model, job.mode
        run = Run(job.recipe, model=model, seed=job.seed, **_ranks(mode))
        optimizer = job.optimizer(model.parameters())
        steps = job.epochs * STEPS_PER_EPOCH
        run.start([optimizer], total_steps=steps, steps_per_epoch=STEPS_PER_EPOCH)
        scaler = torch.amp.GradScaler("cpu") if mode.precision == "fp16" else None
        by_epoch = []
        for _ in range(job.epochs):
            model.train()
            train_steps(
                run,
                job.batches,
                lambda model, batch: self.plain_loss(model, batch, job.loss),
                accumulate=mode.accumulate,
                autocast=_DTYPES[mode.precision],
                clip_norm=job.clip_norm,
                scaler=scaler,
                average_gradients=_average_gradients if mode.processes > 1 else None,
            )
            run.end_epoch()
            with run.evaluation():
                by_epoch.append(_copy(dict(model.named_parameters())))
        return self.result(model, run, by_epoch)

    def result(
        self, model: nn.Module, run: Run | None, by_epoch: list[dict[str, Tensor]]
    ) -> Trained:
        """Copy the training weights and buffers, and the weights to evaluate."""
        if run is not None:
            run.leave_evaluation()
        weights = self.weights(model, run)
        with contextlib.nullcontext() if run is None else run.evaluation():
            averaged = self.weights(model, run)
        return Trained(weights, {n: averaged[n] for n, _ in model.named_parameters()}, by_epoch)

    def weights(self, model: nn.Module, run: Run | None) -> dict[str, Tensor]:
        """Return copies of the parameters and buffers in the model, gathered where sharded."""
        return _copy(model.state_dict())

    def compare(
        self, recipe: Sequence[Algorithm], mode: Mode, folder: Path, **options: Any
    ) -> Outcome:
        """Train with the adapter and with the plain loop, or note that it is refused."""
        job = self.job(recipe, mode, folder, **options)
        before = _copy(dict(job.model.named_parameters()))
        try:
            ours = self.train(job)
        except UnsupportedError as error:
            moved = difference(_copy(dict(job.model.named_parameters())), before)
            return Outcome(refused=str(error), weights=moved)
        expected = self.train_plain(self.job(recipe, mode, folder, **options))
        without = self.train_plain(self.job((), mode, folder, **options))
        if mode.processes > 1:  # each rank has its own batch-norm statistics, DDP sends rank 0's
            names = dict(job.model.named_parameters())
            for trained in (ours, expected, without):
                trained.weights = {n: w for n, w in trained.weights.items() if n in names}
        return Outcome(
            weights=difference(ours.weights, expected.weights),
            averaged=difference(ours.averaged, expected.averaged),
            effect=max(
                difference(without.weights, {n: expected.weights[n] for n in without.weights}),
                difference(expected.averaged, without.averaged),
            ),
        )

    # The matrix.

    def recipes(self) -> dict[str, tuple[Algorithm, ...]]:
        """Return what is trained: every registered algorithm alone, and all of them together.

        The others show in the weights when and with which gradients they were called.
        """
        alone = {name: (cls.example(),) for name, cls in plugins.algorithms().items()}
        uphill = SAM(0.5, epsilon=1.0)  # moves less where the gradients are not unscaled
        probes = {"gradients": (Squash(),), "progress": (Clock(),), "second pass": (uphill,)}
        return {"empty": (), **alone, **probes, "full recipe": FULL}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run the matrix test once for every cell."""
        if "cell" in metafunc.fixturenames:
            if not self.adapter:
                raise TypeError(f"{type(self).__name__}: adapter must be the name of an adapter")
            cells = [(mode.name, name) for mode in self.described.modes for name in self.recipes()]
            metafunc.parametrize("cell", cells, ids=[f"{mode}-{name}" for mode, name in cells])

    def test_cell_equals_the_plain_loop_or_is_refused(
        self, cell: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """Twenty steps of one recipe in one mode; the matrix says which of the two it is."""
        mode, name = self.mode(cell[0]), cell[1]
        folder = tmp_path_factory.mktemp("cell")
        if mode.processes > 1 or not self.in_process:
            if (type(self), mode.name) not in _CELLS:
                modes = [other.name for other in self.described.modes if self.together(mode, other)]
                found = _in_worker(type(self), "cells", mode, folder, modes=modes)
                _CELLS.update({(type(self), other): found[other] for other in modes})
            outcome = Outcome(**_CELLS[type(self), mode.name][name])
        else:
            outcome = self.compare(self.recipes()[name], mode, folder)
        missing = {m for a in self.recipes()[name] for m in self.described.missing(type(a), mode)}
        assert (outcome.refused is not None) == bool(missing), outcome.refused
        assert outcome.weights <= self.tolerance
        assert outcome.averaged <= self.tolerance
        if name == "full recipe" and not missing:
            assert outcome.effect > 1e-3  # it does something

    # Other ways to train, with the full recipe.

    def _first_mode(self) -> Mode:
        return self.described.modes[0]

    def _full(self) -> tuple[Algorithm, ...]:
        return tuple(a for a in FULL if self.described.supports(type(a), self._first_mode()))

    @pytest.mark.parametrize("recipe", ["none", "full"])
    def test_adamw_and_clipping(self, recipe: str, tmp_path: Path) -> None:
        """The session is exact without mosaic, and with the recipe, whose gradients it clips."""
        options = {"optimizer": functools.partial(torch.optim.AdamW, lr=3e-3), "clip_norm": 0.5}
        if not self.in_process:
            result = _in_worker(type(self), "options", self._first_mode(), tmp_path, recipe=recipe)
            assert max(result.values()) <= self.tolerance
            return
        assert max(self._options(recipe, tmp_path, options).values()) <= self.tolerance

    def _options(self, recipe: str, folder: Path, options: dict[str, Any]) -> dict[str, float]:
        mode = self._first_mode()
        algorithms = (*self._full(), Squash()) if recipe == "full" else None
        if algorithms and not self.described.supports(Squash, mode):
            algorithms = algorithms[:-1]
        ours = self.train(self.job(algorithms, mode, folder, **options))
        plain = self.train_plain(self.job(algorithms or (), mode, folder, **options))
        return {
            "weights": difference(ours.weights, plain.weights),
            "averaged": difference(ours.averaged, plain.averaged),
        }

    def test_global_stream_is_left_alone(self, tmp_path: Path) -> None:
        """A recipe moves neither shuffling nor dropout."""
        states = _in_worker(type(self), "streams", self._first_mode(), tmp_path)
        assert states["recipe"] == states["none"]

    # The loss, evaluation, and what is left behind.

    def test_a_loss_that_ignores_the_mixture_raises(self, tmp_path: Path) -> None:
        """Before the weights move; or it is computed all the same, where any loss is."""
        if self.in_process:
            result = self._ignoring(tmp_path)
        else:
            result = _in_worker(type(self), "ignoring", self._first_mode(), tmp_path)
        assert result["raised"] != self.any_loss
        assert result["weights"] <= (self.tolerance if self.any_loss else 0)

    def _ignoring(self, folder: Path) -> dict[str, Any]:
        job = self.job([MixUp()], self._first_mode(), folder)
        job.loss.ignoring = True
        before = _copy(dict(job.model.named_parameters()))
        try:
            ours = self.train(job)
        except LossError:
            moved = difference(_copy(dict(job.model.named_parameters())), before)
            return {"raised": True, "weights": moved}
        interpolating: Any = _interpolated
        plain = self.job([MixUp()], self._first_mode(), folder, loss=interpolating)
        return {
            "raised": False,
            "weights": difference(ours.weights, self.train_plain(plain).weights),
        }

    def test_evaluation_sees_plain_batches_and_averaged_weights(self, tmp_path: Path) -> None:
        """And training goes on from its own weights, as if nothing had been."""
        if self.in_process:
            result = self._evaluation(tmp_path)
        else:
            result = _in_worker(type(self), "evaluation", self._first_mode(), tmp_path)
        assert result.pop("evaluations") == EPOCHS
        assert result.pop("inputs")
        assert result.pop("targets")
        assert max(result.values()) <= self.tolerance, result

    def _evaluation(self, folder: Path) -> dict[str, Any]:
        mode, evaluation = self._first_mode(), [examples(1000 + i) for i in range(2)]
        # Averaged by epoch, so that it shows whether an epoch ends before it is evaluated.
        recipe = [EMA("1ep") if isinstance(a, EMA) else a for a in self._full()]
        job = self.job(recipe, mode, folder, evaluation=evaluation)
        watch = _Watch()
        name, layer = _layer(job.model)
        layer.register_forward_hook(watch)
        ours = self.train(job)
        plain = self.train_plain(self.job(recipe, mode, folder))
        expected = [by_epoch[f"{name}.weight"] for by_epoch in plain.by_epoch for _ in evaluation]
        watched = watch.seen[-len(expected) :]  # a trainer may try its evaluation out first
        targets = job.loss.seen[-len(expected) :]
        return {
            "evaluations": len(watched) / len(evaluation),
            "inputs": all(
                torch.equal(seen, evaluation[i % 2][0]) for i, (seen, _) in enumerate(watched)
            ),
            "targets": len(targets) == len(expected)
            and all(torch.equal(t, evaluation[i % 2][1]) for i, t in enumerate(targets)),
            "seen": max(
                difference({"": weight}, {"": wanted})
                for (_, weight), wanted in zip(watched, expected, strict=True)
            ),
            "weights": difference(ours.weights, plain.weights),
            "averaged": difference(ours.averaged, plain.averaged),
            "left": difference({n: ours.left[n] for n in plain.averaged}, plain.averaged),
        }

    @pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
    def test_nothing_patched_remains(
        self, error: type[BaseException] | None, tmp_path: Path
    ) -> None:
        """After training, after an exception, after Ctrl-C."""
        if self.in_process:
            result = self._remains(error.__name__ if error else "", tmp_path)
        else:
            name = error.__name__ if error else ""
            result = _in_worker(type(self), "remains", self._first_mode(), tmp_path, error=name)
        assert result["differing"] == []

    def _remains(self, error: str, folder: Path) -> dict[str, list[str]]:
        kinds: dict[str, tuple[type[BaseException], ...]] = {
            "ValueError": (ValueError,),
            "KeyboardInterrupt": (KeyboardInterrupt, SystemExit),
        }
        differing: list[str] = []
        for error_at in (3, 4) if error else (0,):  # in the first and in the second pass of a step
            left = []
            for recipe in (None, self._full()):
                job = self.job(recipe, self._first_mode(), folder)
                job.loss.error_at = error_at
                job.loss.error = kinds[error][0]("mine") if error else None
                session = self.session(job)
                with contextlib.suppress(*kinds.get(error, ())):
                    session.fit()
                if error and job.loss.calls != error_at:
                    differing.append(f"training went on after the error in call {error_at}")
                left.append([_attributes(item) for item in session.objects()])
            differing += [
                f"{name}: {before.get(name)} became {after.get(name)}"
                for before, after in zip(*left, strict=True)
                for name in sorted(before.keys() | after.keys())
                if before.get(name) != after.get(name)
            ]
        return {"differing": differing}

    @pytest.mark.slow
    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    def test_resume_after_a_kill_is_bit_equal(self, optimizer: str, tmp_path: Path) -> None:
        """Save after step 10, get killed, go on in a new process, end as the uninterrupted."""
        common: Any = {"optimizer": optimizer}
        worker = functools.partial(_in_worker, type(self), "resume", self._first_mode())
        whole = worker(tmp_path / "whole", part="whole", **common)
        assert worker(tmp_path / "parts", part="killed", killed=True, **common) is None
        resumed = worker(tmp_path / "parts", part="resumed", **common)
        assert whole.keys() == resumed.keys()
        for name, value in whole.items():
            assert resumed[name] == value, name

    def _resume(self, part: str, optimizer: str, folder: Path) -> dict[str, str]:
        make: Any = {
            "sgd": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
            "adamw": functools.partial(torch.optim.AdamW, lr=3e-3),
        }[optimizer]
        options = {"optimizer": make, "save": True, "resume": part == "resumed"}
        job = self.job(self._full(), self._first_mode(), folder, **options)
        if part == "killed":  # in step 13 of 20
            calls = (STEPS_PER_EPOCH + 3) * job.mode.accumulate
            passes = 2 if any(isinstance(a, SAM) for a in self._full()) else 1
            _layer(job.model)[1].register_forward_pre_hook(_Kill(calls * passes))
        trained = self.train(job)
        return {
            f"{kind} {name}": _digest(tensor)
            for kind in ("weights", "averaged")
            for name, tensor in getattr(trained, kind).items()
        }

    # What a worker process calls.

    def work(self, task: str, mode: Mode, folder: Path, arguments: dict[str, Any]) -> Any:
        """Do one task in this process and return what can be written as JSON."""
        if task == "cells":
            return {
                other: {
                    name: asdict(self.compare(recipe, self.mode(other), folder))
                    for name, recipe in self.recipes().items()
                }
                for other in arguments["modes"]
            }
        if task == "options":
            options = {"optimizer": functools.partial(torch.optim.AdamW, lr=3e-3), "clip_norm": 0.5}
            return self._options(arguments["recipe"], folder, options)
        if task == "streams":
            states = {}
            for name, recipe in (("none", None), ("recipe", self._full())):
                random.seed(0)
                np.random.seed(0)
                torch.manual_seed(0)
                self.train(self.job(recipe, mode, folder))
                drawn = torch.rand(4).tolist(), np.random.rand(4).tolist(), random.random()
                states[name] = json.dumps(drawn)
            return states
        if task == "ignoring":
            return self._ignoring(folder)
        if task == "evaluation":
            return self._evaluation(folder)
        if task == "remains":
            return self._remains(arguments["error"], folder)
        return self._resume(arguments["part"], arguments["optimizer"], folder)


class _Watch:
    """A forward hook that notes what a module sees in evaluation."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, module: Any, args: tuple[Tensor, ...], output: Any) -> None:
        if not module.training:
            self.seen.append((args[0].detach().clone(), module.weight.detach().clone()))


class _Kill:
    """A forward hook that kills the process at its n-th call for training."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.left -= module.training
        if self.left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)


def _layer(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the first layer of the network inside a wrapped model, which every forward runs."""
    return next((n, m) for n, m in model.named_modules() if n.split(".")[-1] == "conv1")


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the largest relative difference, by norm, of two sets of tensors of the same names."""
    if a.keys() != b.keys():
        raise ValueError(f"difference: the names must be the same, got {a.keys() ^ b.keys()}")
    pairs = ((a[name].double(), b[name].double()) for name in b)
    values = [float((x - y).norm() / y.norm().clamp_min(1e-12)) for x, y in pairs]
    worst = max(values, default=0.0)
    return float("inf") if any(value != value for value in values) else worst


def _copy(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _digest(tensor: Tensor) -> str:
    import hashlib

    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def _attributes(item: Any) -> dict[str, str]:
    """Describe the callables that hang on an instance, which a shadow would be among."""
    hooks = {
        name: str(len(value))
        for name, value in vars(item).items()
        if name.endswith("_hooks") and value and name not in _KEPT
    }
    shadows = {
        name: getattr(value, "__qualname__", type(value).__qualname__)
        for name, value in vars(item).items()
        if callable(value) and not isinstance(value, nn.Module | type)
    }
    return {f"{type(item).__name__}.{name}": value for name, value in {**hooks, **shadows}.items()}


_KEPT = {"_load_state_dict_pre_hooks"}  # so that a changed model goes on loading its checkpoints


def _ranks(mode: Mode) -> dict[str, Any]:
    if mode.processes == 1:
        return {}
    if not torch.distributed.is_initialized():  # where the trainer has ended it
        torch.distributed.init_process_group("gloo")
    return {"rank": torch.distributed.get_rank(), "world_size": mode.processes}


def _average_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= torch.distributed.get_world_size()


# Other processes.


_CELLS: dict[tuple[type[AdapterContract], str], Any] = {}
"""Outcomes by name of the modes that were trained in processes of their own, once for all tests."""


def _in_worker(
    suite: type[AdapterContract],
    task: str,
    mode: Mode,
    folder: Path,
    *,
    killed: bool = False,
    **arguments: Any,
) -> Any:
    """Do a task in as many new processes as the mode has, and return what rank 0 found."""
    folder.mkdir(parents=True, exist_ok=True)
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    source = sys.modules[suite.__module__].__file__
    request = {
        "source": source,
        "suite": suite.__name__,
        "task": task,
        "mode": mode.name,
        "folder": str(folder),
        "answer": str(answer),
        "arguments": arguments,
    }
    with _free_port() as port:
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(mode.processes)]
        launch += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    command = [sys.executable, *(launch if mode.processes > 1 else []), "-m"]
    command += ["mosaic_core.testing.worker", json.dumps(request)]
    done = subprocess.run(
        command,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    if killed:
        assert done.returncode == -signal.SIGKILL, done.stderr
        return None
    assert done.returncode == 0, done.stderr
    return json.loads(answer.read_text())


@contextlib.contextmanager
def _free_port() -> Iterator[int]:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
