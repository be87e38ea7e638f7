"""The contract of adapters: subclass it, say how to train, and pytest does the rest.

Everything an adapter promises is checked here once, against the plain loop with the same batches:
every registered algorithm and the full recipe in every mode the adapter lists, resuming after a
kill, evaluation, and that nothing patched remains. A cell of the capability matrix that is not
delivered must be refused before the first step.
"""

import contextlib
import functools
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mosaic_core import plugins
from mosaic_core.adapter import Adapter, Mode
from mosaic_core.agreement import distance
from mosaic_core.algorithm import Algorithm
from mosaic_core.algorithms import EMA, SAM, BlurPool, ChannelsLast, LabelSmoothing, MixUp
from mosaic_core.errors import LossError, UnsupportedError
from mosaic_core.loop import train_steps
from mosaic_core.run import Run
from mosaic_core.testing._jobs import EPOCHS, STEPS_PER_EPOCH, Job, Loss, Outcome, Session, Trained
from mosaic_core.testing._measures import (
    Kill,
    Watch,
    attributes,
    average_gradients,
    copied,
    digest,
    first_layer,
    interpolated,
    ranks,
)
from mosaic_core.testing._network import examples, network
from mosaic_core.testing._probes import Clock, Squash
from mosaic_core.testing._workers import in_worker

__all__ = ["FULL", "AdapterContract"]

FULL = (ChannelsLast(), BlurPool(), MixUp(0.4), LabelSmoothing(), SAM(), EMA("4ba"))
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_CELLS: dict[tuple[type, str], Any] = {}  # outcomes of modes that were trained in other processes
_WITHOUT: dict[tuple[type, str], Trained] = {}  # what each mode gives without algorithms


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
        autocast = _DTYPES[mode.precision]

        def forward(batch: Any) -> None:
            with torch.autocast("cpu", autocast, enabled=bool(autocast), cache_enabled=False):
                self.plain_loss(model, batch, job.loss)

        run = Run(job.recipe, model=model, seed=job.seed, forward=forward, **ranks(mode))
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
                autocast=autocast,
                clip_norm=job.clip_norm,
                scaler=scaler,
                average_gradients=average_gradients if mode.processes > 1 else None,
            )
            run.end_epoch()
            with run.evaluation():
                by_epoch.append(copied(dict(model.named_parameters())))
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
        return copied(model.state_dict())

    def compare(
        self, recipe: Sequence[Algorithm], mode: Mode, folder: Path, **options: Any
    ) -> Outcome:
        """Train with the adapter and with the plain loop, or note that it is refused."""
        job = self.job(recipe, mode, folder, **options)
        before = copied(dict(job.model.named_parameters()))
        try:
            ours = self.train(job)
        except UnsupportedError as error:
            moved = _apart(copied(dict(job.model.named_parameters())), before)
            return Outcome(refused=str(error), weights=moved)
        expected = self.train_plain(self.job(recipe, mode, folder, **options))
        without = self._without_recipe(mode, folder, options)
        if mode.processes > 1:  # each rank has its own batch-norm statistics, DDP sends rank 0's
            names = dict(job.model.named_parameters())
            for trained in (ours, expected, without):
                trained.weights = {n: w for n, w in trained.weights.items() if n in names}
        return Outcome(
            weights=distance(ours.weights, expected.weights),
            averaged=distance(ours.averaged, expected.averaged),
            effect=max(
                _apart(without.weights, expected.weights),
                _apart(without.averaged, expected.averaged),
            ),
        )

    def _without_recipe(self, mode: Mode, folder: Path, options: dict[str, Any]) -> Trained:
        """Train the plain loop without algorithms, once for all recipes of a mode."""
        key = (type(self), mode.name)
        if options:
            return self.train_plain(self.job((), mode, folder, **options))
        if key not in _WITHOUT:
            _WITHOUT[key] = self.train_plain(self.job((), mode, folder))
        return _WITHOUT[key]

    def do(self, task: str, folder: Path, **arguments: Any) -> Any:
        """Do one task in the first mode, in this process if the trainer can."""
        if self.in_process:
            return self.work(task, self._first_mode(), folder, arguments)
        return in_worker(type(self), task, self._first_mode(), folder, **arguments)

    def work(self, task: str, mode: Mode, folder: Path, arguments: dict[str, Any]) -> Any:
        """Do one task in this process, such as ``"cells"``, and return what JSON can hold."""
        return getattr(self, f"_{task}")(mode, folder, **arguments)

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
        if mode.processes == 1 and self.in_process:
            outcome = self.compare(self.recipes()[name], mode, folder)
        else:
            if (type(self), mode.name) not in _CELLS:
                modes = [other.name for other in self.described.modes if self.together(mode, other)]
                found = in_worker(type(self), "cells", mode, folder, modes=modes)
                _CELLS.update({(type(self), other): found[other] for other in modes})
            outcome = Outcome(**_CELLS[type(self), mode.name][name])
        missing = {m for a in self.recipes()[name] for m in self.described.missing(type(a), mode)}
        assert (outcome.refused is not None) == bool(missing), outcome.refused
        assert outcome.weights <= self.tolerance
        assert outcome.averaged <= self.tolerance
        if name == "full recipe" and not missing:
            assert outcome.effect > 1e-3  # it does something

    def _cells(self, mode: Mode, folder: Path, modes: Sequence[str]) -> dict[str, Any]:
        return {
            other: {
                name: asdict(self.compare(recipe, self.mode(other), folder))
                for name, recipe in self.recipes().items()
            }
            for other in modes
        }

    # Other ways to train, with the full recipe.

    def _first_mode(self) -> Mode:
        return self.described.modes[0]

    def _full(self) -> tuple[Algorithm, ...]:
        return tuple(a for a in FULL if self.described.supports(type(a), self._first_mode()))

    @pytest.mark.parametrize("recipe", ["none", "full"])
    def test_adamw_and_clipping(self, recipe: str, tmp_path: Path) -> None:
        """The session is exact without mosaic, and with the recipe, whose gradients it clips."""
        apart = self.do("options", tmp_path, recipe=recipe)
        assert max(apart.values()) <= self.tolerance

    def _options(self, mode: Mode, folder: Path, recipe: str) -> dict[str, float]:
        options = {"optimizer": functools.partial(torch.optim.AdamW, lr=3e-3), "clip_norm": 0.5}
        algorithms = (*self._full(), Squash()) if recipe == "full" else None
        if algorithms and not self.described.supports(Squash, mode):
            algorithms = algorithms[:-1]
        ours = self.train(self.job(algorithms, mode, folder, **options))
        plain = self.train_plain(self.job(algorithms or (), mode, folder, **options))
        return {
            "weights": distance(ours.weights, plain.weights),
            "averaged": distance(ours.averaged, plain.averaged),
        }

    def test_global_stream_is_left_alone(self, tmp_path: Path) -> None:
        """A recipe moves neither shuffling nor dropout."""
        drawn = in_worker(type(self), "streams", self._first_mode(), tmp_path)
        assert drawn["recipe"] == drawn["none"]

    def _streams(self, mode: Mode, folder: Path) -> dict[str, Any]:
        drawn = {}
        for name, recipe in (("none", None), ("recipe", self._full())):
            random.seed(0)
            np.random.seed(0)
            torch.manual_seed(0)
            self.train(self.job(recipe, mode, folder))
            drawn[name] = [torch.rand(4).tolist(), np.random.rand(4).tolist(), random.random()]
        return drawn

    # The loss, evaluation, and what is left behind.

    def test_a_loss_that_ignores_the_mixture_raises(self, tmp_path: Path) -> None:
        """Before the weights move; or it is computed all the same, where any loss is."""
        result = self.do("ignoring", tmp_path)
        assert result["raised"] != self.any_loss
        assert result["weights"] <= (self.tolerance if self.any_loss else 0)

    def _ignoring(self, mode: Mode, folder: Path) -> dict[str, Any]:
        job = self.job([MixUp()], mode, folder)
        job.loss.ignoring = True
        before = copied(dict(job.model.named_parameters()))
        try:
            ours = self.train(job)
        except LossError:
            moved = distance(copied(dict(job.model.named_parameters())), before)
            return {"raised": True, "weights": moved}
        interpolating: Any = interpolated
        plain = self.job([MixUp()], mode, folder, loss=interpolating)
        return {
            "raised": False,
            "weights": distance(ours.weights, self.train_plain(plain).weights),
        }

    def test_evaluation_sees_plain_batches_and_averaged_weights(self, tmp_path: Path) -> None:
        """And training goes on from its own weights, as if nothing had been."""
        result = self.do("evaluation", tmp_path)
        assert result.pop("evaluations") == EPOCHS
        assert result.pop("inputs")
        assert result.pop("targets")
        assert max(result.values()) <= self.tolerance, result

    def _evaluation(self, mode: Mode, folder: Path) -> dict[str, Any]:
        evaluation = [examples(1000 + i) for i in range(2)]
        # Averaged by epoch, so that it shows whether an epoch ends before it is evaluated.
        recipe = [EMA("1ep") if isinstance(a, EMA) else a for a in self._full()]
        job = self.job(recipe, mode, folder, evaluation=evaluation)
        watch = Watch()
        name, layer = first_layer(job.model)
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
                distance({"": weight}, {"": wanted})
                for (_, weight), wanted in zip(watched, expected, strict=True)
            ),
            "weights": distance(ours.weights, plain.weights),
            "averaged": distance(ours.averaged, plain.averaged),
            "left": distance({n: ours.left[n] for n in plain.averaged}, plain.averaged),
        }

    @pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
    def test_nothing_patched_remains(
        self, error: type[BaseException] | None, tmp_path: Path
    ) -> None:
        """After training, after an exception, after Ctrl-C."""
        result = self.do("remains", tmp_path, error=error.__name__ if error else "")
        assert result["differing"] == []

    def _remains(self, mode: Mode, folder: Path, error: str) -> dict[str, list[str]]:
        kinds: dict[str, tuple[type[BaseException], ...]] = {
            "ValueError": (ValueError,),
            "KeyboardInterrupt": (KeyboardInterrupt, SystemExit),
        }
        differing: list[str] = []
        for error_at in (3, 4) if error else (0,):  # in the first and in the second pass of a step
            left = []
            for recipe in (None, self._full()):
                job = self.job(recipe, mode, folder)
                job.loss.error_at = error_at
                job.loss.error = kinds[error][0]("mine") if error else None
                session = self.session(job)
                with contextlib.suppress(*kinds.get(error, ())):
                    session.fit()
                if error and job.loss.calls != error_at:
                    differing.append(f"training went on after the error in call {error_at}")
                left.append([attributes(item) for item in session.objects()])
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
        worker = functools.partial(in_worker, type(self), "resume", self._first_mode())
        whole = worker(tmp_path / "whole", part="whole", **common)
        assert worker(tmp_path / "parts", part="killed", killed=True, **common) is None
        resumed = worker(tmp_path / "parts", part="resumed", **common)
        assert whole.keys() == resumed.keys()
        for name, value in whole.items():
            assert resumed[name] == value, name

    def _resume(self, mode: Mode, folder: Path, part: str, optimizer: str) -> dict[str, str]:
        make: Any = {
            "sgd": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
            "adamw": functools.partial(torch.optim.AdamW, lr=3e-3),
        }[optimizer]
        options = {"optimizer": make, "save": True, "resume": part == "resumed"}
        job = self.job(self._full(), mode, folder, **options)
        if part == "killed":  # in step 13 of 20
            calls = (STEPS_PER_EPOCH + 3) * job.mode.accumulate
            passes = 2 if any(isinstance(a, SAM) for a in self._full()) else 1
            first_layer(job.model)[1].register_forward_pre_hook(Kill(calls * passes))
        trained = self.train(job)
        return {
            f"{kind} {name}": digest(tensor)
            for kind in ("weights", "averaged")
            for name, tensor in getattr(trained, kind).items()
        }


def _apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return how far apart the weights lie that both have: surgery adds some, replaces some."""
    names = a.keys() & b.keys()
    return distance({n: a[n] for n in names}, {n: b[n] for n in names})
