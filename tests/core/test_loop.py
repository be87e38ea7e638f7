"""The plain loop against loops written by hand, without mosaic, from the papers."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaic_core import Algorithm, LossError, Place, Run
from mosaic_core.algorithms import EMA, BlurPool, LabelSmoothing, MixUp
from mosaic_core.batch import Batch
from mosaic_core.loop import train_steps
from mosaic_core.random import derive_seed

N, CLASSES, STEPS = 8, 5, 20
ALPHA, SMOOTHING, HALF_LIFE, SEED = 0.4, 0.1, 3.0, 11
RECIPE = [MixUp(ALPHA), LabelSmoothing(SMOOTHING), EMA("3ba"), BlurPool()]


class Net(nn.Module):
    """A small convolutional network with batch norm, a strided convolution and a max-pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.down = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(F.relu(self.norm(self.stem(x))))
        return self.head(self.pool(x).mean((2, 3)))


class BlurredByHand(Net):
    """The same network as it is after BlurPool, written out."""

    def forward(self, x: Tensor) -> Tensor:
        x = blur(F.relu(self.norm(self.stem(x))))
        x = F.conv2d(x, self.down.weight, self.down.bias, stride=2, padding=1)
        x = blur(F.max_pool2d(x, 2, stride=1))[:, :, ::2, ::2]
        return self.head(x.mean((2, 3)))


def blur(x: Tensor) -> Tensor:
    """Convolve with [1 2 1] / 4 down and across, zeros around."""
    x = F.pad(x, (1, 1, 1, 1))
    x = (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) / 4
    return (x[:, :, :, :-2] + 2 * x[:, :, :, 1:-1] + x[:, :, :, 2:]) / 4


def make(cls: type[nn.Module] = Net, dtype: torch.dtype = torch.float64) -> Any:
    """Make the same weights every time."""
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return cls().to(dtype)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Make momentum SGD."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def data(number: int, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield micro-batches."""
    for index in range(number):
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(N, 1, 8, 8, generator=generator).to(dtype)
        yield x, torch.randint(CLASSES, (N,), generator=generator)


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Compute the loss as users write it."""
    x, y = batch
    return F.cross_entropy(model(x), y)


def mixup_by_hand(x: Tensor, y: Tensor, step: int, micro: int) -> tuple[Tensor, Tensor]:
    """Mix inputs and dense, smoothed targets as in the papers, with the documented draws."""
    generator = torch.Generator().manual_seed(derive_seed(SEED, "MixUp", step, micro, 0))
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    z = np.random.default_rng(seed).beta(ALPHA, ALPHA)
    mixing = min(z, 1 - z)
    partner = torch.randperm(N, generator=generator)
    one_hot = F.one_hot(y, CLASSES).to(x.dtype)
    x = (1 - mixing) * x + mixing * x[partner]
    dense = (1 - mixing) * one_hot + mixing * one_hot[partner]
    return x, (1 - SMOOTHING) * dense + SMOOTHING / CLASSES


def by_hand(
    accumulate: int = 1, clip_norm: float | None = None, cosine: bool = False
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Train with the whole recipe written out; return the network and the averaged weights."""
    model = make(BlurredByHand)
    momenta = [torch.zeros_like(p) for p in model.parameters()]
    average: dict[str, Tensor] = {}
    batches = data(STEPS * accumulate)
    for step in range(STEPS):
        model.zero_grad()
        for micro in range(accumulate):
            x, target = mixup_by_hand(*next(batches), step, micro)
            log_prob = model(x).log_softmax(1)
            (-(target * log_prob).sum(1).mean() / accumulate).backward()
        grads = [p.grad for p in model.parameters()]
        if clip_norm is not None:
            norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
            assert norm > clip_norm  # or the test would not see the clipping
            grads = [g * (clip_norm / (norm + 1e-6)) for g in grads]
        lr = 0.05 * (0.5 * (1 + math.cos(math.pi * step / STEPS)) if cosine else 1)
        with torch.no_grad():
            for p, g, m in zip(model.parameters(), grads, momenta, strict=True):
                m.mul_(0.9).add_(g)
                p.sub_(lr * m)
        s = 2 ** (-1 / HALF_LIFE)
        for name, p in model.named_parameters():
            old = average.get(name)
            average[name] = p.detach().clone() if old is None else s * old + (1 - s) * p.detach()
    return model, average


def relative(one: Tensor, other: Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    return float((one - other).abs().max() / other.abs().max())


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    """Compare dictionaries of tensors."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert relative(value.double(), other[name].double()) <= tolerance, name


@pytest.mark.parametrize("cosine", [False, True], ids=["", "scheduler"])
@pytest.mark.parametrize("clip_norm", [None, 0.1], ids=["", "clip"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_whole_recipe_equals_a_loop_written_from_the_papers(
    accumulate: int, clip_norm: float | None, cosine: bool
) -> None:
    model = make()
    optimizer = sgd(model)
    run = Run(RECIPE, model=model, optimizer=optimizer, seed=SEED, total_steps=STEPS)
    train_steps(
        run,
        data(STEPS * accumulate),
        cross_entropy,
        accumulate=accumulate,
        clip_norm=clip_norm,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS) if cosine else None,
    )
    reference, average = by_hand(accumulate, clip_norm, cosine)
    assert run.progress.step == STEPS
    # The mixing weight of labels is a float32, which rounds it by 3e-8.
    assert_close(model.state_dict(), reference.state_dict(), 1e-7)
    with run.evaluation():
        assert_close({n: p.detach() for n, p in model.named_parameters()}, average, 1e-7)
    weights = reference.state_dict()
    assert relative(average["head.weight"], weights["head.weight"]) > 1e-3  # or nothing was seen


def test_float32_equals_the_float64_reference_as_far_as_it_can() -> None:
    model = make(dtype=torch.float32)
    run = Run(RECIPE, model=model, optimizer=sgd(model), seed=SEED)
    train_steps(run, data(STEPS, torch.float32), cross_entropy)
    reference, average = by_hand()
    assert_close(model.state_dict(), reference.state_dict(), 1e-5)
    with run.evaluation():
        assert_close({n: p.detach() for n, p in model.named_parameters()}, average, 1e-5)


def plain_loop(accumulate: int, autocast: torch.dtype | None, clip_norm: float | None) -> nn.Module:
    """Train without any algorithm, as everybody writes it."""
    model = make(dtype=torch.float32)
    optimizer = sgd(model)
    batches = data(6 * accumulate, torch.float32)
    for _ in range(6):
        optimizer.zero_grad()
        for _ in range(accumulate):
            x, y = next(batches)
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss = F.cross_entropy(model(x), y) / accumulate
            loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
    return model


@pytest.mark.parametrize("recipe", [[], [EMA()]], ids=["empty", "EMA"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("clip_norm", [None, 0.1], ids=["", "clip"])
def test_a_recipe_that_only_watches_leaves_every_bit_of_a_plain_loop(
    recipe: list[Algorithm],
    autocast: torch.dtype | None,
    accumulate: int,
    clip_norm: float | None,
) -> None:
    model = make(dtype=torch.float32)
    run = Run(recipe, model=model, optimizer=sgd(model))
    batches = data(6 * accumulate, torch.float32)
    train_steps(
        run,
        batches,
        cross_entropy,
        accumulate=accumulate,
        autocast=autocast,
        clip_norm=clip_norm,
    )
    reference = plain_loop(accumulate, autocast, clip_norm).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, reference[name]), name


def test_autocast_computes_forward_in_its_dtype_and_transforms_outside_of_it() -> None:
    seen: dict[str, Any] = {}

    class Watch(MixUp):
        def on_batch(self, batch: Batch, run: Run) -> Batch:
            seen["autocast"] = torch.is_autocast_enabled("cpu")
            return super().on_batch(batch, run)

    model = make(dtype=torch.float32)
    model.head.register_forward_hook(lambda *args: seen.update(logits=args[-1].dtype))
    run = Run([Watch(ALPHA), LabelSmoothing()], model=model, optimizer=sgd(model))
    train_steps(run, data(1, torch.float32), cross_entropy, autocast=torch.bfloat16)
    assert seen == {"autocast": False, "logits": torch.bfloat16}


def test_the_loss_of_a_mixture_under_autocast_is_that_of_dense_targets() -> None:
    # One step, as rounding to bfloat16 would amplify the last bit over many.
    grads = []
    for dense in (False, True):
        model = make(dtype=torch.float32)
        run = Run([MixUp(ALPHA), LabelSmoothing(SMOOTHING)], model=model, seed=SEED)
        run.start([torch.optim.SGD(model.parameters(), lr=0.0)])

        def loss(model: nn.Module, batch: Any, dense: bool = dense) -> Tensor:
            x, y = batch
            logits = model(x)
            return F.cross_entropy(logits, y.mixture.dense(CLASSES) if dense else y)

        if dense:
            run.check_loss = lambda: None  # type: ignore[method-assign]  # the reference
        train_steps(run, data(1, torch.float32), loss, autocast=torch.bfloat16)
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert_close(*grads, tolerance=2**-8)  # one rounding of bfloat16


# Two passes.


@dataclass(frozen=True)
class Ascent(Algorithm):
    """Sharpness-aware minimisation: the gradient at ``w + rho * g / |g|``, applied at ``w``."""

    rho: float = 0.1
    place = Place.GRADIENTS

    def init_state(self, run: Run) -> list[Tensor]:
        return []

    @torch.no_grad()
    def on_first_pass(self, run: Run) -> None:
        params = [fragment.param for fragment in run.parameters.fragments()]
        norm = torch.stack([p.grad.square().sum() for p in params]).sum().sqrt()
        run.state(self)[:] = [p.clone() for p in params]
        for p in params:
            p.add_(p.grad * (self.rho / norm))

    @torch.no_grad()
    def on_second_pass(self, run: Run) -> None:
        for fragment, saved in zip(run.parameters.fragments(), run.state(self), strict=True):
            fragment.param.copy_(saved)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_two_passes_equal_a_hand_written_loop(
    accumulate: int, autocast: torch.dtype | None
) -> None:
    run = Run([Ascent()], model=(model := make(dtype=torch.float32)), optimizer=sgd(model))
    steps = 6
    train_steps(
        run,
        data(steps * accumulate, torch.float32),
        cross_entropy,
        accumulate=accumulate,
        autocast=autocast,
        clip_norm=0.1,
    )

    reference = make(dtype=torch.float32)
    optimizer = sgd(reference)
    batches = list(data(steps * accumulate, torch.float32))
    for step in range(steps):

        def backward(step: int = step) -> None:
            optimizer.zero_grad()
            for x, y in batches[step * accumulate : (step + 1) * accumulate]:
                with torch.autocast("cpu", autocast, enabled=autocast is not None):
                    loss = F.cross_entropy(reference(x), y) / accumulate
                loss.backward()

        backward()
        params = list(reference.parameters())
        saved = [p.detach().clone() for p in params]
        norm = torch.stack([p.grad.square().sum() for p in params]).sum().sqrt()
        with torch.no_grad():
            for p in params:
                p.add_(p.grad * (0.1 / norm))
        reference.norm.momentum = 0.0  # so that the statistics move once
        backward()
        reference.norm.momentum = 0.1
        with torch.no_grad():
            for p, w in zip(params, saved, strict=True):
                p.copy_(w)
        nn.utils.clip_grad_norm_(params, 0.1)
        optimizer.step()

    reference.norm.num_batches_tracked.fill_(steps * accumulate)
    for name, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name  # difference 0.0


def test_the_second_pass_sees_the_same_transformed_batches() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append((batch[0], batch[1].mixture.dense(CLASSES)))
        return cross_entropy(model, batch)

    model = make()
    run = Run([Ascent(), MixUp(ALPHA)], model=model, optimizer=sgd(model))
    train_steps(run, data(2 * 3), loss, accumulate=3)
    assert len(seen) == 12
    for window in (seen[:6], seen[6:]):
        for first, second in zip(window[:3], window[3:], strict=True):
            assert first[0] is second[0]
            assert torch.equal(first[1], second[1])


# The order of a window, and its edges.


@dataclass(frozen=True)
class Scale(Algorithm):
    """Multiplies all gradients."""

    factor: float = 10.0
    place = Place.GRADIENTS

    def on_gradients(self, run: Run) -> None:
        for fragment in run.parameters.fragments():
            run.parameters.grad(fragment).mul_(self.factor)


def test_algorithms_act_on_gradients_before_clipping() -> None:
    norms = []
    for clip_norm in (None, 1e-3):
        model = make()
        run = Run([Scale()], model=model, optimizer=sgd(model))
        train_steps(run, data(1), cross_entropy, clip_norm=clip_norm)
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
    model = make()
    cross_entropy(model, next(data(1))).backward()
    plain = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert norms[0] == pytest.approx(10 * plain)
    assert norms[1] == pytest.approx(1e-3, rel=1e-4)


@pytest.mark.parametrize(("recipe", "times"), [([], 1), ([Ascent()], 2)], ids=["once", "twice"])
def test_gradients_are_averaged_over_ranks_once_a_pass(recipe: list[Algorithm], times: int) -> None:
    calls: list[Tensor] = []

    def average(model: nn.Module) -> None:
        calls.append(model.head.bias.grad.clone())

    model = make()
    run = Run(recipe, model=model, optimizer=sgd(model))
    train_steps(run, data(6), cross_entropy, accumulate=3, average_gradients=average)
    assert len(calls) == 2 * times


def test_two_ranks_averaged_by_hand_equal_one_batch_of_both() -> None:
    # Without batch norm the mean of two halves is the whole.
    def network() -> nn.Module:
        return make(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)))

    whole = network()
    run = Run([], model=whole, optimizer=sgd(whole))
    train_steps(run, data(4), cross_entropy)

    models = [network(), network()]
    runs = [Run([], model=m, optimizer=sgd(m), rank=r, world_size=2) for r, m in enumerate(models)]
    for x, y in data(4):
        for m, half in zip(models, (slice(0, N // 2), slice(N // 2, N)), strict=True):
            m.zero_grad()
            cross_entropy(m, (x[half], y[half])).backward()
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            one.grad = other.grad = (one.grad + other.grad) / 2
        for r in runs:
            r.step()
    for model in models:
        assert_close(model.state_dict(), whole.state_dict(), 1e-12)


def test_an_incomplete_last_window_leaves_no_trace() -> None:
    recipe = [MixUp(1.0), EMA("3ba")]
    one, other = make(), make()
    runs = [Run(recipe, model=m, optimizer=sgd(m)) for m in (one, other)]
    batches = list(data(8))
    one.norm.eval()  # it moves on every forward, also of a window that is given up
    other.norm.eval()
    train_steps(runs[0], batches[:5], cross_entropy, accumulate=2)
    assert (runs[0].progress.step, runs[0].progress.micro_batch) == (2, 0)
    train_steps(runs[0], batches[4:], cross_entropy, accumulate=2)
    train_steps(runs[1], batches, cross_entropy, accumulate=2)
    assert runs[0].progress.step == runs[1].progress.step == 4
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_loss_that_ignores_mixed_labels_is_an_error_before_the_weights_move() -> None:
    def one_hot_loss(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return -(F.one_hot(y, CLASSES) * model(x).log_softmax(1)).sum(1).mean()

    model = make()
    run = Run([MixUp(), EMA()], model=model, optimizer=sgd(model))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(LossError, match="the loss of this step ignored the mixed labels"):
        train_steps(run, data(3), one_hot_loss)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    assert run.progress.step == 0


def test_the_schedule_moves_once_a_window() -> None:
    model = make()
    optimizer = sgd(model)
    rates: list[float] = []
    optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    run = Run([], model=model, optimizer=optimizer)
    train_steps(run, data(6), cross_entropy, accumulate=2, scheduler=scheduler)
    assert rates == [0.05, 0.025, 0.0125]


def test_any_iterable_of_any_batches_trains() -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"])

    losses: list[Callable[..., Any]] = [cross_entropy, loss]
    models = []
    for function in losses:
        model = make()
        run = Run([MixUp()], model=model, optimizer=sgd(model))
        pairs = data(3)
        batches = pairs if function is cross_entropy else ({"x": x, "y": y} for x, y in pairs)
        train_steps(run, batches, function)
        models.append(model.state_dict())
    assert_close(*models, tolerance=0.0)
