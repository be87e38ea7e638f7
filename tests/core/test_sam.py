"""SAM against two passes written by hand in float64, from the papers."""

import contextlib
import copy
import functools
import gc
import io
import weakref

import pytest
import pytorch_optimizer
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mosaic_core import ConflictError, Need, Recipe, Run, UnsupportedError
from mosaic_core.algorithms import EMA, SAM, Backdrop, MixUp, sam_perturb, sam_restore
from mosaic_core.loop import train_steps

SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAMW = functools.partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.1)


def network(dtype=torch.float64, dropout=0.0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(64, 3),
        )
        return net.to(dtype)


def batch(index, dtype=torch.float64):
    g = torch.Generator().manual_seed(index)
    return torch.randn(8, 1, 6, 6, generator=g).to(dtype), torch.randint(3, (8,), generator=g)


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def train(recipe, steps=6, model=None, optimizer=SGD, dtype=torch.float64, **options):
    """Train with the plain loop."""
    model = network(dtype) if model is None else model
    run = Run(recipe, model=model, optimizer=optimizer(model.parameters()), total_steps=steps)
    batches = [batch(i, dtype) for i in range(steps * options.get("accumulate", 1))]
    train_steps(run, batches, cross_entropy, **options)
    return run


def uphill(weights, grads, rho=0.05, epsilon=1e-12, adaptive=False):
    """Where to take the gradient: SAM's Eq. 2 and ASAM's Eq. 7, a tensor at a time."""
    sizes = [w.abs() if adaptive else torch.ones_like(w) for w in weights]
    pairs = list(zip(weights, grads, sizes, strict=True))
    norm = sum(float(((s * g) ** 2).sum()) for _, g, s in pairs) ** 0.5
    return [w + rho * s**2 * g / (norm + epsilon) for w, g, s in pairs]


def train_by_hand(steps=6, accumulate=1, interval=1, clip_norm=None, optimizer=SGD, **settings):
    """Take two passes; batch-norm statistics move in the first."""
    model = network()
    update = optimizer(model.parameters())

    def gradients(step):
        model.zero_grad()
        for micro in range(accumulate):
            (cross_entropy(model, batch(step * accumulate + micro)) / accumulate).backward()
        return [p.grad.clone() for p in model.parameters()]

    for step in range(steps):
        grads = gradients(step)
        if step % interval == 0:
            start = [p.detach().clone() for p in model.parameters()]
            statistics = [b.clone() for b in model.buffers()]
            moved = uphill(start, grads, **settings)
            set_all(model.parameters(), moved)
            grads = gradients(step)
            set_all(model.parameters(), start)
            set_all(model.buffers(), statistics)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        if clip_norm is not None:
            assert norm > clip_norm  # or the test would not see the clipping
            for p in model.parameters():
                p.grad *= clip_norm / (norm + 1e-6)
        update.step()
    return model


@torch.no_grad()
def set_all(tensors, values):
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def assert_equal(actual, expected):
    for (name, a), e in zip(actual.items(), expected.values(), strict=True):
        assert torch.equal(a, e), name


def assert_close(actual, expected, tol=1e-12):
    for (name, a), e in zip(actual.items(), expected.values(), strict=True):
        difference = float((a.double() - e.double()).norm() / e.double().norm().clamp_min(1e-12))
        assert difference <= tol, name


def tensors(dtype=torch.float64, scale=1.0):
    """Weights of several shapes with gradients, one without, and one that is frozen."""
    g = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in [(), (5,), (3, 4), (2, 3, 3, 3), (4,)]
    ]
    for w in weights[:-1]:
        w.grad = (scale * torch.randn(w.shape, generator=g, dtype=torch.float64)).to(dtype)
    return [*weights, torch.ones(3, dtype=dtype)]


class TestFunctions:
    @pytest.mark.parametrize("adaptive", [False, True])
    @pytest.mark.parametrize(("rho", "epsilon"), [(0.05, 1e-12), (2.0, 0.0), (0.5, 1.5)])
    def test_formula(self, rho, epsilon, adaptive):
        weights = tensors()
        before = [w.detach().clone() for w in weights]
        grads = [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in weights]
        expected = uphill(before, grads, rho, epsilon, adaptive)
        sam_perturb(weights, rho, epsilon, adaptive)
        for w, e in zip(weights, expected, strict=True):
            torch.testing.assert_close(w.detach(), e, rtol=1e-14, atol=1e-15)

    def test_the_move_has_length_rho(self):
        """Of SAM; that of ASAM has it when every element is measured by its weight."""
        for adaptive in (False, True):
            weights = tensors()
            before = sam_perturb(weights, 0.3, adaptive=adaptive)
            moves = [(w.detach() - old) / (old.abs() if adaptive else 1) for w, old in before]
            length = torch.cat([m.flatten() for m in moves]).norm()
            assert float(length) == pytest.approx(0.3, rel=1e-12)

    def test_in_place_and_only_what_has_a_gradient(self):
        weights = tensors()
        addresses = [w.data_ptr() for w in weights]
        values = [w.detach().clone() for w in weights]
        grads = [None if w.grad is None else w.grad.clone() for w in weights]
        before = sam_perturb(iter(weights))  # any iterable
        assert [w.data_ptr() for w in weights] == addresses
        assert [w is weights[i] for i, (w, _) in enumerate(before)] == [True] * 4
        for w, v, g in zip(weights, values, grads, strict=True):
            assert torch.equal(w, v) == (g is None)
            assert g is None or torch.equal(w.grad, g)
            assert w.is_leaf
        assert [w.requires_grad for w in weights] == [True] * 5 + [False]

    @pytest.mark.parametrize("adaptive", [False, True])
    @pytest.mark.parametrize(
        "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
    )
    def test_restores_to_the_last_bit(self, dtype, adaptive):
        """Adding and taking away again would round."""
        weights = tensors(dtype)
        values = [w.detach().clone() for w in weights]
        before = sam_perturb(weights, 0.3, adaptive=adaptive)
        assert not torch.equal(weights[2], values[2])
        sam_restore(before)
        for w, v in zip(weights, values, strict=True):
            assert torch.equal(w, v)
            assert w.dtype == dtype
        assert all(a.data_ptr() != w.data_ptr() for w, a in before)

    @pytest.mark.parametrize("adaptive", [False, True])
    def test_the_layout_in_memory_is_not_seen(self, adaptive):
        """To the last bit, or a run with channels-last weights would not be that of ZeRO."""
        for seed in range(16):
            g = torch.Generator().manual_seed(seed)
            w, grad = torch.randn(2, 16, 24, 3, 3, generator=g)
            moved = []
            for layout in (torch.contiguous_format, torch.channels_last):
                weight = w.clone(memory_format=layout).requires_grad_()
                weight.grad = grad.contiguous(memory_format=layout)
                sam_perturb([weight], 2.0, adaptive=adaptive)
                moved.append(weight)
            assert torch.equal(*moved)

    def test_not_a_number_is_undone(self):
        """As after an overflow, when a gradient scaler is about to skip the step."""
        weights = tensors()
        values = [w.detach().clone() for w in weights]
        weights[1].grad[0] = torch.inf
        before = sam_perturb(weights)
        assert weights[1].isnan().any()
        sam_restore(before)
        assert all(map(torch.equal, weights, values))

    @pytest.mark.parametrize("adaptive", [False, True])
    @pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 1e3], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_low_precision(self, dtype, scale, adaptive):
        """Within a few roundings of the move, and half a one of the weight."""
        weights = tensors(dtype, scale)
        start = [w.detach().double() for w in weights[:4]]
        exact = uphill(start, [w.grad.double() for w in weights[:4]], 0.5, adaptive=adaptive)
        sam_perturb(weights, 0.5, adaptive=adaptive)
        eps = torch.finfo(dtype).eps
        for w, s, e in zip(weights, start, exact, strict=False):
            bound = 4 * eps * (e - s).abs() + 0.51 * eps * e.abs() + torch.finfo(dtype).tiny
            assert ((w.detach().double() - e).abs() <= bound).all()

    def test_the_range_of_float16_is_enough(self):
        """The weight times its gradient is beyond it, and so is one over a norm of zero."""
        w = torch.tensor([16.0, 1.0], dtype=torch.float16, requires_grad=True)
        w.grad = torch.tensor([1e4, 0.0], dtype=torch.float16)
        sam_perturb([w], 0.5, adaptive=True)
        assert w.tolist() == [24.0, 1.0]
        w.grad.zero_()
        sam_perturb([w])
        assert w.tolist() == [24.0, 1.0]

    @pytest.mark.parametrize("adaptive", [False, True])
    def test_weights_of_different_dtypes_have_one_norm(self, adaptive):
        weights = [
            *tensors(torch.bfloat16)[:2],
            *tensors(torch.float32)[2:3],
            *tensors(torch.float64)[3:4],
        ]
        start = [w.detach().double() for w in weights]
        exact = uphill(start, [w.grad.double() for w in weights], 0.5, adaptive=adaptive)
        sam_perturb(weights, 0.5, adaptive=adaptive)
        for w, e in zip(weights, exact, strict=True):
            torch.testing.assert_close(
                w.detach().double(), e, rtol=4 * torch.finfo(w.dtype).eps, atol=1e-3
            )

    @pytest.mark.parametrize("adaptive", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
    def test_zero_gradients_move_nothing(self, dtype, adaptive):
        weights = tensors(dtype, scale=0.0)
        values = [w.detach().clone() for w in weights]
        before = sam_perturb(weights, adaptive=adaptive)
        assert len(before) == 4
        assert all(map(torch.equal, weights, values))

    def test_epsilon_keeps_tiny_gradients_tiny(self):
        w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        w.grad = torch.full_like(w, 1e-9)
        sam_perturb([w], rho=1.0, epsilon=1e-3)
        assert w.item() == pytest.approx(1e-6, rel=1e-5)

    @pytest.mark.parametrize("weights", [[], [torch.ones(2, requires_grad=True)]])
    def test_nothing_to_move(self, weights):
        assert sam_perturb(weights) == []
        sam_restore([])
        assert all(torch.equal(w, torch.ones(2)) for w in weights)

    @pytest.mark.parametrize("rho", [0.0, -0.1, float("nan")])
    def test_rho_out_of_range(self, rho):
        with pytest.raises(ValueError, match=f"^sam_perturb: rho must be above 0, got {rho}$"):
            sam_perturb(tensors(), rho)

    @pytest.mark.parametrize("epsilon", [-1e-12, float("nan")])
    def test_epsilon_out_of_range(self, epsilon):
        with pytest.raises(
            ValueError, match=f"^sam_perturb: epsilon must be at least 0, got {epsilon}$"
        ):
            sam_perturb(tensors(), epsilon=epsilon)


class TestSettings:
    def test_what_is_out_of_range(self):
        with pytest.raises(ValueError, match=r"^SAM: rho must be above 0, got 0$"):
            SAM(rho=0)
        with pytest.raises(ValueError, match=r"^SAM: epsilon must be at least 0, got -1$"):
            SAM(epsilon=-1)

    @pytest.mark.parametrize("interval", [0, -1])
    def test_the_interval_is_positive(self, interval):
        message = f"^SAM: interval must be at least 1, got {interval}$"
        with pytest.raises(ValueError, match=message):
            SAM(interval=interval)

    @pytest.mark.parametrize("interval", [1.0, 2.5, "2ba", None])
    def test_the_interval_is_a_whole_number(self, interval):
        with pytest.raises(TypeError, match=r"^SAM: interval must be a whole number, got"):
            SAM(interval=interval)

    def test_needs_a_second_pass_and_nothing_else(self):
        assert SAM.needs() == {Need.SECOND_PASS}

    def test_is_refused_beside_what_draws_in_forward(self):
        with pytest.raises(
            ConflictError,
            match=r"Recipe: Backdrop can't be combined with SAM: a second pass would not repeat"
            r" what it draws for each micro-batch; remove one",
        ):
            Recipe([SAM(), Backdrop("0")])


class TestTraining:
    @pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
    @pytest.mark.parametrize(
        ("settings", "options"),
        [
            ({}, {}),
            ({"rho": 0.5}, {}),
            ({"rho": 0.5, "epsilon": 0.3}, {}),
            ({"rho": 1.0, "adaptive": True}, {}),
            ({"rho": 0.2}, {"accumulate": 2}),
            ({"rho": 1.0, "adaptive": True}, {"accumulate": 2}),
            ({"rho": 0.2, "interval": 3}, {}),
            ({"rho": 0.2}, {"clip_norm": 0.1}),
            ({"rho": 0.2, "interval": 3}, {"accumulate": 2, "clip_norm": 0.1}),
        ],
        ids=str,
    )
    def test_equals_a_loop_written_from_the_paper(self, settings, options, optimizer):
        run = train([SAM(**settings)], optimizer=optimizer, **options)
        interval = settings.get("interval", 1)
        rest = {k: v for k, v in settings.items() if k != "interval"}
        expected = train_by_hand(interval=interval, optimizer=optimizer, **rest, **options)
        assert_close(run.model.state_dict(), expected.state_dict())

    def test_does_something(self):
        """Or the comparison above would be of two plain loops."""
        plain = train([]).model.state_dict()
        for algorithm in (SAM(0.2), SAM(1.0, adaptive=True), SAM(0.2, interval=3)):
            other = train([algorithm]).model.state_dict()
            assert (other["5.weight"] - plain["5.weight"]).norm() > 1e-3

    def test_with_a_step_of_ones_own(self):
        """As the documentation of a plain loop says."""
        model = network()
        run = Run([SAM(0.2)], model=model, optimizer=SGD(model.parameters()))
        for step in range(6):
            run.optimizers[0].zero_grad()
            x, y = run.on_batch(*batch(step))

            def closure(x=x, y=y):
                F.cross_entropy(model(x), y).backward()

            closure()
            run.step(closure)
        assert_close(model.state_dict(), train_by_hand(rho=0.2).state_dict())

    def test_frozen_and_unused_parameters_stay(self):
        model, expected = network(), network()
        model[5].weight.requires_grad_(False)
        model.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        model.forward = lambda x: nn.Sequential.forward(model[:6], x)
        run = train([SAM(0.2)], model=model)
        assert torch.equal(model.unused, torch.ones(2))
        assert torch.equal(model[5].weight, expected[5].weight)
        assert not torch.equal(model[0].weight, expected[0].weight)
        assert run.progress.step == 6

    def test_the_second_pass_sees_the_same_mixed_batches(self):
        seen = []
        model = network()
        model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        train([SAM(), MixUp()], model=model, accumulate=2, steps=2)
        assert len(seen) == 8
        for first, second in ((0, 2), (1, 3), (4, 6), (5, 7)):
            assert torch.equal(seen[first], seen[second])
        assert not torch.equal(seen[0], seen[1])

    def test_the_norm_of_the_gradient_is_logged_and_not_read(self):
        run = train([SAM()], steps=1)
        norm = run.metrics["mosaic/SAM/grad_norm"]
        assert isinstance(norm, torch.Tensor)
        model = network()
        cross_entropy(model, batch(0)).backward()
        expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        torch.testing.assert_close(norm, expected)

    def test_a_low_precision_norm_is_summed_precisely(self):
        model = nn.Linear(40, 30).bfloat16()
        run = Run([SAM()], model=model, optimizer=SGD(model.parameters()))
        model.weight.grad = torch.rand(
            30, 40, generator=torch.Generator().manual_seed(0)
        ).bfloat16()
        expected = model.weight.grad.double().norm()
        run.second_pass(lambda: None)
        norm = run.metrics["mosaic/SAM/grad_norm"]
        assert norm.dtype == torch.float32
        torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)


class TestGradientScaler:
    def run(self, init_scale, recipe, dtype=torch.float16, steps=6):
        scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
        model = network(torch.float32)
        run = Run(recipe, model=model, optimizer=SGD(model.parameters()), total_steps=steps)
        seen = []
        for i in range(steps):
            before = [p.detach().clone() for p in model.parameters()]
            data = [batch(i, torch.float32)]
            train_steps(run, data, cross_entropy, autocast=dtype, scaler=scaler)
            moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
            assert all(moved) == any(moved)
            seen.append(all(moved))
        return run, scaler, seen

    @pytest.mark.parametrize("adaptive", [False, True])
    def test_steps_that_overflow_are_skipped_and_the_rest_is_finite(self, adaptive):
        recipe = [SAM(0.2, adaptive=adaptive), EMA("2ba")]
        run, scaler, moved = self.run(2.0**30, recipe, steps=24)
        skipped = moved.index(True)
        assert 3 <= skipped < 20  # it overflowed at first
        assert moved == [False] * skipped + [True] * (24 - skipped)
        assert scaler.get_scale() == 2.0 ** (30 - skipped)
        assert run.progress.step == 24
        assert all(torch.isfinite(t).all() for t in run.model.state_dict().values())
        averages = run.state(run.recipe.algorithms[1]).averages
        assert all(torch.isfinite(average).all() for average in averages.values())

    def test_equals_the_run_that_begins_with_the_scale_that_fits(self):
        """The skipped steps leave nothing: neither moved weights nor statistics of their own."""
        run, scaler, moved = self.run(2.0**30, [SAM(0.2)], steps=24)
        skipped = moved.index(True)
        model = network(torch.float32)
        other = Run([SAM(0.2)], model=model, optimizer=SGD(model.parameters()))
        for i in range(skipped):  # forward alone
            with torch.autocast("cpu", torch.float16):
                model(batch(i, torch.float32)[0])
        data = [batch(i, torch.float32) for i in range(skipped, 24)]
        fitting = torch.amp.GradScaler("cpu", init_scale=scaler.get_scale())
        train_steps(other, data, cross_entropy, autocast=torch.float16, scaler=fitting)
        assert_equal(run.model.state_dict(), model.state_dict())

    def test_the_scale_does_not_matter(self):
        """The move uphill is that of the unscaled gradient, also with a norm near epsilon."""
        recipe = [SAM(0.5, epsilon=0.5)]
        one, other = (
            self.run(scale, recipe, torch.bfloat16)[0].model.state_dict()
            for scale in (1.0, 2.0**10)
        )
        assert_equal(one, other)  # a power of two rounds nothing


class TestOnePass:
    """What moves once in a step of two passes."""

    def test_batch_norm_statistics(self):
        """Those of the first pass: the second, at other weights, leaves none."""
        model, plain = network(), network()
        run = train([SAM(2.0)], steps=1, model=model)
        plain(batch(0)[0])
        assert_equal(dict(run.model.named_buffers()), dict(plain.named_buffers()))
        assert int(model[1].num_batches_tracked) == 1

    def test_buffers_that_forward_replaces(self):
        class Counting(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("count", torch.zeros(()))

            def forward(self, x):
                self.count = self.count + 1
                return x

        model = network().append(Counting())
        train([SAM()], steps=3, model=model)
        assert model[6].count == 3

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_the_global_random_stream(self, accumulate):
        """With dropout, the next step draws what it would have drawn without SAM."""
        states = []
        for recipe in ([], [SAM()]):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(3)
                train(recipe, model=network(dropout=0.5), accumulate=accumulate)
                states.append(torch.get_rng_state())
        assert torch.equal(*states)

    def test_dropout_is_drawn_afresh_in_the_second_pass(self):
        """As by two forward passes in a loop of one's own."""
        model, seen = network(dropout=0.5), []
        model[4].register_forward_hook(lambda module, args, out: seen.append(out != 0))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            train([SAM(1e-9)], steps=1, model=model)
        assert not torch.equal(*seen)

    def test_the_steps_between_need_no_closure(self):
        model, calls = network(), []
        run = Run([SAM(interval=3)], model=model, optimizer=SGD(model.parameters()))
        for step in range(7):
            run.optimizers[0].zero_grad()
            x, y = run.on_batch(*batch(step))

            def closure(x=x, y=y, step=step):
                calls.append(step)
                F.cross_entropy(model(x), y).backward()

            F.cross_entropy(model(x), y).backward()
            run.step(None if step % 3 else closure)
        assert calls == [0, 3, 6]
        run.second_pass(lambda: calls.append(7))  # nor is one that is given called
        assert calls == [0, 3, 6]

    def test_without_a_closure_it_is_refused_before_anything_moves(self):
        model = network()
        run = Run([SAM()], model=model, optimizer=SGD(model.parameters()))
        before = copy.deepcopy(model.state_dict())
        F.cross_entropy(model(run.on_batch(*batch(0))[0]), batch(0)[1]).backward()
        with pytest.raises(
            UnsupportedError,
            match=r"^Run.step: SAM runs forward and backward twice; give run.step\(closure\) a"
            r" function that does it for the same batches$",
        ):
            run.step()
        assert_equal(
            dict(model.named_parameters()), {n: before[n] for n, _ in model.named_parameters()}
        )
        assert run.progress.step == 0


class TestWhatIsLeft:
    def start(self):
        model = network()
        run = Run([SAM(0.5)], model=model, optimizer=SGD(model.parameters()))
        cross_entropy(model, run.on_batch(batch(0))).backward()
        return run

    def test_the_copies_are_freed(self):
        run, copies = self.start(), []

        def closure():
            copies.extend(
                weakref.ref(saved) for _, saved in run.state(run.recipe.algorithms[0]).before
            )
            cross_entropy(run.model, batch(0)).backward()

        run.step(closure)
        gc.collect()
        assert len(copies) == 5
        assert [ref() for ref in copies] == [None] * 5
        assert run.state(run.recipe.algorithms[0]).before == []

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_a_second_pass_that_fails_leaves_the_weights_where_they_were(self, error):
        run = self.start()
        before = copy.deepcopy(run.model.state_dict())

        def closure():
            assert not torch.equal(run.model[0].weight, before["0.weight"])
            run.model(batch(1)[0])
            raise error("mine")

        with pytest.raises(error, match="mine"):
            run.step(closure)
        assert_equal(run.model.state_dict(), before)
        assert run.state(run.recipe.algorithms[0]).before == []

    @pytest.mark.parametrize("at", [1, 2, 3])
    def test_a_resumed_run_goes_on_with_its_interval(self, at):
        recipe = [SAM(0.5, interval=3), MixUp()]
        whole = train(recipe, steps=8)
        first = train(recipe, steps=at)
        file = io.BytesIO()
        torch.save(
            [first.model.state_dict(), first.optimizers[0].state_dict(), first.state_dict()], file
        )
        file.seek(0)
        model, optimizer, state = torch.load(file, weights_only=True)
        assert state["states"]["SAM"] == {}  # nothing is moved between steps
        other = network()
        run = Run(recipe, model=other, optimizer=SGD(other.parameters()))
        other.load_state_dict(model)
        run.optimizers[0].load_state_dict(optimizer)
        run.load_state_dict(state)
        train_steps(run, [batch(i) for i in range(at, 8)], cross_entropy)
        assert_equal(other.state_dict(), whole.model.state_dict())


class _Reads(TorchDispatchMode):
    """Fails where the value of a tensor is read, for which a device would have to be awaited."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        ):
            raise AssertionError(f"{func} reads a tensor")
        return func(*args, **(kwargs or {}))


class TestNoSynchronisation:
    @contextlib.contextmanager
    def guarded(self, monkeypatch):
        def refuse(self, *args):
            raise AssertionError("a tensor was read")

        names = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__")
        with monkeypatch.context() as patch, _Reads():
            for name in names:
                patch.setattr(torch.Tensor, name, refuse)
            yield

    @pytest.mark.parametrize(
        "read", [float, bool, int, torch.Tensor.item, lambda t: torch.equal(t, t)]
    )
    def test_the_guard_works(self, monkeypatch, read):
        with pytest.raises(AssertionError, match="read"), self.guarded(monkeypatch):
            read(torch.ones(()))

    @pytest.mark.parametrize("adaptive", [False, True])
    def test_both_passes_read_no_tensor(self, monkeypatch, adaptive):
        model = network(torch.float32)
        algorithm = SAM(0.2, adaptive=adaptive)
        run = Run([algorithm], model=model, optimizer=SGD(model.parameters()))
        cross_entropy(model, batch(0, torch.float32)).backward()
        before = model[0].weight.detach().clone()
        with self.guarded(monkeypatch):
            algorithm.on_first_pass(run)
        assert not torch.equal(model[0].weight, before)
        with self.guarded(monkeypatch):
            algorithm.on_second_pass(run)
        assert torch.equal(model[0].weight, before)

    def test_nor_does_the_run_around_them(self, monkeypatch):
        """A whole step with a scaled loss, but for the closure."""
        model = network(torch.float32)
        run = Run([SAM(0.2)], model=model, optimizer=SGD(model.parameters()))
        cross_entropy(model, batch(0, torch.float32)).backward()
        with self.guarded(monkeypatch):
            run.second_pass(lambda: None, scale=4.0)

    def test_the_functions_read_no_tensor(self, monkeypatch):
        weights = tensors()
        with self.guarded(monkeypatch):
            sam_restore(sam_perturb(weights))
            sam_restore(sam_perturb(weights, adaptive=True))


@pytest.mark.parametrize(("rho", "adaptive"), [(0.05, False), (0.5, False), (1.0, True)], ids=str)
def test_equals_the_peer(rho, adaptive):
    """Without batch norm, which pytorch_optimizer treats otherwise."""

    def make():
        net = network()
        net[1] = nn.Identity()
        return net

    model = make()
    optimizer = pytorch_optimizer.SAM(
        model.parameters(), torch.optim.SGD, rho=rho, adaptive=adaptive, lr=0.05, momentum=0.9
    )
    for step in range(6):

        def closure(step=step):
            optimizer.zero_grad()
            loss = cross_entropy(model, batch(step))
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)
    run = train([SAM(rho, adaptive=adaptive)], model=make())
    assert_close(run.model.state_dict(), model.state_dict(), tol=1e-7)
