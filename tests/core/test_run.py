"""One training run of a recipe: its order, randomness, evaluation and checkpoints."""

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaic_core import Algorithm, LossError, Need, Place, Run, UnsupportedError
from mosaic_core.algorithms import EMA, Backdrop, BlurPool, LabelSmoothing, MixUp, NoOp
from mosaic_core.batch import Batch
from mosaic_core.random import derive_seed
from mosaic_core.target import MixedTarget

N, CLASSES = 8, 5


class Net(nn.Module):
    """A small convolutional network with batch norm and something to blur."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.down = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


def make_net() -> Net:
    """Make the same network every time, without the global stream."""
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return Net()


def data(index: int) -> tuple[Tensor, Tensor]:
    """Make micro-batch ``index``."""
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(N, 1, 6, 6, generator=generator)
    return x, torch.randint(CLASSES, (N,), generator=generator)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Make momentum SGD."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Make AdamW."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def make_run(recipe: Any, optimizer: Any = sgd, **kwargs: Any) -> Run:
    """Make a started run of a fresh network."""
    model = make_net()
    return Run(recipe, model=model, optimizer=optimizer(model), **{"total_steps": 20} | kwargs)


def train(run: Run, steps: range, accumulate: int = 1) -> None:
    """Train as the documentation of a plain loop says."""
    for step in steps:
        run.optimizers[0].zero_grad()
        for micro in range(accumulate):
            x, y = run.on_batch(*data(step * accumulate + micro))
            (F.cross_entropy(run.model(x), y) / accumulate).backward()
        run.step()


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Copy all weights and buffers."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one: Any, other: Any) -> None:
    """Compare nested dictionaries of tensors to the last bit."""
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


# The order of a run.

EVENTS: list[str] = []


@pytest.fixture(autouse=True)
def _no_events() -> None:
    EVENTS.clear()


@dataclass(frozen=True)
class Recorder(Algorithm):
    """Writes down every point at which it is called."""

    label: str = ""
    place = Place.MEASURING

    def _record(self, event: str) -> None:
        EVENTS.append(event + self.label)

    def prepare_model(self, model: nn.Module, run: Run) -> None:
        self._record("prepare_model")

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, run: Run) -> None:
        self._record("prepare_optimizer")

    def init_state(self, run: Run) -> dict[str, int]:
        self._record("init_state")
        return {"value": 0}

    def on_batch(self, batch: Batch, run: Run) -> Batch:
        self._record("on_batch")
        return batch

    def on_first_pass(self, run: Run) -> None:
        self._record("on_first_pass")

    def on_second_pass(self, run: Run) -> None:
        self._record("on_second_pass")

    def on_gradients(self, run: Run) -> None:
        self._record("on_gradients")

    def on_step_end(self, run: Run) -> None:
        self._record("on_step_end")

    def on_epoch_end(self, run: Run) -> None:
        self._record("on_epoch_end")

    def evaluation_weights(self, run: Run) -> dict[str, Tensor]:
        self._record("evaluation_weights")
        return {name: p + 1 for name, p in run.model.named_parameters()}

    def on_evaluation(self, run: Run) -> None:
        self._record("on_evaluation")

    def state_dict(self, run: Run) -> dict[str, Any]:
        self._record("state_dict")
        return run.state(self)

    def load_state_dict(self, state: dict[str, Any], run: Run) -> None:
        self._record("load_state_dict")
        run.state(self).update(state)


def took() -> list[str]:
    """Return the events since the last call."""
    events = EVENTS.copy()
    EVENTS.clear()
    return events


def test_the_order_of_the_points_as_an_adapter_calls_them() -> None:
    model = make_net()
    run = Run([Recorder()], model=model)
    assert took() == ["prepare_model"]
    assert not run.started
    run.start([sgd(model)], total_steps=10, steps_per_epoch=5)
    assert took() == ["prepare_optimizer", "init_state"]
    assert run.started
    for _ in range(2):
        run.on_batch(data(0))
        run.check_loss()
    assert took() == ["on_batch"] * 2
    run.second_pass(lambda: EVENTS.append("closure"))
    assert took() == ["on_first_pass", "closure", "on_second_pass"]
    run.on_gradients()
    assert took() == ["on_gradients"]
    run.end_step(applied=True)
    assert took() == ["on_step_end"]
    run.end_step(applied=False)
    assert took() == []
    run.end_epoch()
    assert took() == ["on_epoch_end"]
    with run.evaluation():
        assert took() == ["evaluation_weights", "on_evaluation"]
    state = run.state_dict()
    assert took() == ["state_dict"]
    run.load_state_dict(state)
    assert took() == ["load_state_dict"]


def test_the_order_of_the_points_in_a_plain_loop() -> None:
    model = make_net()
    run = Run([Recorder()], model=model, optimizer=sgd(model))
    assert took() == ["prepare_model", "prepare_optimizer", "init_state"]
    run.optimizers[0].register_step_pre_hook(lambda *_: EVENTS.append("step"))
    run.on_batch(*data(0))
    run.step(lambda: EVENTS.append("closure"))
    assert took() == [
        *("on_batch", "on_first_pass", "closure", "on_second_pass"),
        *("on_gradients", "step", "on_step_end"),
    ]


def test_algorithms_act_in_the_order_of_the_recipe_at_every_point() -> None:
    members = {"place": Place.SELECTION, "evaluation_weights": Algorithm.evaluation_weights}
    early = type("Early", (Recorder,), members)
    run = make_run([Recorder("-late"), early("-early")])
    run.on_batch(*data(0))
    run.step(lambda: None)
    run.end_epoch()
    names = [event.split("-")[0] for event in EVENTS]
    assert names[::2] == names[1::2]
    assert [event.split("-")[1] for event in EVENTS] == ["early", "late"] * (len(names) // 2)
    assert len(names) == 2 * 9


def test_an_algorithm_is_called_only_where_it_acts() -> None:
    class Raising(NoOp):
        pass

    for point in ("on_batch", "on_gradients", "on_step_end"):
        setattr(Raising, point, getattr(Algorithm, point))
    assert Raising.needs() == frozenset()
    run = make_run([Raising()])
    assert run.on_batch("not a batch") == "not a batch"  # nothing looks at it


def test_starting_again_prepares_new_optimizers_only_and_keeps_the_state() -> None:
    model = make_net()
    run = Run([Recorder()], model=model)
    first, second = sgd(model), adamw(model)
    run.start([first])
    run.state(run.recipe.algorithms[0])["value"] = 7
    took()
    run.start([first])
    assert took() == []
    run.start([first, second], total_steps=3)
    assert took() == ["prepare_optimizer"]
    assert run.optimizers == [first, second]
    assert run.state(run.recipe.algorithms[0]) == {"value": 7}
    assert run.progress.total_steps == 3


def test_several_optimizers_step_together() -> None:
    model = make_net()
    optimizers = [
        torch.optim.SGD(model.head.parameters(), 0.1),
        torch.optim.SGD(model.stem.parameters(), 0.1),
    ]
    run = Run([NoOp()], model=model, optimizer=optimizers)
    before = bits(model)
    x, y = run.on_batch(*data(0))
    F.cross_entropy(model(x), y).backward()
    run.step()
    assert not torch.equal(model.head.weight, before["head.weight"])
    assert not torch.equal(model.stem.weight, before["stem.weight"])
    assert torch.equal(model.down.weight, before["down.weight"])


def test_a_run_that_has_not_started_says_so() -> None:
    model = make_net()
    run = Run([EMA("4ba")], model=model)
    with pytest.raises(RuntimeError, match=r"Run.step: there is no optimizer .*run.start\("):
        run.step()
    with pytest.raises(RuntimeError, match=r"Run: EMA has no state before training; .*run.start"):
        run.state(run.recipe.algorithms[0])
    before = bits(model)
    with run.evaluation():
        assert_same(bits(model), before)
    assert not run.in_evaluation


def test_reset_forgets_everything_but_the_weights() -> None:
    run = make_run([MixUp(), EMA("4ba")])
    train(run, range(2))
    run.enter_evaluation()
    before = bits(run.model)
    optimizers = run.optimizers
    run.reset()
    assert not run.started
    assert not run.in_evaluation
    assert run.progress.step == 0
    assert run.metrics == {}
    assert_same(bits(run.model), before)
    run.start(optimizers)
    assert run.state(run.recipe.algorithms[1]).averages is None


# Batches.


@pytest.mark.parametrize("batch", [data(0), {"x": 1}, [1, 2], object(), None])
def test_an_empty_recipe_returns_the_batch_itself(batch: Any) -> None:
    run = make_run([])
    assert run.on_batch(batch) is batch
    assert run.progress.micro_batch == 1


def test_an_empty_recipe_returns_input_and_target_themselves() -> None:
    x, y = data(0)
    one, other = make_run([]).on_batch(x, y)
    assert one is x
    assert other is y


def test_input_and_target_or_a_batch_are_the_same() -> None:
    x, y = data(0)
    pair = make_run([MixUp(), LabelSmoothing()]).on_batch(x, y)
    whole = make_run([MixUp(), LabelSmoothing()]).on_batch((x, y))
    named = make_run([MixUp(), LabelSmoothing()]).on_batch({"x": x, "y": y})
    assert type(pair) is tuple
    assert torch.equal(pair[0], whole[0])
    assert torch.equal(pair[0], named["x"])
    for target in (pair[1], whole[1], named["y"]):
        assert torch.equal(target.mixture.dense(CLASSES), pair[1].mixture.dense(CLASSES))
    assert not torch.equal(pair[0], x)


def test_the_carrier_is_the_target_or_the_run() -> None:
    x, y = data(0)
    by_target = make_run([LabelSmoothing()])
    by_proxy = make_run([LabelSmoothing()], carrier="proxy")
    _, target = by_target.on_batch(x, y)
    assert isinstance(target, MixedTarget)
    assert target.mixture is by_target.mixture
    _, plain = by_proxy.on_batch(x, y)
    assert type(plain) is Tensor
    assert torch.equal(plain, y)
    assert by_proxy.mixture.smoothing == pytest.approx(0.1)
    with pytest.raises(LossError):  # no proxy evaluated it
        by_proxy.check_loss()


@pytest.mark.parametrize("carrier", ["loss", "Target", "", None])
def test_an_unknown_carrier_is_refused_before_the_model_is_changed(carrier: Any) -> None:
    model = make_net()
    message = rf"^Run: carrier must be one of \('target', 'proxy'\), got {carrier!r}$"
    with pytest.raises(ValueError, match=message):
        Run([BlurPool()], model=model, carrier=carrier)
    assert type(model.down) is nn.Conv2d


def test_labels_that_no_algorithm_changed_stay_plain() -> None:
    run = make_run([type("Keeps", (NoOp,), {"changes_labels": True})()])
    x, y = data(0)
    new_x, new_y = run.on_batch(x, y)
    assert new_x is x
    assert new_y is y
    run.check_loss()


def test_integer_images_are_refused() -> None:
    with pytest.raises(TypeError, match=r"input must be floating-point, got torch.uint8; convert"):
        make_run([MixUp()]).on_batch(torch.zeros(4, 1, 6, 6, dtype=torch.uint8), torch.zeros(4))


def test_forward_runs_the_model_or_what_it_was_given() -> None:
    run = make_run([MixUp()])
    batch = run.on_batch(data(0))
    seen = []
    run.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run.forward(batch)
    assert seen[0] is batch[0]
    given: list[Any] = []
    run = make_run([], forward=given.append)
    run.forward(batch)
    assert given[0] is batch


def test_recent_holds_as_many_transformed_batches_as_an_algorithm_asks_for() -> None:
    run = make_run([MixUp(), EMA("4ba", recompute_batchnorm=2)])
    batches = [run.on_batch(data(i)) for i in range(3)]
    assert [a is b for a, b in zip(run.recent, batches[1:], strict=True)] == [True, True]
    run = make_run([MixUp()])
    run.on_batch(data(0))
    assert list(run.recent) == []


# Randomness.


def draws(steps: int, accumulate: int = 1, **kwargs: Any) -> list[Tensor]:
    """Return the transformed inputs of every micro-batch; the data is always the same."""
    run = make_run([MixUp(1.0)], **kwargs)
    inputs = []
    for _ in range(steps):
        for _ in range(accumulate):
            inputs.append(run.on_batch(*data(0))[0])
        run.end_step()
    return inputs


def test_every_micro_batch_of_every_step_draws_anew() -> None:
    inputs = draws(20, accumulate=4)
    assert len({tuple(x.flatten().tolist()) for x in inputs}) == 80


def test_the_same_seed_draws_the_same_whatever_the_global_stream() -> None:
    torch.manual_seed(0)
    first = draws(20, accumulate=4)
    torch.manual_seed(1)
    for one, other in zip(first, draws(20, accumulate=4), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("other", [{"seed": 1}, {"rank": 1}, {"seed": -1}])
def test_other_seeds_and_ranks_draw_differently(other: dict[str, int]) -> None:
    for one, two in zip(draws(5), draws(5, **other), strict=True):
        assert not torch.equal(one, two)


def test_the_position_in_the_window_counts_not_the_number_of_batches() -> None:
    plain, accumulated = draws(2, accumulate=1), draws(2, accumulate=2)
    assert torch.equal(plain[0], accumulated[0])
    assert torch.equal(plain[1], accumulated[2])


def test_the_seed_is_a_function_of_the_documented_key() -> None:
    run = make_run([MixUp()], seed=3, rank=2)
    mixup = run.recipe.algorithms[0]
    run.progress.step, run.progress.micro_batch = 7, 1
    assert run.seed_for(mixup) == derive_seed(3, "MixUp", 7, 1, 2)
    assert run.seed_for(mixup, "a", 4) == derive_seed(3, "MixUp", 7, 1, 2, "a", 4)
    assert run.seed_for(mixup, shared=True) == derive_seed(3, "MixUp", 7, 1, -1)
    drawn = torch.rand(3, generator=run.generator(mixup, "a"))
    expected = torch.Generator().manual_seed(derive_seed(3, "MixUp", 7, 1, 2, "a"))
    assert torch.equal(drawn, torch.rand(3, generator=expected))


def test_shared_draws_are_the_same_on_all_ranks() -> None:
    runs = [make_run([MixUp()], rank=rank) for rank in range(3)]
    seeds = {run.seed_for(run.recipe.algorithms[0], shared=True) for run in runs}
    assert len(seeds) == 1
    assert seeds.isdisjoint(run.seed_for(run.recipe.algorithms[0]) for run in runs)


def test_a_whole_recipe_takes_nothing_from_the_global_stream() -> None:
    recipe = [MixUp(), LabelSmoothing(), EMA("3ba"), BlurPool(), Backdrop("norm")]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run = make_run(recipe)
    train(run, range(3))
    with run.evaluation():
        pass
    run.state_dict()
    assert torch.equal(torch.get_rng_state(), before)


# Loss.


def one_hot_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the cross entropy by hand, which silently loses a mixture."""
    return -(F.one_hot(target, CLASSES) * F.log_softmax(logits, 1)).sum(1).mean()


def test_a_hand_written_loss_is_an_error_before_the_weights_move() -> None:
    run = make_run([MixUp(), EMA("4ba")])
    before = bits(run.model)
    x, y = run.on_batch(*data(0))
    run.model.eval()  # or the batch norm would move on forward
    one_hot_loss(run.model(x), y).backward()
    with pytest.raises(
        LossError,
        match=r"mosaic: the loss of this step ignored the mixed labels .* silently wrong"
        r".*cross_entropy.*@mosaic_core.register_loss",
    ):
        run.step()
    assert_same(bits(run.model), before)
    assert run.progress.step == 0
    assert run.state(run.recipe.algorithms[1]).averages is None


def test_one_ignored_micro_batch_of_a_window_is_enough() -> None:
    run = make_run([MixUp()])
    for loss in (F.cross_entropy, one_hot_loss, F.cross_entropy):
        x, y = run.on_batch(*data(0))
        loss(run.model(x), y).backward()
    with pytest.raises(LossError):
        run.step()


def test_a_loss_that_computed_the_mixture_passes() -> None:
    run = make_run([MixUp()])
    x, y = run.on_batch(*data(0))
    F.cross_entropy(run.model(x), y).backward()
    run.check_loss()
    run.check_loss()


def test_a_skipped_batch_asks_nothing_of_the_loss() -> None:
    run = make_run([MixUp()])
    run.on_batch(*data(0))
    run.skip_batch()
    run.check_loss()


# Counting and logging.


def test_metrics_have_a_prefix_and_tensors_are_not_read() -> None:
    run = make_run([MixUp(), EMA("3ba")])
    train(run, range(2))
    assert run.metrics.keys() == {"mosaic/MixUp/mixing", "mosaic/EMA/smoothing"}
    assert 0 <= run.metrics["mosaic/MixUp/mixing"] <= 0.5
    assert run.metrics["mosaic/EMA/smoothing"] == pytest.approx(2 ** (-1 / 3))
    value = torch.ones(3, device="meta")
    run.log("x", value)  # a tensor with several elements and no data can't be read
    assert run.metrics["mosaic/x"] is value


@pytest.mark.parametrize("world_size", [1, 2])
def test_samples_and_tokens_are_counted_over_all_ranks(world_size: int) -> None:
    run = make_run([NoOp()], world_size=world_size)
    run.on_batch(torch.ones(4, 7, dtype=torch.long), torch.ones(4))
    assert (run.progress.samples, run.progress.tokens) == (4 * world_size, 28 * world_size)
    run.on_batch(torch.ones(3, 7), torch.ones(3))  # images have no tokens
    assert (run.progress.samples, run.progress.tokens) == (7 * world_size, 28 * world_size)


def test_steps_epochs_and_micro_batches_are_counted() -> None:
    run = make_run([], steps_per_epoch=4)
    for _ in range(3):
        run.on_batch(data(0))
    assert (run.progress.micro_batch, run.progress.step) == (3, 0)
    run.end_step()
    assert (run.progress.micro_batch, run.progress.step) == (0, 1)
    run.end_epoch()
    assert run.progress.epoch == 1
    assert (run.progress.total_steps, run.progress.steps_per_epoch) == (20, 4)
    assert run.progress.fraction == 1 / 20
    run.on_batch(data(0))
    run.start(run.optimizers, total_steps=20)
    assert run.progress.micro_batch == 0  # a window that was never finished


def test_a_skipped_step_counts_but_averages_nothing() -> None:
    run = make_run([EMA("2ba")])
    ema = run.recipe.algorithms[0]
    run.end_step(applied=False)
    assert run.state(ema).averages is None  # not even begun
    run.end_step()
    average = {name: value.clone() for name, value in run.state(ema).averages.items()}
    with torch.no_grad():
        run.model.head.weight.add_(1)
    run.end_step(applied=False)
    assert run.progress.step == 3
    assert_same(run.state(ema).averages, average)
    run.end_step()
    assert not torch.equal(run.state(ema).averages["head.weight"], average["head.weight"])


# Two passes.


@dataclass(frozen=True)
class Ascent(Algorithm):
    """Sharpness-aware minimisation: the gradient at ``w + rho * g / |g|``, applied at ``w``."""

    rho: float = 0.1
    place = Place.GRADIENTS

    def init_state(self, run: Run) -> dict[str, Tensor]:
        return {}

    @torch.no_grad()
    def on_first_pass(self, run: Run) -> None:
        view, saved = run.parameters, run.state(self)
        pairs = [(f, view.grad(f)) for f in view.fragments()]
        norm = view.all_reduce(torch.stack([g.square().sum() for _, g in pairs]).sum()).sqrt()
        for fragment, grad in pairs:
            saved[fragment.name] = fragment.master.clone()
            fragment.master.add_(grad * (self.rho / norm))
        view.publish()

    @torch.no_grad()
    def on_second_pass(self, run: Run) -> None:
        saved = run.state(self)
        for fragment in run.parameters.fragments():
            fragment.master.copy_(saved.pop(fragment.name))
        run.parameters.publish()


def two_pass_by_hand(steps: int, accumulate: int, smoothing: float = 0.0) -> Net:
    """Train by hand; in the second pass the batch norm has momentum 0, so it does not move."""
    model = make_net()
    optimizer = sgd(model)

    def backward(step: int) -> None:
        for micro in range(accumulate):
            x, y = data(step * accumulate + micro)
            loss = F.cross_entropy(model(x), y, label_smoothing=smoothing) / accumulate
            loss.backward()

    for step in range(steps):
        optimizer.zero_grad()
        backward(step)
        weights = [p.detach().clone() for p in model.parameters()]
        norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(p.grad * (0.1 / norm))
        optimizer.zero_grad()
        model.norm.momentum = 0.0
        backward(step)
        model.norm.momentum = 0.1
        with torch.no_grad():
            for p, w in zip(model.parameters(), weights, strict=True):
                p.copy_(w)
        optimizer.step()
    return model


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_two_passes_equal_a_hand_written_loop(accumulate: int, smoothing: float) -> None:
    run = make_run([Ascent(), LabelSmoothing(smoothing)] if smoothing else [Ascent()])
    assert Need.SECOND_PASS in Ascent.needs()
    for step in range(6):
        run.optimizers[0].zero_grad()
        window = [run.on_batch(*data(step * accumulate + m)) for m in range(accumulate)]

        def backward(window: list[Any] = window) -> None:
            for x, y in window:
                (F.cross_entropy(run.model(x), y) / accumulate).backward()

        backward()
        run.step(backward)
    by_hand = two_pass_by_hand(6, accumulate, smoothing)
    tracked = by_hand.norm.num_batches_tracked
    assert tracked == 2 * 6 * accumulate  # momentum 0 does not stop this count
    tracked.fill_(6 * accumulate)
    assert_same(bits(run.model), bits(by_hand))  # difference 0.0


@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_two_passes_under_a_gradient_scaler_see_unscaled_gradients(scale: float) -> None:
    seen: dict[Run, list[Tensor]] = {}

    class Watched(Ascent):
        def on_first_pass(self, run: Run) -> None:
            seen[run] = [run.parameters.grad(f).clone() for f in run.parameters.fragments()]
            super().on_first_pass(run)

    run, plain = make_run([Watched()]), make_run([Watched()])
    for index in range(3):

        def backward(run: Run, factor: float, batch: Any) -> None:
            x, y = batch
            (F.cross_entropy(run.model(x), y) * factor).backward()

        run.optimizers[0].zero_grad()
        batch = run.on_batch(*data(index))
        backward(run, scale, batch)
        run.second_pass(lambda batch=batch: backward(run, scale, batch), scale=scale)
        for parameter in run.model.parameters():  # as the scaler does before the step
            parameter.grad /= scale
        run.optimizers[0].step()
        run.end_step()

        plain.optimizers[0].zero_grad()
        batch = plain.on_batch(*data(index))
        backward(plain, 1.0, batch)
        plain.step(lambda batch=batch: backward(plain, 1.0, batch))
        assert_same(seen[run], seen[plain])
    assert_same(bits(run.model), bits(plain.model))  # a power of two rounds nothing


def test_two_passes_without_a_closure_are_refused_before_anything_moves() -> None:
    run = make_run([Ascent(), NoOp()])
    x, y = run.on_batch(*data(0))
    F.cross_entropy(run.model(x), y).backward()
    before = bits(run.model)
    with pytest.raises(
        UnsupportedError,
        match=r"Run.step: Ascent runs forward and backward twice; give run.step\(closure\)",
    ):
        run.step()
    assert_same(bits(run.model), before)
    assert run.progress.step == 0


def test_a_closure_is_not_called_without_a_two_pass_algorithm() -> None:
    run = make_run([NoOp()])

    def closure() -> None:
        raise AssertionError("called")

    run.step(closure)
    run.second_pass(None)


def test_buffers_are_put_back_even_if_the_second_pass_fails() -> None:
    run = make_run([Ascent()])
    x, y = run.on_batch(*data(0))
    F.cross_entropy(run.model(x), y).backward()
    mean = run.model.norm.running_mean.clone()

    def closure() -> None:
        run.model(x)
        raise ValueError("out of memory")

    with pytest.raises(ValueError, match="out of memory"):
        run.step(closure)
    assert torch.equal(run.model.norm.running_mean, mean)


# Evaluation.


@pytest.fixture(params=[0, 2], ids=["", "recomputing batch norm"])
def averaging(request: pytest.FixtureRequest) -> Run:
    """Make a run with averaged weights that differ from those of training."""
    run = make_run([MixUp(), EMA("2ba", recompute_batchnorm=request.param)])
    train(run, range(4))
    return run


def test_evaluation_puts_the_average_in_and_the_very_weights_back(averaging: Run) -> None:
    run, before = averaging, bits(averaging.model)
    average = run.state(run.recipe.algorithms[1]).averages
    identity = list(run.model.parameters())
    with run.evaluation():
        assert run.in_evaluation
        inside = bits(run.model)
        for name, value in average.items():
            assert torch.equal(inside[name], value)
            assert not torch.equal(inside[name], before[name])
        recomputed = bool(run.recipe.algorithms[1].recompute_batchnorm)
        moved = not torch.equal(inside["norm.running_mean"], before["norm.running_mean"])
        assert moved is recomputed
    assert not run.in_evaluation
    assert_same(bits(run.model), before)
    assert all(a is b for a, b in zip(identity, run.model.parameters(), strict=True))


def test_evaluation_nests(averaging: Run) -> None:
    run, before = averaging, bits(averaging.model)
    with run.evaluation():
        inside = bits(run.model)
        with run.evaluation():
            assert_same(bits(run.model), inside)
        assert run.in_evaluation
        assert_same(bits(run.model), inside)
    assert_same(bits(run.model), before)


def test_a_block_inside_entered_evaluation_does_not_leave_it(averaging: Run) -> None:
    run, before = averaging, bits(averaging.model)
    run.enter_evaluation()
    run.enter_evaluation()
    with run.evaluation():
        pass
    assert run.in_evaluation
    run.leave_evaluation()
    run.leave_evaluation()
    assert_same(bits(run.model), before)


def test_evaluation_survives_exceptions(averaging: Run) -> None:
    run, before = averaging, bits(averaging.model)
    with pytest.raises(ZeroDivisionError), run.evaluation(), run.evaluation():
        raise ZeroDivisionError
    assert not run.in_evaluation
    assert_same(bits(run.model), before)


def test_evaluation_that_fails_while_it_is_entered_puts_the_weights_back() -> None:
    def fail(batch: Any) -> None:
        raise ZeroDivisionError

    run = make_run([EMA("2ba", recompute_batchnorm=1)], forward=fail)
    train(run, range(3))
    before, modes = bits(run.model), [m.training for m in run.model.modules()]
    with pytest.raises(ZeroDivisionError), run.evaluation():
        pass
    assert not run.in_evaluation
    assert_same(bits(run.model), before)
    assert [m.training for m in run.model.modules()] == modes


def test_training_goes_on_from_its_own_weights_after_evaluation() -> None:
    recipe = [MixUp(), EMA("2ba")]
    run, undisturbed = make_run(recipe), make_run(recipe)
    train(undisturbed, range(6))
    for step in range(6):
        train(run, range(step, step + 1))
        with run.evaluation():
            run.model.eval()(data(0)[0])
        run.model.train()
    assert_same(bits(run.model), bits(undisturbed.model))


def test_starting_again_leaves_evaluation() -> None:
    run = make_run([EMA("2ba")])
    train(run, range(3))
    before = bits(run.model)
    run.enter_evaluation()
    run.start(run.optimizers, total_steps=20)
    assert not run.in_evaluation
    assert_same(bits(run.model), before)


def test_other_weights_loaded_in_evaluation_win_when_training_starts_again() -> None:
    run = make_run([EMA("2ba")])
    train(run, range(3))
    run.enter_evaluation()
    other = {name: torch.ones_like(value) for name, value in run.model.state_dict().items()}
    run.model.load_state_dict(other)
    run.start(run.optimizers, total_steps=20)
    assert_same(bits(run.model), other)
    assert run.progress.step == 0


def test_without_averages_evaluation_changes_nothing() -> None:
    run = make_run([MixUp(), EMA("4ba", ema_start="0.5dur")])
    train(run, range(2))
    before = bits(run.model)
    with run.evaluation():
        assert not run.in_evaluation
        assert_same(bits(run.model), before)


# Checkpoints.

FULL = [MixUp(), LabelSmoothing(), EMA("3ba"), BlurPool(), Backdrop(["norm", "down"])]


def through_a_file(value: Any) -> Any:
    """Save and load as safely as torch does by default."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_the_state_survives_a_safe_file_to_the_last_bit(inside: bool) -> None:
    run = make_run(FULL)
    train(run, range(3))
    if inside:
        run.enter_evaluation()
    state = run.state_dict()
    assert_same(through_a_file(state), state)
    assert (state["training_weights"] is not None) is inside
    if inside:  # the average is in the model's file already
        assert state["states"]["EMA"]["averages"] == {}


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize(
    "recipe",
    [
        FULL,
        [MixUp(), EMA("0.5dur", ema_start="0.75dur")],
        [MixUp(), EMA("2ba", update_interval="3ba")],
        [MixUp(), EMA("2ba", recompute_batchnorm=2)],
        [],
    ],
    ids=["full", "average not begun", "rare updates", "recomputing batch norm", "empty"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    recipe: list[Algorithm], optimizer: Callable[[nn.Module], Any], inside: bool
) -> None:
    whole = make_run(recipe, optimizer)
    train(whole, range(20), accumulate=2)

    first = make_run(recipe, optimizer)
    train(first, range(10), accumulate=2)
    if inside:
        first.enter_evaluation()
    checkpoint = through_a_file(
        {
            "model": first.model.state_dict(),
            "optimizer": first.optimizers[0].state_dict(),
            "mosaic": first.state_dict(),
        }
    )
    with torch.no_grad():  # the file does not depend on what happens to the first run
        for parameter in first.model.parameters():
            parameter.fill_(float("nan"))

    second = make_run(recipe, optimizer)
    train(second, range(3), accumulate=2)  # what it did before it was loaded does not count
    second.model.load_state_dict(checkpoint["model"])
    second.optimizers[0].load_state_dict(checkpoint["optimizer"])
    second.load_state_dict(checkpoint["mosaic"])
    assert second.progress.step == 10
    train(second, range(10, 20), accumulate=2)

    assert_same(bits(second.model), bits(whole.model))
    assert_same(second.optimizers[0].state_dict(), whole.optimizers[0].state_dict())
    assert_same(second.state_dict(), whole.state_dict())
    with second.evaluation(), whole.evaluation():
        assert_same(bits(second.model), bits(whole.model))


def test_saving_does_not_disturb_a_run() -> None:
    saving, silent = make_run(FULL), make_run(FULL)
    train(silent, range(5))
    for step in range(5):
        train(saving, range(step, step + 1))
        saving.state_dict()
        with saving.evaluation():
            saving.state_dict()
    assert_same(saving.state_dict(), silent.state_dict())
    assert_same(bits(saving.model), bits(silent.model))


def test_a_low_precision_model_keeps_its_precise_average_across_a_checkpoint() -> None:
    def low() -> Run:
        run = make_run([EMA("3ba")], total_steps=8)
        run.model.bfloat16()
        run.start(run.optimizers, total_steps=8)
        return run

    def go(run: Run, steps: range) -> None:
        for step in steps:
            run.optimizers[0].zero_grad()
            x, y = run.on_batch(*data(step))
            F.cross_entropy(run.model(x.bfloat16()), y).backward()
            run.step()

    whole, first, second = low(), low(), low()
    go(whole, range(8))
    go(first, range(4))
    first.enter_evaluation()
    model, state = bits(first.model), through_a_file(first.state_dict())
    optimizer = copy.deepcopy(first.optimizers[0].state_dict())
    second.model.load_state_dict(model)
    second.optimizers[0].load_state_dict(optimizer)
    second.load_state_dict(state)
    go(second, range(4, 8))
    assert_same(second.state_dict(), whole.state_dict())
    averages = second.state(second.recipe.algorithms[0]).averages
    assert {value.dtype for value in averages.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("recipe", "seed", "message"),
    [
        ([MixUp(0.3)], 0, r"alpha: 0.2(.|\n)*this run has seed 0 and(.|\n)*alpha: 0.3"),
        ([MixUp(), EMA("4ba")], 0, r"this run has seed 0 and(.|\n)*- EMA:"),
        ([], 0, r"this run has seed 0 and\n\[\]"),
        ([MixUp()], 1, r"The checkpoint has seed 0 and(.|\n)*this run has seed 1 and"),
    ],
)
def test_the_checkpoint_of_another_recipe_or_seed_is_refused(
    recipe: list[Algorithm], seed: int, message: str
) -> None:
    saved = make_run([MixUp()])
    train(saved, range(2))
    run = make_run(recipe, seed=seed)
    with pytest.raises(UnsupportedError, match=message) as caught:
        run.load_state_dict(saved.state_dict())
    assert str(caught.value).startswith("Run: a run must go on with the recipe and seed it began")
    assert str(caught.value).endswith("To begin a new run, load the model's weights only")
    assert run.progress.step == 0


@pytest.mark.parametrize("version", [0, 2, None])
def test_a_checkpoint_of_another_version_is_refused(version: int | None) -> None:
    run = make_run([MixUp()])
    state = {**run.state_dict(), "version": version}
    if version is None:
        del state["version"]
    message = rf"Run: unknown checkpoint version {version}, this is 1; to begin a new run"
    with pytest.raises(UnsupportedError, match=message):
        run.load_state_dict(state)


def test_the_order_in_which_a_recipe_was_written_does_not_matter_to_a_checkpoint() -> None:
    recipe = [MixUp(), LabelSmoothing(), EMA("4ba")]
    make_run(recipe[::-1]).load_state_dict(make_run(recipe).state_dict())


def test_a_changed_length_of_the_run_is_taken_from_the_new_run() -> None:
    saved = make_run([EMA("0.5dur")])
    train(saved, range(2))
    run = make_run([EMA("0.5dur")], total_steps=40)
    run.load_state_dict(saved.state_dict())
    assert (run.progress.step, run.progress.total_steps) == (2, 40)


@dataclass(frozen=True)
class Flip(NoOp):
    """Moves inputs and labels alike, and mixes nothing."""

    place = Place.AUGMENTATION

    @property
    def reads_labels(self):
        return True

    def on_batch(self, batch, run):
        return batch.replace(batch.input.flip(0), batch.labels.map(lambda label: label.flip(0)))


def test_moved_labels_stay_plain_tensors():
    run = make_run([Flip()])
    _, y = run.on_batch(torch.arange(8.0).view(4, 2), torch.arange(4))
    assert type(y) is torch.Tensor
    assert y.tolist() == [3, 2, 1, 0]
    run.check_loss()  # nothing was mixed, so any loss will do


def test_moved_labels_may_be_mixed_afterwards():
    run = make_run([LabelSmoothing(0.1), Flip()])
    _, y = run.on_batch(torch.arange(8.0).view(4, 2), torch.arange(4))
    assert isinstance(y, MixedTarget)
    assert y.tolist() == [3, 2, 1, 0]


def test_a_lasting_seed_is_the_same_at_every_step():
    run = make_run([NoOp()])
    algorithm = run.recipe.algorithms[0]
    before = [run.seed_for(algorithm, "a", lasting=True), run.seed_for(algorithm, "a")]
    run.on_batch(*data(0))
    run.end_step()
    after = [run.seed_for(algorithm, "a", lasting=True), run.seed_for(algorithm, "a")]
    assert after[0] == before[0]
    assert len({*before, *after}) == 3
    assert run.seed_for(algorithm, "b", lasting=True) != before[0]


def test_a_model_is_not_changed_again_with_other_settings():
    model = make_net()
    Run([BlurPool()], model=model)
    Run([BlurPool()], model=model)  # once more is once
    Run([MixUp(0.3)], model=model)
    Run([MixUp(0.4)], model=model)  # which changes no model
    match = r"changed by BlurPool\(.*\) before, so it can't .*blur_first=False.*make the model anew"
    with pytest.raises(UnsupportedError, match=match):
        Run([BlurPool(blur_first=False)], model=model)
    copied = copy.deepcopy(model)
    with pytest.raises(UnsupportedError, match=match):
        Run([BlurPool(blur_first=False)], model=copied)
