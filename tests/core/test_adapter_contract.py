"""The adapter contract on an adapter of a tiny trainer, and on broken ones: it must find faults."""

import functools
import json
import os
import random

import numpy as np
import pytest
import torch
from torch import nn

from mosaic_core import Need, Recipe, Run, UnsupportedError, plugins
from mosaic_core.adapter import Adapter, Mode
from mosaic_core.shadow import Shadows
from mosaic_core.testing import AdapterContract, adapters

TOY = Adapter(
    name="toy",
    title="Toy",
    delivers=frozenset(Need),
    trainers=("torch",),
    trainer="toy:train",
    overhead="toy:overhead",
    modes=(
        Mode("fp32"),
        Mode("accumulation", accumulate=2),
        Mode("bf16", precision="bf16"),
        Mode("fp16", precision="fp16"),
        Mode("single pass", withheld=frozenset({Need.SECOND_PASS})),
    ),
)


class Trainer:
    """A trainer as adapters find them: it owns the loop, and its methods can be shadowed."""

    def __init__(self, job):
        self.job, self.model = job, job.model
        self.optimizer = job.optimizer(job.model.parameters())
        self.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(job.mode.precision)
        self.scaler = torch.amp.GradScaler("cpu", enabled=job.mode.precision == "fp16")
        self.epoch = 0

    def fit(self):
        size, batches = self.job.mode.accumulate, self.job.batches
        for self.epoch in range(self.epoch, self.job.epochs):  # noqa: B020  # goes on where it was
            self.model.train()
            for start in range(0, len(batches), size):
                self.step(self.window(batches[start : start + size]))
            self.end_epoch()
            if self.job.evaluation:
                self.evaluate()
            if self.job.save:
                self.save()

    def window(self, batches):
        seen = []
        for batch in batches:
            seen.append(self.transfer(batch))
            self.backward(seen[-1])
        return seen

    def transfer(self, batch):
        return batch

    def backward(self, batch):
        self.scaler.scale(self.loss(batch)).backward()

    def loss(self, batch):
        enabled = self.autocast is not None
        with torch.autocast("cpu", self.autocast, enabled=enabled, cache_enabled=False):
            return self.job.loss(self.model(batch[0]), batch[1]) / self.job.mode.accumulate

    def step(self, window):
        self.scaler.unscale_(self.optimizer)
        self.clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def clip(self):
        if self.job.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.job.clip_norm)

    def end_epoch(self):
        pass

    @torch.no_grad()
    def evaluate(self):
        self.model.eval()
        for batch in self.job.evaluation:
            x, y = self.transfer(batch)
            self.job.loss(self.model(x), y)

    def save(self, **more):
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**state, **more}, self.job.folder / f"{self.epoch}.pt")

    def load(self, name):
        state = torch.load(self.job.folder / name, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch = int(name.removesuffix(".pt")) + 1
        return state


class Sound:
    """The adapter: each of its methods stands in for the trainer's of the same name."""

    shadowed = ("window", "transfer", "loss", "step", "clip", "end_epoch", "evaluate", "save")

    def __init__(self, trainer, recipe, seed):
        self.trainer, self.shadows, self.evaluating = trainer, Shadows(), False
        self.check(Recipe(recipe))
        self.run = Run(recipe, model=trainer.model, seed=seed)

    def check(self, recipe):
        TOY.check(recipe, self.trainer.job.mode)

    def fit(self, resume=None):
        self.start()
        if resume is not None:
            self.run.load_state_dict(resume["mosaic"])
        for name in self.shadowed:
            theirs = getattr(self.trainer, name)
            self.shadows.put(self.trainer, name, functools.partial(getattr(self, name), theirs))
        try:
            self.trainer.fit()
            self.end()
        finally:
            self.undo()

    def start(self):
        job = self.trainer.job
        per_epoch = len(job.batches) // job.mode.accumulate
        total = job.epochs * per_epoch
        self.run.start([self.trainer.optimizer], total_steps=total, steps_per_epoch=per_epoch)

    def window(self, theirs, batches):
        return theirs(batches)

    def transfer(self, theirs, batch):
        return batch if self.evaluating else self.run.on_batch(batch)

    def loss(self, theirs, batch):
        value = theirs(batch)
        self.run.check_loss()
        return value

    def step(self, theirs, window):
        scale = self.trainer.scaler.get_scale()
        self.second_pass(window, scale)
        theirs(window)
        self.run.end_step(applied=self.trainer.scaler.get_scale() >= scale)

    def second_pass(self, window, scale):
        self.run.second_pass(lambda: [self.trainer.backward(b) for b in window], scale)

    def clip(self, theirs):
        self.run.on_gradients()
        theirs()

    def end_epoch(self, theirs):
        self.run.end_epoch()

    def evaluate(self, theirs):
        self.evaluating = True
        with self.run.evaluation():
            theirs()
        self.evaluating = False

    def save(self, theirs):
        with self.run.evaluation():
            theirs(mosaic=self.run.state_dict())

    def end(self):
        self.run.enter_evaluation()

    def undo(self):
        self.shadows.undo()


class ToySession:
    def __init__(self, adapter, job):
        self.trainer = Trainer(job)
        self.resume = job.resume
        recipe = job.recipe
        self.adapter = None if recipe is None else adapter(self.trainer, recipe, job.seed)

    @property
    def run(self):
        return self.adapter and self.adapter.run

    def fit(self):
        state = self.trainer.load("0.pt") if self.resume else None
        if self.adapter is None:
            self.trainer.fit()
        else:
            self.adapter.fit(state)

    def objects(self):
        return [self.trainer, self.trainer.model, self.trainer.optimizer]


class ToyContract(AdapterContract):
    adapter = "toy"
    toy = Sound

    @property
    def described(self):
        return TOY

    def session(self, job):
        return ToySession(self.toy, job)


# The suite's other processes, in this one.


class Killed(BaseException):
    """What a signal is here."""


def here(suite, task, mode, folder, *, killed=False, **arguments):
    folder.mkdir(parents=True, exist_ok=True)
    if killed:
        with pytest.raises(Killed):
            suite().work(task, mode, folder, arguments)
        return None
    return json.loads(json.dumps(suite().work(task, mode, folder, arguments)))


@pytest.fixture
def _here(monkeypatch):
    def kill(pid, number):
        raise Killed

    streams = random.getstate(), np.random.get_state()
    monkeypatch.setattr(adapters, "in_worker", here)
    monkeypatch.setattr(os, "kill", kill)
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(streams[0])
    np.random.set_state(streams[1])


@pytest.mark.usefixtures("_here")
class TestASoundAdapter(ToyContract):
    """Passes all of it."""


class InOtherProcesses(ToyContract):
    in_process = False

    def recipes(self):
        return {"MixUp": super().recipes()["MixUp"]}

    def together(self, mode, other):
        return True


def test_cells_in_other_processes_are_trained_once_for_all_modes(tmp_path_factory, monkeypatch):
    started, real = [], adapters.in_worker

    def in_worker(suite, task, mode, folder, **options):
        started.append(task)
        return real(suite, task, mode, folder, **options)

    monkeypatch.setattr(adapters, "in_worker", in_worker)
    for mode in TOY.modes:
        name, options = cell(mode.name, "MixUp")
        getattr(InOtherProcesses(), name)(**options, tmp_path_factory=tmp_path_factory)
    assert started == ["cells"]


def test_what_fails_in_another_process_is_shown(tmp_path):
    with pytest.raises(AssertionError, match="StopIteration"):
        adapters.in_worker(InOtherProcesses, "cells", Mode("unheard of"), tmp_path)


# Faults.


class IgnoresGradients(Sound):
    def clip(self, theirs):
        theirs()


class ActsAfterClipping(Sound):
    def clip(self, theirs):
        theirs()
        self.run.on_gradients()


class ActsOnScaledGradients(Sound):
    def step(self, theirs, window):
        self.run.on_gradients()
        super().step(theirs, window)

    def clip(self, theirs):
        theirs()


class ActsOnEveryMicroBatch(Sound):
    def window(self, theirs, batches):
        seen = []
        for batch in batches:
            seen += theirs([batch])
            if len(seen) < len(batches):
                self.run.on_gradients()
        return seen


class IgnoresTheSecondPass(Sound):
    def second_pass(self, window, scale):
        pass


class RunsHalfTheWindowAgain(Sound):
    def second_pass(self, window, scale):
        super().second_pass(window[: (len(window) + 1) // 2], scale)


class ForgetsTheScaleOfTheSecondPass(Sound):
    def second_pass(self, window, scale):
        super().second_pass(window, 1.0)


class TransformsTheWindowAhead(Sound):
    def window(self, theirs, batches):
        return theirs([self.run.on_batch(batch) for batch in batches])

    def transfer(self, theirs, batch):
        return batch


class ForgetsEvaluationWeights(Sound):
    def evaluate(self, theirs):
        self.evaluating = True
        theirs()
        self.evaluating = False


class StaysInEvaluation(Sound):
    def evaluate(self, theirs):
        self.evaluating = True
        self.run.enter_evaluation()
        theirs()
        self.evaluating = False


class MixesEvaluationBatches(Sound):
    def transfer(self, theirs, batch):
        return self.run.on_batch(batch)


class LeavesTheTrainingWeights(Sound):
    def end(self):
        pass


class UndoesOnlyAtTheEnd(Sound):
    def undo(self):
        pass

    def end(self):
        super().end()
        self.shadows.undo()


class UndoesErrorsOnly(Sound):
    """Not what only the application may catch, such as Ctrl-C."""

    def fit(self, resume=None):
        try:
            super().fit(resume)
        except Exception:
            self.shadows.undo()
            raise
        self.shadows.undo()

    def undo(self):
        pass


class LeavesAHook(Sound):
    def start(self):
        super().start()
        self.trainer.optimizer.register_step_post_hook(lambda *_: None)


class LeavesAShadow(Sound):
    def start(self):
        super().start()
        self.trainer.helper = lambda: None


class SwallowsErrors(Sound):
    def window(self, theirs, batches):
        try:
            return theirs(batches)
        except (ValueError, KeyboardInterrupt):
            self.run.skip_batch()
            return []


class RefusesNothing(Sound):
    def check(self, recipe):
        pass


class RefusesTooLate(Sound):
    def check(self, recipe):
        self.recipe = recipe

    def end_epoch(self, theirs):
        super().end_epoch(theirs)
        super().check(self.recipe)


class RefusesTooMuch(Sound):
    def check(self, recipe):
        super().check(recipe)
        if len(recipe) == 1 and recipe.algorithms[0].name == "EMA":
            raise UnsupportedError("I don't like it")


class DrawsFromTorch(Sound):
    def transfer(self, theirs, batch):
        torch.rand(())
        return super().transfer(theirs, batch)


class DrawsFromNumpy(Sound):
    def transfer(self, theirs, batch):
        np.random.rand()
        return super().transfer(theirs, batch)


class DrawsFromPython(Sound):
    def transfer(self, theirs, batch):
        random.random()
        return super().transfer(theirs, batch)


class CountsNoEpochs(Sound):
    def end_epoch(self, theirs):
        pass


class CountsEpochsTwice(Sound):
    def end_epoch(self, theirs):
        self.run.end_epoch()
        self.run.end_epoch()


class EndsTheEpochAfterItsEvaluation(Sound):
    def end_epoch(self, theirs):
        if not self.trainer.job.evaluation:
            super().end_epoch(theirs)

    def evaluate(self, theirs):
        super().evaluate(theirs)
        self.run.end_epoch()


class CountsSkippedStepsAsTaken(Sound):
    def step(self, theirs, window):
        scale = self.trainer.scaler.get_scale()
        self.second_pass(window, scale)
        theirs(window)
        self.run.end_step()


class CountsMicroBatchesAsSteps(Sound):
    def start(self):
        job = self.trainer.job
        per_epoch = len(job.batches)
        total = job.epochs * per_epoch
        self.run.start([self.trainer.optimizer], total_steps=total, steps_per_epoch=per_epoch)


class ForgetsTheSeed(Sound):
    def __init__(self, trainer, recipe, seed):
        super().__init__(trainer, recipe, 0)


class NeverChecksTheLoss(Sound):
    def loss(self, theirs, batch):
        self.run.skip_batch()
        value = theirs(batch)
        self.run.skip_batch()
        return value


class ChecksTheLossAfterTheStep(Sound):
    def loss(self, theirs, batch):
        return theirs(batch)

    def step(self, theirs, window):
        super().step(theirs, window)
        self.run.check_loss()


class SavesNoState(Sound):
    def save(self, theirs):
        theirs(mosaic=None)

    def fit(self, resume=None):
        super().fit()


class SavesAveragedWeightsAlone(Sound):
    def save(self, theirs):
        state = self.run.state_dict()
        with self.run.evaluation():
            theirs(mosaic=state)


def cell(mode, recipe):
    return "test_cell_equals_the_plain_loop_or_is_refused", {"cell": (mode, recipe)}


EVALUATION = "test_evaluation_sees_plain_batches_and_averaged_weights", {}
STREAM = "test_global_stream_is_left_alone", {}
IGNORED = "test_a_loss_that_ignores_the_mixture_raises", {}
CLIPPING = "test_adamw_and_clipping", {"recipe": "full"}
RESUME = "test_resume_after_a_kill_is_bit_equal", {"optimizer": "sgd"}


def remains(error):
    return "test_nothing_patched_remains", {"error": error}


FAULTS = [
    (IgnoresGradients, cell("fp32", "gradients")),
    (ActsAfterClipping, CLIPPING),
    (ActsOnScaledGradients, cell("fp16", "gradients")),
    (ActsOnEveryMicroBatch, cell("accumulation", "gradients")),
    (IgnoresTheSecondPass, cell("fp32", "SAM")),
    (IgnoresTheSecondPass, cell("fp32", "full recipe")),
    (RunsHalfTheWindowAgain, cell("accumulation", "SAM")),
    (ForgetsTheScaleOfTheSecondPass, cell("fp16", "second pass")),
    (TransformsTheWindowAhead, cell("accumulation", "Backdrop")),
    (ForgetsEvaluationWeights, EVALUATION),
    (StaysInEvaluation, EVALUATION),
    (MixesEvaluationBatches, EVALUATION),
    (LeavesTheTrainingWeights, EVALUATION),
    (EndsTheEpochAfterItsEvaluation, EVALUATION),
    (UndoesOnlyAtTheEnd, remains(ValueError)),
    (UndoesOnlyAtTheEnd, remains(KeyboardInterrupt)),
    (UndoesErrorsOnly, remains(KeyboardInterrupt)),
    (LeavesAHook, remains(None)),
    (LeavesAHook, remains(ValueError)),
    (LeavesAShadow, remains(None)),
    (SwallowsErrors, remains(ValueError)),
    (SwallowsErrors, remains(KeyboardInterrupt)),
    (RefusesNothing, cell("single pass", "SAM")),
    (RefusesNothing, cell("single pass", "full recipe")),
    (RefusesTooLate, cell("single pass", "SAM")),
    (RefusesTooMuch, cell("fp32", "EMA")),
    (DrawsFromTorch, STREAM),
    (DrawsFromNumpy, STREAM),
    (DrawsFromPython, STREAM),
    (CountsNoEpochs, cell("fp32", "progress")),
    (CountsEpochsTwice, cell("fp32", "progress")),
    (CountsSkippedStepsAsTaken, cell("fp16", "progress")),
    (CountsMicroBatchesAsSteps, cell("accumulation", "progress")),
    (ForgetsTheSeed, cell("fp32", "MixUp")),
    (NeverChecksTheLoss, IGNORED),
    (ChecksTheLossAfterTheStep, IGNORED),
    (SavesNoState, RESUME),
    (SavesAveragedWeightsAlone, RESUME),
]


def suite_of(adapter):
    return type(f"{adapter.__name__}Contract", (ToyContract,), {"toy": adapter})


def run_test(suite, name, options, tmp_path, tmp_path_factory):
    if "cell" in options:
        options = {**options, "tmp_path_factory": tmp_path_factory}
    else:
        options = {**options, "tmp_path": tmp_path}
    getattr(suite(), name)(**options)


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("adapter", "where"),
    FAULTS,
    ids=[f"{a.__name__}-{'-'.join(map(str, w[1].values()))}" for a, w in FAULTS],
)
def test_the_suite_finds(adapter, where, tmp_path, tmp_path_factory):
    with pytest.raises(AssertionError):
        run_test(suite_of(adapter), *where, tmp_path, tmp_path_factory)


def test_every_fault_is_looked_for():
    defined = {
        value
        for value in globals().values()
        if isinstance(value, type) and issubclass(value, Sound) and value is not Sound
    }
    assert defined == {adapter for adapter, _ in FAULTS}


# What the suite itself does.


def test_every_registered_algorithm_has_a_cell_in_every_mode():
    cells = []

    class Metafunc:
        fixturenames = ("cell",)

        def parametrize(self, name, values, ids):
            cells.extend(values)

    ToyContract().pytest_generate_tests(Metafunc())
    names = {*plugins.algorithms(), "empty", "full recipe", "gradients", "progress", "second pass"}
    assert set(cells) == {(mode.name, name) for mode in TOY.modes for name in names}


def test_a_suite_without_an_adapter_is_refused():
    """Pytest would run nothing."""

    class TestForgotten(AdapterContract):
        pass

    class Metafunc:
        fixturenames = ("cell",)

    with pytest.raises(TypeError, match="TestForgotten: adapter must be the name of an adapter"):
        TestForgotten().pytest_generate_tests(Metafunc())


def test_an_adapter_that_is_not_registered_is_named():
    with pytest.raises(LookupError, match="no adapter for trainer 'toy' is installed"):
        _ = AdapterContract.described.fget(ToyContract())
