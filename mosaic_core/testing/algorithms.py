"""The contract of algorithms: subclass it, give examples, and pytest does the rest.

It trains a small convolutional network with batch norm in the plain loop, on one CPU thread's
worth of work; the whole suite takes about a second an example.
"""

import copy
import dataclasses
import io
import pickle
import random
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaic_core.algorithm import Algorithm, Card, Need
from mosaic_core.loop import train_steps
from mosaic_core.recipe import Recipe
from mosaic_core.run import Run
from mosaic_core.target import MixedTarget
from mosaic_core.testing._network import examples, network

__all__ = ["AlgorithmContract"]

_Batch = Any


class _Snapshot(NamedTuple):
    """What a state dict does not show: the modules, their hooks, the layout of the weights."""

    modules: list[tuple[str, type[nn.Module], int]]
    strides: dict[str, tuple[int, ...]]


class AlgorithmContract:
    """What every algorithm promises, tested on some examples of it.

    Override ``examples``, and the model, the batch or the loss where the algorithm needs others.
    The algorithm must be registered by a plugin.

    Example:
        In a test file::

            from mosaic_core.testing import AlgorithmContract

            class TestCutOut(AlgorithmContract):
                examples = [CutOut(), CutOut(length=0.3)]
    """

    examples: ClassVar[Sequence[Algorithm]] = ()
    """Instances to test, one with each kind of setting that matters."""

    steps: ClassVar[int] = 6
    """Optimizer steps of a run; an example must act within half of them."""

    # What a subclass may override.

    def make_model(self) -> nn.Module:
        """Return a new model, always with the same weights."""
        return network()

    def make_batch(self, index: int) -> _Batch:
        """Return a new batch, the same for the same index."""
        return examples(index)

    def loss(self, model: nn.Module, batch: _Batch) -> Tensor:
        """Return the loss of a transformed batch."""
        x, y = batch
        return F.cross_entropy(model(x), y)

    # Tools.

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run every test on every example."""
        if not self.examples:
            raise TypeError(f"{type(self).__name__}: examples must hold at least one algorithm")
        if "algorithm" in metafunc.fixturenames:
            metafunc.parametrize("algorithm", list(self.examples), ids=repr)

    def start(self, *algorithms: Algorithm, seed: int = 0, model: nn.Module | None = None) -> Run:
        """Return a run that has started."""
        run = Run(algorithms, model=self.make_model() if model is None else model, seed=seed)
        run.start([self.make_optimizer(run.model)], total_steps=self.steps, steps_per_epoch=3)
        run.model.train()
        return run

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return an optimizer with state of its own."""
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def train(self, run: Run, steps: int | None = None, **options: Any) -> Run:
        """Train to the end, or for some steps; epochs have three."""
        accumulate = options.get("accumulate", 1)
        end = self.steps if steps is None else run.progress.step + steps
        while run.progress.step < end:
            first = run.progress.step * accumulate
            batches = [self.make_batch(first + i) for i in range(accumulate)]
            train_steps(run, batches, self.loss, **options)
            if run.progress.step % 3 == 0:
                run.end_epoch()
        return run

    # The settings.

    def test_settings_are_frozen_values(self, algorithm: Algorithm) -> None:
        """They compare, hash, copy and pickle by value, and cannot be changed."""
        again = type(algorithm)(**algorithm.settings)
        for other in (again, copy.deepcopy(algorithm), pickle.loads(pickle.dumps(algorithm))):
            assert other == algorithm
            assert hash(other) == hash(algorithm)
            assert other.settings == algorithm.settings
        assert dataclasses.is_dataclass(algorithm)
        name = next(iter(algorithm.settings), "anything")
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(algorithm, name, 1)

    def test_yaml_round_trip(self, algorithm: Algorithm) -> None:
        """A recipe file gives back the same settings."""
        recipe = Recipe([algorithm])
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe

    def test_card_is_complete(self, algorithm: Algorithm) -> None:
        """Every field says something; the source has an address."""
        card = algorithm.card
        for field in dataclasses.fields(Card):
            text = getattr(card, field.name)
            assert text == text.strip()
            if field.name not in ("reference", "url"):
                assert text, field.name
        for sentence in (card.summary, card.effect, card.use_when, card.interactions):
            assert sentence.endswith(".")
        assert card.reference
        assert card.url.startswith("https://") or card.reference == "-"

    # What it needs, and that it does nothing else.

    def test_needs_tell_all_it_does(self, algorithm: Algorithm) -> None:
        """What it does not declare stays as it would be without it."""
        needs, model = algorithm.needs(), self.make_model()
        assert needs
        before = _snapshot(model), copy.deepcopy(model.state_dict())
        run = Run([algorithm], model=model)
        optimizer, plain = self.make_optimizer(model), self.make_optimizer(model)
        run.start([optimizer], total_steps=self.steps, steps_per_epoch=3)
        if Need.SURGERY not in needs:
            assert _snapshot(model) == before[0]
            _assert_equal(model.state_dict(), before[1])
        if Need.OPTIMIZER not in needs:
            assert optimizer.state_dict() == plain.state_dict()
        batch = self.make_batch(0)
        changed = run.on_batch(batch)
        if Need.BATCH not in needs:
            assert changed is batch
        carried = isinstance(run.locator.read(changed, "target"), MixedTarget)
        assert carried == (Need.LOSS in needs)

    # Training.

    def test_trains(self, algorithm: Algorithm) -> None:
        """A whole run goes through, and the weights move and stay finite."""
        run = self.train(self.start(algorithm))
        start = self.start(algorithm).model.state_dict()
        assert run.progress.step == self.steps
        for name, weight in run.model.named_parameters():
            assert torch.isfinite(weight).all(), name
            assert not torch.equal(weight, start[name]), name

    @pytest.mark.parametrize(
        "options",
        [{"accumulate": 2}, {"autocast": torch.bfloat16}, {"clip_norm": 0.1}],
        ids=["accumulation", "bf16", "clipping"],
    )
    def test_trains_with(self, algorithm: Algorithm, options: dict[str, Any]) -> None:
        """Accumulation, mixed precision and clipping go through, and repeat to the bit."""
        one, other = (self.train(self.start(algorithm), **options) for _ in range(2))
        assert all(torch.isfinite(p).all() for p in one.model.parameters())
        _assert_equal(_state_of(one), _state_of(other))

    def test_deterministic(self, algorithm: Algorithm) -> None:
        """The seed decides everything, whatever the global streams hold."""
        one = self.train(self.start(algorithm))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            other = self.train(self.start(algorithm))
        _assert_equal(_state_of(one), _state_of(other))

    def test_seed_matters_where_it_draws(
        self, algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another seed gives another run if, and only if, the algorithm asks for randomness."""
        draws: list[Any] = []
        real = Run.seed_for

        def seed_for(run: Run, *args: Any, **kwargs: Any) -> int:
            draws.append(args)
            return real(run, *args, **kwargs)

        monkeypatch.setattr(Run, "seed_for", seed_for)
        one = self.train(self.start(algorithm)).model.state_dict()
        other = self.train(self.start(algorithm, seed=1)).model.state_dict()
        equal = all(torch.equal(one[name], other[name]) for name in one)
        assert equal == (not draws)

    def test_global_streams_are_left_alone(self, algorithm: Algorithm) -> None:
        """Switching it on moves neither shuffling nor dropout."""

        def streams() -> tuple[Any, ...]:
            numpy_state = pickle.dumps(np.random.get_state())
            return random.getstate(), numpy_state, torch.get_rng_state().tolist()

        before = streams()
        run = self.train(self.start(algorithm))
        with run.evaluation():
            pass
        assert streams() == before

    def test_users_batches_are_left_alone(self, algorithm: Algorithm) -> None:
        """Neither the structure nor a tensor of a batch changes, nor does training touch them."""
        batches = [self.make_batch(i) for i in range(3)]
        parts = [list(batch) for batch in batches]
        train_steps(self.start(algorithm), batches, self.loss)
        for i, batch in enumerate(batches):
            assert all(a is b for a, b in zip(batch, parts[i], strict=True))
            assert all(map(torch.equal, batch, self.make_batch(i)))

    # Surgery.

    def test_surgery_keeps_parameters_and_names(self, algorithm: Algorithm) -> None:
        """Every Parameter object, buffer and state dict key stays but those it says it replaced."""
        model = self.make_model()
        parameters, keys = dict(model.named_parameters()), model.state_dict().keys()
        run = self.train(self.start(algorithm, model=model), 1)
        replaced = {n for n, p in parameters.items() if id(p) in run.new_parameters.replaced}
        for name in parameters.keys() - replaced:
            assert model.get_parameter(name) is parameters[name]
        assert keys - replaced <= model.state_dict().keys()

    def test_surgery_is_idempotent_and_reported(self, algorithm: Algorithm) -> None:
        """A second time nothing changes; the first time the report names the algorithm."""
        model = self.make_model()
        untouched = _snapshot(model)
        first = self.start(algorithm, model=model)
        changed = _snapshot(model)
        second = self.start(algorithm, model=model)
        assert _snapshot(model) == changed
        assert second.report.changes == first.report.changes
        assert (changed == untouched) or algorithm.name in str(first.report)
        _assert_equal(_state_of(self.train(second)), _state_of(self.train(self.start(algorithm))))

    def test_model_can_be_copied_and_saved_whole(self, algorithm: Algorithm) -> None:
        """Deep copies and files of the model give one that computes the same."""
        run = self.train(self.start(algorithm), 2)
        batch = run.on_batch(self.make_batch(0))
        file = io.BytesIO()
        torch.save(run.model, file)
        file.seek(0)
        copies = [copy.deepcopy(run.model), torch.load(file, weights_only=False)]
        expected = _gradients(run.model, self.loss(run.model, batch))
        for model in copies:
            _assert_equal(_gradients(model, self.loss(model, batch)), expected)

    # Evaluation and checkpoints.

    def test_evaluation_gives_the_training_weights_back(self, algorithm: Algorithm) -> None:
        """To the last bit, buffers included, and training goes on as if nothing had been."""
        run, plain = self.start(algorithm), self.start(algorithm)
        for steps in (self.steps // 2, self.steps - self.steps // 2):
            self.train(run, steps)
            before = copy.deepcopy(run.model.state_dict())
            with run.evaluation():
                assert all(torch.isfinite(p).all() for p in run.model.parameters())
            _assert_equal(run.model.state_dict(), before)
        _assert_equal(_state_of(run), _state_of(self.train(plain)))

    @pytest.mark.parametrize("inside", [False, True], ids=["training", "evaluation"])
    @pytest.mark.parametrize("at", [1, 3])
    def test_resume_is_bit_equal(self, algorithm: Algorithm, at: int, inside: bool) -> None:
        """A new process with the file goes on as the old one, saved with either weights."""
        straight = self.train(self.start(algorithm))
        run = self.train(self.start(algorithm), at)
        if inside:
            with run.evaluation():
                file = _saved_and_loaded(run)
        else:
            file = _saved_and_loaded(run)
        model = self.make_model()
        resumed = Run([algorithm], model=model)
        model.load_state_dict(file["model"])
        optimizer = self.make_optimizer(model)
        resumed.start([optimizer], total_steps=self.steps, steps_per_epoch=3)
        optimizer.load_state_dict(file["optimizer"])
        resumed.load_state_dict(file["run"])
        for other in (resumed, run):  # the run that was saved is not changed by it
            _assert_equal(_state_of(self.train(other)), _state_of(straight))


def _snapshot(model: nn.Module) -> _Snapshot:
    """Describe a model."""
    return _Snapshot(
        [
            (name, type(module), len(module._forward_hooks) + len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        ],
        {name: tensor.stride() for name, tensor in model.state_dict().items()},
    )


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a loss for what is trained now, and the loss."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    names, parameters = zip(*trained, strict=True)
    grads = torch.autograd.grad(loss, parameters)
    return {"loss": loss.detach(), **dict(zip(names, grads, strict=True))}


def _state_of(run: Run) -> dict[str, Any]:
    """Copy all that a run consists of, and the weights it evaluates with."""
    state = {
        "model": run.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "run": run.state_dict(),
    }
    state = copy.deepcopy(state)
    with run.evaluation():
        state["evaluated"] = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    return state


def _saved_and_loaded(run: Run) -> Any:
    """Send the three state dicts through a file that holds no code."""
    file = io.BytesIO()
    torch.save(
        {
            "model": run.model.state_dict(),
            "optimizer": run.optimizers[0].state_dict(),
            "run": run.state_dict(),
        },
        file,
    )
    file.seek(0)
    return torch.load(file, weights_only=True)


def _assert_equal(actual: Any, expected: Any, where: str = "") -> None:
    """Compare nested state to the last bit."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            _assert_equal(actual[key], value, f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for i, value in enumerate(expected):
            _assert_equal(actual[i], value, f"{where}/{i}")
    elif isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype, where
        assert torch.equal(actual, expected), where
    else:
        assert actual == expected, where
