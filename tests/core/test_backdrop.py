"""Backdrop: the identity forward, an exactly rescaled mask backward."""

import copy
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn
from torch.utils.checkpoint import checkpoint

from mosaic_core import NoEffectWarning, Run
from mosaic_core.algorithms import Backdrop, apply_backdrop, backdrop
from mosaic_core.random import derive_seed, uniform


def seed_of(number: int) -> torch.Tensor:
    return torch.tensor(derive_seed(number))


def mask_of(x: torch.Tensor, **options) -> torch.Tensor:
    """The mask that was drawn, read off the gradient of a sum."""
    x = torch.ones_like(x).requires_grad_()
    backdrop(x, **options).sum().backward()
    return x.grad != 0


class TestFunction:
    @pytest.mark.parametrize("mode", ["sample", "patch"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_forward_is_the_identity(self, dtype, mode):
        x = torch.randn(4, 3, 6, 6).to(dtype)
        y = backdrop(x, 0.5, mode=mode, seed=seed_of(0))
        assert torch.equal(y, x)
        assert y is not x
        assert y.dtype == dtype

    @pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.9])
    @pytest.mark.parametrize(
        ("shape", "mode", "patch_size"),
        [
            ((16, 3), "sample", 1),
            ((16, 2, 3, 4, 5), "sample", 1),
            ((4, 3, 6, 7), "patch", 1),
            ((4, 3, 6, 7), "patch", 3),
            ((4, 3, 6, 7), "patch", 100),
        ],
    )
    def test_gradient_is_masked_and_rescaled(self, shape, mode, patch_size, p):
        """g * m * numel(m) / sum(m), with one entry of m for each example or position."""
        x = torch.randn(shape, dtype=torch.float64).requires_grad_()
        options = {"p": p, "mode": mode, "patch_size": patch_size, "seed": seed_of(3)}
        m = mask_of(x, **options).double()
        g = torch.randn(shape, dtype=torch.float64)
        backdrop(x, **options).backward(g)
        # Every example (or channel) has as many entries, so the shares are equal.
        expected = g * m * m.numel() / m.sum()
        torch.testing.assert_close(x.grad, expected, rtol=1e-7, atol=0)
        assert p == 0 or 0 < m.mean() < 1 or patch_size == 100

    def test_gradient_is_exact_in_float32(self):
        """With shares that float32 holds, to the last bit."""
        x = torch.randn(8, 5).requires_grad_()
        seed = next(s for s in map(seed_of, range(99)) if mask_of(x, seed=s)[:, 0].sum() == 4)
        m = mask_of(x, seed=seed)
        g = torch.randn(8, 5)
        backdrop(x, seed=seed).backward(g)
        assert torch.equal(x.grad, g * m * 2)

    def test_low_precision_gradient_keeps_its_dtype(self):
        x = torch.randn(8, 5, dtype=torch.bfloat16).requires_grad_()
        backdrop(x, seed=seed_of(0)).sum().backward()
        assert x.grad.dtype == torch.bfloat16

    def test_sample_mode_masks_whole_examples(self):
        m = mask_of(torch.zeros(64, 3, 4), seed=seed_of(1)).flatten(1)
        assert torch.equal(m.all(1), m.any(1))
        assert 0 < m.all(1).sum() < 64

    @pytest.mark.parametrize("patch_size", [1, 2, 3])
    def test_patch_mode_masks_squares_of_all_channels(self, patch_size):
        m = mask_of(torch.zeros(4, 3, 7, 8), mode="patch", patch_size=patch_size, seed=seed_of(1))
        assert torch.equal(m.all(1), m.any(1))
        plane = m[:, 0]
        squares = [
            plane[n, i : i + patch_size, j : j + patch_size]
            for n in range(4)
            for i in range(0, 7, patch_size)
            for j in range(0, 8, patch_size)
        ]
        assert all(s.all() == s.any() for s in squares)
        kept = [bool(s.all()) for s in squares]
        assert 0.2 < np.mean(kept) < 0.8
        # Neighbouring squares differ: the mask is drawn per square, not per row or example.
        rows = plane[:, ::patch_size, ::patch_size]
        assert (rows[:, :, 1:] != rows[:, :, :-1]).any()
        assert (rows[:, 1:] != rows[:, :-1]).any()
        assert (rows[1:] != rows[:-1]).any()

    @pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
    def test_p_is_the_probability_to_mask(self, p):
        kept = [
            mask_of(torch.zeros(100, 1), p=p, seed=seed_of(s)).float().mean() for s in range(40)
        ]
        error = abs(float(torch.stack(kept).mean()) - (1 - p))
        assert error < 4 * math.sqrt(p * (1 - p) / 4000)

    def test_the_mean_over_seeds_is_the_gradient(self):
        g, total, seeds = torch.linspace(-1, 1, 32)[:, None], torch.zeros(32, 1), 3000
        x = torch.zeros(32, 1).requires_grad_()
        for s in range(seeds):
            (grad,) = torch.autograd.grad(backdrop(x, 0.5, seed=seed_of(s)), x, g)
            total += grad
        # An entry is 0 or about twice the gradient, so its standard deviation is about |g|.
        assert ((total / seeds - g).abs() <= 4 * g.abs() / math.sqrt(seeds)).all()

    @pytest.mark.parametrize("mode", ["sample", "patch"])
    def test_at_least_one_part_passes(self, mode):
        for s in range(30):
            m = mask_of(torch.zeros(2, 1, 2, 2), p=0.999, mode=mode, seed=seed_of(s))
            assert m.any()
            x = torch.ones(2, 1, 2, 2).requires_grad_()
            backdrop(x, 0.999, mode=mode, seed=seed_of(s)).sum().backward()
            assert x.grad.sum() == 8  # the whole scale, on what passes

    def test_seed_generator_and_default_stream(self):
        x = torch.zeros(64, 1)
        by_seed = [mask_of(x, seed=seed_of(s)) for s in (0, 0, 1)]
        assert torch.equal(by_seed[0], by_seed[1])
        assert not torch.equal(by_seed[0], by_seed[2])
        state = torch.get_rng_state()
        by_generator = [mask_of(x, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(by_generator[0], by_generator[1])
        assert not torch.equal(by_generator[0], by_generator[2])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            one, other = mask_of(x), mask_of(x)
            torch.manual_seed(0)
            assert torch.equal(mask_of(x), one)
        assert not torch.equal(one, other)

    def test_no_gradient_wanted(self):
        assert not backdrop(torch.zeros(4, 1), seed=seed_of(0)).requires_grad


class TestErrors:
    @pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
    def test_p(self, p):
        with pytest.raises(ValueError, match=r"backdrop: p must be in \[0, 1\), got"):
            backdrop(torch.zeros(2), p)
        with pytest.raises(ValueError, match=r"apply_backdrop: p must be in \[0, 1\), got"):
            apply_backdrop(nn.Linear(1, 1), "*", p)
        with pytest.raises(ValueError, match=r"Backdrop: p must be in \[0, 1\), got"):
            Backdrop("layer4", p)

    def test_mode(self):
        with pytest.raises(
            ValueError, match="backdrop: mode must be 'sample' or 'patch', got 'row'"
        ):
            backdrop(torch.zeros(2), mode="row")

    def test_patch_size(self):
        with pytest.raises(ValueError, match="Backdrop: patch_size must be at least 1, got 0"):
            Backdrop("layer4", mode="patch", patch_size=0)

    def test_patches_need_a_feature_map(self):
        with pytest.raises(ValueError, match=r'mode="patch" needs activations .* got \(2, 3\)'):
            backdrop(torch.zeros(2, 3), mode="patch")

    @pytest.mark.parametrize("layers", ["", [], ()])
    def test_layers(self, layers):
        with pytest.raises(ValueError, match="Backdrop: layers must name at least one pattern"):
            Backdrop(layers)

    def test_nothing_matches(self):
        with pytest.warns(NoEffectWarning, match="no module whose name matches 'layr4'"):
            assert apply_backdrop(nn.Sequential(nn.Linear(1, 1)), "layr4") == []

    def test_outputs_that_are_no_tensor(self):
        model = nn.Sequential(nn.LSTM(2, 2))
        apply_backdrop(model, "0")
        with pytest.raises(TypeError, match="must return a tensor, LSTM returned tuple"):
            model(torch.zeros(3, 1, 2))


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),
            nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()),
            nn.Flatten(),
            nn.Linear(64, 3),
        )


def batch(n=16):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 8, 8, generator=g), torch.randint(3, (n,), generator=g)


def gradients(model, x, y):
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return [p.grad.clone() for p in model.parameters()]


class TestPlacement:
    @pytest.mark.parametrize(
        ("layers", "expected"),
        [
            ("0", ["0"]),
            ("0.*", ["0.0", "0.1"]),
            (["1", "0.0"], ["0.0", "1"]),
            ("?.0", ["0.0", "1.0"]),
            ("[!0]", ["1", "2", "3"]),
        ],
    )
    def test_by_pattern_in_the_order_of_the_model(self, layers, expected):
        model = network()
        assert apply_backdrop(model, layers) == expected
        hooked = [name for name, m in model.named_modules() if m._forward_hooks]
        assert hooked == expected

    def test_parameters_names_and_forward_stay(self):
        model, (x, _) = network(), batch()
        y, keys = model(x), list(model.state_dict())
        parameters = list(model.parameters())
        apply_backdrop(model, "*")
        assert torch.equal(model(x), y)
        assert list(model.state_dict()) == keys
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert not list(model.buffers())

    def test_only_what_lies_below_is_masked(self):
        """Of the layer's output on: its own gradient changes, those above stay."""
        model, (x, y) = network(), batch()
        plain = gradients(model, x, y)
        apply_backdrop(model, "0")
        masked = gradients(model, x, y)
        assert not torch.equal(masked[0], plain[0])
        for a, b in zip(masked[2:], plain[2:], strict=True):
            assert torch.equal(a, b)

    def test_per_sample_gradient_is_the_sum_of_the_kept_examples(self):
        model, (x, y) = network(), batch()
        apply_backdrop(model, "0", p=0.5)
        keep = mask_of(torch.zeros(16, 1), p=0.5, seed=model[0].backdrop_seed)[:, 0]
        assert 0 < keep.sum() < 16
        masked = gradients(model, x, y)
        reference = network()
        loss = F.cross_entropy(reference(x[keep]), y[keep])  # the mean over those kept: rescaled
        loss.backward()
        expected = [p.grad for p in reference.parameters()][:2]
        torch.testing.assert_close(masked[:2], expected, rtol=1e-4, atol=1e-6)

    def test_layers_draw_different_masks(self):
        model, (x, _) = network(), batch(64)
        apply_backdrop(model, ["0", "1"])
        assert model[0].backdrop_seed != model[1].backdrop_seed
        masks = [mask_of(x, seed=model[i].backdrop_seed) for i in (0, 1)]
        assert not torch.equal(*masks)

    def test_evaluation_is_untouched(self):
        model, (x, y) = network().eval(), batch()
        plain = gradients(model, x, y)
        apply_backdrop(model, "*")
        for a, b in zip(gradients(model, x, y), plain, strict=True):
            assert torch.equal(a, b)
        model.train()
        assert not torch.equal(gradients(model, x, y)[0], plain[0])

    def test_idempotent(self):
        model, (x, y) = network(), batch()
        names = apply_backdrop(model, "0")
        once = gradients(model, x, y)
        assert apply_backdrop(model, "0") == names
        for a, b in zip(gradients(model, x, y), once, strict=True):
            assert torch.equal(a, b)

    def test_copies_and_files(self):
        model, (x, y) = network(), batch()
        apply_backdrop(model, "0")
        expected = gradients(model, x, y)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            for a, b in zip(gradients(other, x, y), expected, strict=True):
                assert torch.equal(a, b)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing_recomputes_the_same_mask(self, use_reentrant):
        model, (x, y) = network(), batch()
        apply_backdrop(model, "*.0", p=0.5)
        expected = gradients(model, x, y)
        model.zero_grad()
        hidden = checkpoint(model[:2], x.requires_grad_(), use_reentrant=use_reentrant)
        F.cross_entropy(model[2:](hidden), y).backward()
        for p, e in zip(model.parameters(), expected, strict=True):
            assert torch.equal(p.grad, e)

    @pytest.mark.parametrize("mode", ["sample", "patch"])
    def test_compiles_without_a_graph_break_and_once_for_all_seeds(self, mode):
        model, (x, y) = network(), batch()
        apply_backdrop(model, ["0", "1"], p=0.5, mode=mode, patch_size=2)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch._dynamo.utils.counters.clear()
        seen = []
        for step in range(3):
            for name in ("0", "1"):
                model.get_submodule(name).backdrop_seed.fill_(derive_seed(step, name))
            expected = gradients(model, x, y)
            model.zero_grad()
            F.cross_entropy(compiled(x), y).backward()
            for p, e in zip(model.parameters(), expected, strict=True):
                torch.testing.assert_close(p.grad, e, rtol=1e-4, atol=1e-6)
            seen.append(expected[0])
        assert not torch.equal(seen[0], seen[1])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class TestInARun:
    def start(self, seed=0, rank=0, layers=("0", "1")):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Run([Backdrop(layers)], model=model, optimizer=optimizer, seed=seed, rank=rank)

    def seeds(self, run):
        return [int(m.backdrop_seed) for m in run.model.modules() if hasattr(m, "backdrop_seed")]

    def test_every_layer_micro_batch_step_rank_and_seed_draws_anew(self):
        run = self.start()
        seen = []
        for other in (run, run, self.start(rank=1), self.start(seed=1)):
            other.on_batch(batch())
            seen += self.seeds(other)
        run.end_step()
        run.on_batch(batch())
        seen += self.seeds(run)
        assert len(set(seen)) == 10
        again = self.start()
        again.on_batch(batch())
        assert self.seeds(again) == seen[:2]

    def test_batch_is_the_users(self):
        given = batch()
        for a, b in zip(self.start().on_batch(given), given, strict=True):
            assert a is b

    def test_is_noted_and_needs_no_sentinel(self):
        run = self.start()
        assert "Backdrop masks the gradient behind 0, 1" in str(run.report)
        assert not run.report.changes

    def test_patterns_as_a_list_stay_hashable_and_equal(self):
        one, other = Backdrop(["a", "b"]), Backdrop(("a", "b"))
        assert one == other
        assert hash(one) == hash(other)


class TestUniform:
    """The counter-based numbers behind the masks."""

    def draw(self, seed, n=20000):
        return uniform((n,), seed_of(seed), torch.device("cpu")).double().numpy()

    @pytest.mark.parametrize("seed", range(4))
    def test_is_uniform(self, seed):
        u = self.draw(seed)
        assert u.min() >= 0
        assert u.max() < 1
        assert abs(u.mean() - 0.5) < 4 * math.sqrt(1 / 12 / len(u))
        # The variance of (u - 1/2)^2 is 1/80 - 1/144.
        assert abs(u.var() - 1 / 12) < 4 * math.sqrt((1 / 80 - 1 / 144) / len(u))
        assert stats.kstest(u, "uniform").pvalue > 0.001

    @pytest.mark.parametrize("lag", [1, 2, 3, 8, 64, 256, 1024])
    def test_neighbouring_positions_are_uncorrelated(self, lag):
        u = self.draw(0)
        assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) < 4 / math.sqrt(len(u))

    @pytest.mark.parametrize(
        "pair",
        [(0, 1), (1, 2), (2**32, 2**32 + 1), (5, 5 + 2**32), (7, 7 + 2**62), (0, 2**31)],
    )
    def test_neighbouring_seeds_are_uncorrelated(self, pair):
        """Given as they are, without the hash of the key."""
        a, b = (
            uniform((20000,), torch.tensor(s), torch.device("cpu")).double().numpy() for s in pair
        )
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(len(a))
        for lag in (1, 2):
            assert abs(np.corrcoef(a[:-lag], b[lag:])[0, 1]) < 4 / math.sqrt(len(a))

    def test_the_first_number_over_seeds_is_uniform(self):
        first = [float(uniform((1,), torch.tensor(s), torch.device("cpu"))) for s in range(4000)]
        assert stats.kstest(first, "uniform").pvalue > 0.001

    def test_recomputed_equal_and_shaped(self):
        shape = (3, 1, 4, 5)
        one, other = (uniform(shape, seed_of(9), torch.device("cpu")) for _ in range(2))
        assert torch.equal(one, other)
        assert (one.shape, one.dtype) == (shape, torch.float32)
        assert torch.equal(one.flatten(), uniform((60,), seed_of(9), torch.device("cpu")))
        assert len(one.unique()) == 60

    def test_values_never_change(self):
        """Pinned: other numbers would silently change every run with Backdrop."""
        values = uniform((4,), torch.tensor(2**40 + 12345), torch.device("cpu"))
        assert (values * 2**24).long().tolist() == PINNED


PINNED = [1696137, 8062514, 2679530, 3818838]
