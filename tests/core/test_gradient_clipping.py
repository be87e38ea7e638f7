"""GradientClipping against float64 written from the paper, torch's own functions and timm's."""

import copy
import math
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mosaic_core import Need, Run
from mosaic_core.algorithms import SAM, GradientClipping, apply_gradient_clipping
from mosaic_core.parameters import Fragment

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from timm.utils.agc import adaptive_clip_grad

TYPES = ("norm", "value", "adaptive")
SHAPES = [(), (5,), (3, 4), (2, 3, 3, 3), (4, 2, 5), (1, 6), (6, 1), (7,)]


class Weights(nn.Module):
    """Weights of several shapes with gradients, one without, and one that is frozen."""

    def __init__(self, dtype=torch.float64, scale=1.0, shapes=SHAPES):
        super().__init__()
        g = torch.Generator().manual_seed(0)

        def draw(shape, scale=1.0):
            return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype)

        self.all = nn.ParameterList([nn.Parameter(draw(shape)) for shape in shapes])
        for p in self.all:
            p.grad = draw(p.shape, scale)
        self.without = nn.Parameter(draw((3,)))
        self.frozen = nn.Parameter(draw((3,)), requires_grad=False)

    @property
    def grads(self):
        return [p.grad for p in self.all]


def of(weight, grad, dtype=torch.float32):
    """A model of one parameter."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor(weight, dtype=dtype))
    model.weight.grad = torch.tensor(grad, dtype=dtype)
    return model


def clipped(kind, threshold, weights, grads):
    """What each kind means, an element or a unit at a time."""
    if kind == "value":
        return [g.clamp(-threshold, threshold) for g in grads]
    if kind == "norm":
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
        return [g * min(1.0, threshold / (norm + 1e-6)) for g in grads]
    return [adaptively(threshold, w, g) for w, g in zip(weights, grads, strict=True)]


def adaptively(threshold, weight, grad):
    """Eq. 3 of the paper."""
    if weight.dim() > 1:
        units = [adaptively(threshold, w.flatten(), g.flatten()) for w, g in zip(weight, grad)]  # noqa: B905  # of tensors
        return torch.stack(units).view_as(grad)
    ratio = float(grad.norm()) / max(float(weight.norm()), 1e-3)
    return grad * (threshold / ratio) if ratio > threshold else grad


class TestFunction:
    def test_reference_values(self):
        model = of([3.0, 4.0], [7.0, 24.0])
        apply_gradient_clipping(model, "adaptive", 0.5)
        torch.testing.assert_close(model.weight.grad, torch.tensor([0.7, 2.4]))
        model = of([[3.0, 4.0], [9.0, 40.0]], [[7.0, 24.0], [5.0, 12.0]])
        apply_gradient_clipping(model, "adaptive", 0.5)
        torch.testing.assert_close(model.weight.grad, torch.tensor([[0.7, 2.4], [5.0, 12.0]]))

    @pytest.mark.parametrize("threshold", [0.01, 0.7, 3.0, 100.0])
    @pytest.mark.parametrize("kind", TYPES)
    def test_formula(self, kind, threshold):
        model = Weights()
        before = [g.clone() for g in model.grads]
        weights = [p.detach().clone() for p in model.all]
        addresses = [g.data_ptr() for g in model.grads]
        expected = clipped(kind, threshold, weights, before)
        apply_gradient_clipping(model, kind, threshold)
        for grad, e in zip(model.grads, expected, strict=True):
            torch.testing.assert_close(grad, e, rtol=1e-13, atol=0)
        assert [g.data_ptr() for g in model.grads] == addresses  # in place
        assert all(map(torch.equal, model.all, weights))
        assert model.without.grad is None
        assert model.frozen.grad is None
        unchanged = [torch.equal(g, b) for g, b in zip(model.grads, before, strict=True)]
        assert all(unchanged) == (threshold == 100.0 or (kind, threshold) == ("value", 3.0))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("threshold", [0.01, 3.0, 100.0])
    def test_equals_torch_to_the_bit(self, threshold, dtype):
        ours, theirs = Weights(dtype), Weights(dtype)
        apply_gradient_clipping(ours, "norm", threshold)
        nn.utils.clip_grad_norm_(theirs.parameters(), threshold)
        assert all(map(torch.equal, ours.grads, theirs.grads))
        apply_gradient_clipping(ours, "value", threshold / 50)
        nn.utils.clip_grad_value_(theirs.parameters(), threshold / 50)
        assert all(map(torch.equal, ours.grads, theirs.grads))

    @pytest.mark.parametrize("threshold", [0.01, 0.16, 1.0])
    def test_equals_timm(self, threshold):
        ours, theirs = Weights(), Weights()
        apply_gradient_clipping(ours, "adaptive", threshold)
        adaptive_clip_grad(theirs.parameters(), threshold)
        for a, b in zip(ours.grads, theirs.grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=0)

    @pytest.mark.parametrize("kind", TYPES)
    @pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_low_precision(self, dtype, scale, kind):
        """Within two roundings of what float64 gives for the same weights and gradients."""
        model = Weights(dtype, scale)
        weights, grads = ([t.detach().double() for t in ts] for ts in (model.all, model.grads))
        expected = clipped(kind, 0.125, weights, grads)
        apply_gradient_clipping(model, kind, 0.125)
        bound = 2 * torch.finfo(dtype).eps + 1e-6
        for grad, e in zip(model.grads, expected, strict=True):
            assert grad.dtype == dtype
            error = (grad.double() - e).abs()
            assert (error <= bound * e.abs() + torch.finfo(dtype).smallest_normal).all()

    def test_float16_does_not_overflow(self):
        """The squares do."""
        model = of([[1.0] * 8] * 2, [[6e4] * 8] * 2, torch.float16)
        apply_gradient_clipping(model, "norm", 4.0)
        torch.testing.assert_close(
            model.weight.grad.norm().float(), torch.tensor(4.0), rtol=2e-3, atol=0
        )
        model = of([[1.0] * 8] * 2, [[6e4] * 8] * 2, torch.float16)
        apply_gradient_clipping(model, "adaptive", 0.5)
        torch.testing.assert_close(model.weight.grad, torch.full((2, 8), 0.5).half())

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_channels_last(self, dtype):
        """The same numbers to the last bit, in the same layout."""
        model, other = (Weights(dtype, shapes=[(32, 24, 5, 5)]) for _ in range(2))
        for tensor in (model.all[0], model.all[0].grad):
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        for kind in ("adaptive", "norm"):
            apply_gradient_clipping(model, kind, 0.5)
            apply_gradient_clipping(other, kind, 0.5)
            assert dtype == torch.float64 or torch.equal(model.grads[0], other.grads[0])
            torch.testing.assert_close(model.grads, other.grads, rtol=1e-13, atol=0)
            assert model.grads[0].is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize("kind", TYPES)
    def test_nothing_to_clip(self, kind):
        """No gradients, no parameters, or gradients of zero."""
        apply_gradient_clipping(nn.Linear(2, 2), kind, 0.1)
        apply_gradient_clipping(nn.Identity(), kind, 0.1)
        model = of([[3.0, 4.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]])
        apply_gradient_clipping(model, kind, 0.1)
        assert torch.equal(model.weight.grad, torch.zeros(2, 2))

    @pytest.mark.parametrize("kind", ["norm", "adaptive"])
    def test_not_a_number_stays(self, kind):
        """A gradient scaler must be able to see it, and a person too."""
        model = of([[3.0, 4.0]], [[torch.inf, 1.0]])
        apply_gradient_clipping(model, kind, 0.1)
        assert not model.weight.grad.isfinite().all()

    @pytest.mark.parametrize("threshold", [0.01, 0.5])
    def test_bounds_hold(self, threshold):
        """And clipping twice is clipping once."""
        for kind in TYPES:
            model = Weights(scale=10.0)
            apply_gradient_clipping(model, kind, threshold)
            once = [g.clone() for g in model.grads]
            apply_gradient_clipping(model, kind, threshold)
            for a, b in zip(once, model.grads, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4 if kind == "norm" else 1e-14, atol=0)
            for p in model.all:
                rows = p.grad.flatten(1) if p.dim() > 1 else p.grad.reshape(1, -1)
                sizes = p.flatten(1) if p.dim() > 1 else p.reshape(1, -1)
                if kind == "adaptive":
                    bound = threshold * sizes.norm(dim=1) * (1 + 1e-12)
                    assert (rows.norm(dim=1) <= bound).all()
                elif kind == "norm":
                    assert float(rows.norm()) <= threshold
                else:
                    assert float(rows.abs().max()) <= threshold

    @pytest.mark.parametrize(
        ("kind", "threshold", "words"),
        [
            ("l2", 1.0, r"clipping_type must be one of .*, got 'l2'"),
            ("norm", 0.0, "clipping_threshold must be above 0, got 0.0"),
            ("adaptive", -1, "clipping_threshold must be above 0, got -1"),
            ("value", math.nan, "clipping_threshold must be above 0, got nan"),
        ],
    )
    def test_errors(self, kind, threshold, words):
        with pytest.raises(ValueError, match=f"^apply_gradient_clipping: {words}"):
            apply_gradient_clipping(nn.Linear(1, 1), kind, threshold)
        with pytest.raises(ValueError, match=f"^GradientClipping: {words}"):
            GradientClipping(kind, threshold)


class TestZeroWeights:
    """A peer scales their gradients by the norm of the weights, which is zero: they never learn."""

    @staticmethod
    def without_least_norm(model, threshold):
        for p in model.parameters():
            if p.grad is not None:
                p.grad *= (threshold * p.detach().norm() / p.grad.norm()).clamp(max=1)

    def learnt(self, clip):
        """Return what a bias of zero comes to that should be three."""
        model = nn.Linear(1, 1)
        model.weight.requires_grad_(False)
        nn.init.zeros_(model.bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.9)
        for _ in range(200):
            optimizer.zero_grad()
            (model.bias - 3).square().sum().backward()
            clip(model, 0.1)
            optimizer.step()
        return model.bias.item()

    def test_learn(self):
        ours = self.learnt(lambda model, t: apply_gradient_clipping(model, "adaptive", t))
        assert ours == pytest.approx(3, abs=0.01)
        assert self.learnt(self.without_least_norm) == 0.0

    def test_of_every_shape_move(self):
        model = Weights()
        for p in model.all:
            nn.init.zeros_(p)
        apply_gradient_clipping(model, "adaptive", 0.01)
        for p in model.all:
            rows = p.grad.flatten(1) if p.dim() > 1 else p.grad.reshape(1, -1)
            torch.testing.assert_close(rows.norm(dim=1), torch.full((len(rows),), 1e-5).double())


def network(dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    nn.init.zeros_(net[3].bias)
    return net.to(dtype)


def batch(index):
    g = torch.Generator().manual_seed(index)
    return torch.randn(8, 1, 6, 6, generator=g).double(), torch.randint(3, (8,), generator=g)


def loss_of(model, index):
    x, y = batch(index)
    return F.cross_entropy(model(x), y)


class TestInARun:
    @pytest.mark.parametrize("kind", TYPES)
    def test_equals_the_function_before_each_step(self, kind):
        threshold = {"norm": 0.3, "value": 0.02, "adaptive": 0.05}[kind]
        ours, plain = network(), network()
        optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
        run = Run([GradientClipping(kind, threshold)], model=ours, optimizer=optimizer)
        by_hand = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
        for step in range(4):
            optimizer.zero_grad()
            loss_of(ours, step).backward()
            run.step()
            by_hand.zero_grad()
            loss_of(plain, step).backward()
            before = plain[0].weight.grad.clone()
            apply_gradient_clipping(plain, kind, threshold)
            assert not torch.equal(plain[0].weight.grad, before)  # it acts
            by_hand.step()
        assert all(map(torch.equal, ours.parameters(), plain.parameters()))
        if kind == "norm":
            assert float(run.metrics["mosaic/GradientClipping/grad_norm"]) > threshold

    def test_needs_gradients_alone(self):
        assert GradientClipping.needs() == {Need.GRADIENTS}

    def test_clips_those_of_sams_second_pass(self):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recipe = [GradientClipping("norm", 0.1), SAM(0.1)]
        run = Run(recipe, model=model, optimizer=optimizer)
        before = copy.deepcopy(model.state_dict())
        loss_of(model, 0).backward()
        run.step(lambda: loss_of(model, 0).backward())
        moves = [p.detach() - before[n] for n, p in model.named_parameters()]
        assert float(torch.cat([m.flatten() for m in moves]).norm()) == pytest.approx(
            0.01, rel=1e-4
        )


class Slices:
    """The view of one rank that owns a range of all parameters laid out flat, with masters."""

    def __init__(self, model, rank, cuts, exchange, copies):
        self.model, self.exchange, self.copies = model, exchange, copies
        self.low, self.high = cuts[rank], cuts[rank + 1]
        self.grads = {}

    def start(self):
        self._fragments, offset = [], 0
        for name, param in self.model.named_parameters():
            if not param.requires_grad:
                continue
            first = max(self.low - offset, 0)
            last = min(self.high - offset, param.numel())
            if first < last:
                master = param.detach().flatten()[first:last].clone()
                if last - first == param.numel():
                    master = master.view(param.shape)
                self._fragments.append(
                    Fragment(name, param, tuple(param.shape), first, last - first, master)
                )
                if param.grad is not None:
                    self.grads[name] = param.grad.flatten()[first:last].clone().view_as(master)
            offset += param.numel()

    def fragments(self):
        return self._fragments

    def grad(self, fragment):
        grad = self.grads.get(fragment.name)
        return grad.clone() if self.copies and grad is not None else grad

    def set_grad(self, fragment, grad):
        self.grads[fragment.name] = grad

    def all_reduce(self, value):
        return self.exchange(value)

    def publish(self): ...


def run_on_ranks(make, cuts, copies):
    """Let every rank, a thread, start a run and act on its gradients; join what they own."""
    world, results = len(cuts) - 1, {}
    barrier, values = threading.Barrier(world, timeout=30), [None] * world
    errors = []

    def work(rank):
        def exchange(value):
            values[rank] = value
            barrier.wait()
            assert len({v.shape for v in values}) == 1
            total = torch.stack(values).sum(0)
            barrier.wait()
            return total

        try:
            model, algorithm = make()
            view = Slices(model, rank, cuts, exchange, copies)
            run = Run([algorithm], model=model, parameters=view, rank=rank, world_size=world)
            run.start([torch.optim.SGD(model.parameters(), lr=0.1)])
            run.on_gradients()
            results[rank] = {n: g.flatten() for n, g in view.grads.items()}
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    names = [name for name, p in make()[0].named_parameters() if p.grad is not None]
    return {n: torch.cat([r[n] for _, r in sorted(results.items()) if n in r]) for n in names}


class TestSharded:
    """Rows are cut apart between ranks, some ranks own nothing of a parameter or nothing at all."""

    CUTS = ([0, 50, 134], [0, 4, 11, 14, 134], [0, 134, 134], [0, 0, 83, 134], [0, 134])

    @pytest.mark.parametrize("copies", [False, True])
    @pytest.mark.parametrize("cuts", CUTS, ids=str)
    @pytest.mark.parametrize("kind", TYPES)
    def test_equals_the_whole(self, kind, cuts, copies):
        def make():
            model = Weights(torch.float32, scale=0.5)
            nn.init.zeros_(model.all[2][1])  # a unit of zeros
            return model, GradientClipping(kind, 0.3)

        assert sum(p.numel() for p in make()[0].parameters() if p.requires_grad) == 134
        joined = run_on_ranks(make, cuts, copies)
        model, algorithm = make()
        before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        apply_gradient_clipping(model, kind, algorithm.clipping_threshold)
        for name, grad in joined.items():
            expected = model.get_parameter(name).grad.flatten()
            torch.testing.assert_close(grad, expected, rtol=2e-6, atol=1e-9)
        assert any(not torch.equal(joined[n], b.flatten()) for n, b in before.items())

    def units(self, cuts):
        model = Weights()
        view = Slices(model, 0, cuts, lambda value: value, False)
        run = Run([GradientClipping("adaptive", 1.0)], model=model, parameters=view)
        run.start([torch.optim.SGD(model.parameters(), lr=0.1)])
        return run.state(run.recipe.algorithms[0])

    def test_units_are_laid_out_where_parameters_are_cut(self):
        state = self.units([0, 130, 134])
        assert state.units == 3 - 1 + 1 + 3 + 2 + 4 + 1 + 6 + 1
        assert state.first["all.3"] == 1 + 1 + 1 + 3  # "without" comes first

    def test_and_not_where_ranks_own_whole_parameters(self):
        """Then the sums are those of one process, to the last bit."""
        assert self.units([0, 134]).units == self.units([0, 9, 134]).units == 0


class _Reads(TorchDispatchMode):
    """Fails where the value of a tensor is read, for which a device would have to be awaited."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} reads a tensor")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", TYPES)
def test_no_tensor_is_read(kind):
    with pytest.raises(AssertionError, match="reads"), _Reads():
        torch.ones(()).item()
    for cut in (0, 130):
        model = Weights(torch.float32)
        view = Slices(model, 0, [0, cut], lambda value: value, False) if cut else None
        run = Run([GradientClipping(kind, 0.1)], model=model, parameters=view)
        run.start([torch.optim.SGD(model.parameters(), lr=0.1)])
        with _Reads():
            run.on_gradients()
            apply_gradient_clipping(model, kind, 0.1)
