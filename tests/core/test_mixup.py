"""MixUp against its formula, and what it promises about randomness and memory."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mosaic_core import Run
from mosaic_core.algorithms import MixUp, mixup_batch
from mosaic_core.target import MixedTarget

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def images(n=6, dtype=torch.float32, shape=(3, 4, 5)):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def start(alpha=0.2, seed=0, rank=0):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Run([MixUp(alpha)], model=model, optimizer=optimizer, seed=seed, rank=rank)


class TestFunction:
    @pytest.mark.parametrize("mixing", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_formula(self, dtype, mixing):
        x, y, perm = images(dtype=dtype), torch.arange(6), torch.tensor([3, 3, 0, 2, 5, 4])
        blended, partner, used = mixup_batch(x, y, mixing, indices=perm)
        assert blended.dtype == dtype
        assert used == mixing
        assert torch.equal(partner, torch.tensor([3, 3, 0, 2, 5, 4]))
        exact = x.double().numpy()
        expected = np.stack(
            [(1 - mixing) * exact[i] + mixing * exact[j] for i, j in enumerate(perm.tolist())]
        )
        tol = 4 * torch.finfo(dtype).eps
        np.testing.assert_allclose(blended.double().numpy(), expected, rtol=tol, atol=tol)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_ends_are_exact(self, dtype):
        x, y, perm = images(dtype=dtype), torch.arange(6), torch.randperm(6)
        assert torch.equal(mixup_batch(x, y, 0.0, indices=perm)[0], x)
        assert torch.equal(mixup_batch(x, y, 1.0, indices=perm)[0], x[perm])

    @pytest.mark.parametrize(
        "target", [torch.randn(6, 2), torch.zeros(6, 3, 3, dtype=torch.uint8), torch.ones(6) > 0]
    )
    def test_targets_of_any_kind(self, target):
        perm = torch.tensor([1, 0, 2, 5, 4, 3])
        partner = mixup_batch(images(), target, 0.5, indices=perm)[1]
        assert torch.equal(partner, target[perm])
        assert partner.data_ptr() != target.data_ptr()

    def test_inputs_untouched(self):
        x, y, perm = images(), torch.arange(6), torch.randperm(6)
        before = x.clone(), y.clone(), perm.clone()
        blended, partner, _ = mixup_batch(x, y, 0.3, indices=perm)
        blended.zero_()
        partner.zero_()
        for tensor, value in zip((x, y, perm), before, strict=True):
            assert torch.equal(tensor, value)

    def test_gradients_reach_both_examples(self):
        """For blends of hidden states."""
        x = images().requires_grad_()
        blended, _, _ = mixup_batch(
            x, torch.arange(6), 0.25, indices=torch.tensor([1, 1, 1, 1, 1, 1])
        )
        blended.sum().backward()
        per_example = x.grad.flatten(1)
        assert torch.all(per_example[0] == 0.75)
        assert torch.all(per_example[1] == 0.75 + 6 * 0.25)

    @pytest.mark.parametrize(
        ("shape", "memory_format"),
        [
            ((8, 4, 5), torch.contiguous_format),
            ((8, 4, 5), torch.channels_last),
            ((4, 2, 3, 5), torch.channels_last_3d),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_memory_format_is_kept(self, dtype, shape, memory_format):
        x = images(dtype=dtype, shape=shape).contiguous(memory_format=memory_format)
        blended = mixup_batch(x, torch.arange(6), 0.3)[0]
        assert blended.stride() == x.stride()
        assert blended.is_contiguous(memory_format=memory_format)

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_one_allocation(self, memory_format):
        x = images(shape=(8, 16, 16)).contiguous(memory_format=memory_format)

        class Allocations(TorchDispatchMode):
            sizes: list[int] = []  # noqa: RUF012  # one use

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                given = {
                    t.untyped_storage().data_ptr()
                    for t in tree_leaves(args)
                    if isinstance(t, torch.Tensor)
                }
                for t in tree_leaves(result):
                    if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                        self.sizes.append(t.untyped_storage().nbytes())
                return result

        with Allocations() as allocations:
            mixup_batch(x, torch.arange(6), generator=generator())
        large = [size for size in allocations.sizes if size > 1000]
        assert large == [x.untyped_storage().nbytes()]


class TestDraws:
    def test_the_generator_decides(self):
        x, y = images(), torch.arange(6)
        first, again = (mixup_batch(x, y, generator=generator(3)) for _ in range(2))
        assert first[2] == again[2]
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
        other = mixup_batch(x, y, generator=generator(4))
        assert first[2] != other[2]
        assert not torch.equal(first[1], other[1])

    def test_a_generator_is_advanced_and_nothing_else(self):
        x, y, g = images(), torch.arange(6), generator()
        torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
        first, second = (mixup_batch(x, y, generator=g) for _ in range(2))
        assert first[2] != second[2]
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert np.array_equal(np.random.get_state()[1], numpy_state)

    def test_without_a_generator_torch_is_asked(self):
        x, y = images(), torch.arange(6)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            first = mixup_batch(x, y)
            torch.manual_seed(5)
            again = mixup_batch(x, y)
            other = mixup_batch(x, y)
        assert first[2] == again[2] != other[2]
        assert torch.equal(first[0], again[0])

    def test_partners_are_a_permutation(self):
        for seed in range(20):
            partner = mixup_batch(images(), torch.arange(6), generator=generator(seed))[1]
            assert sorted(partner.tolist()) == list(range(6))

    @pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0, 4.0])
    def test_distribution(self, alpha):
        """min(z, 1 - z) of z from Beta(alpha, alpha), which lies in [0, 1/2]."""
        g, x, y = generator(), torch.zeros(1, 1), torch.zeros(1)
        draws = np.array([mixup_batch(x, y, alpha=alpha, generator=g)[2] for _ in range(2000)])
        assert draws.min() >= 0
        assert draws.max() <= 0.5
        beta = stats.beta(alpha, alpha)
        assert stats.kstest(draws, lambda m: 2 * beta.cdf(np.minimum(m, 0.5))).pvalue > 0.01
        mean = 2 * beta.expect(lambda z: z, lb=0, ub=0.5)
        assert abs(draws.mean() - mean) < 4 * draws.std() / np.sqrt(len(draws))


class TestInARun:
    def test_blends_inputs_and_labels_alike(self):
        run, x, y = start(), images(), torch.arange(6)
        blended, target = run.on_batch(x, y)
        mixing = run.metrics["mosaic/MixUp/mixing"]
        assert 0 < mixing <= 0.5
        assert isinstance(target, MixedTarget)
        (own, keep), (partner, lam) = run.mixture.components
        assert torch.equal(own, y)
        assert lam.shape == ()
        assert float(keep + lam) == 1.0
        assert float(lam) == pytest.approx(mixing, rel=1e-6)
        assert torch.equal(blended, mixup_batch(x, y, mixing, indices=partner)[0])
        expected = (1 - mixing) * x.double() + mixing * x.double()[partner]
        torch.testing.assert_close(blended.double(), expected, rtol=1e-6, atol=1e-6)

    def test_equals_the_function_with_the_runs_generator(self):
        run, x, y = start(alpha=0.7), images(), torch.arange(6)
        g = run.generator(run.recipe.algorithms[0])
        blended, target = run.on_batch(x, y)
        expected, partner, mixing = mixup_batch(x, y, alpha=0.7, generator=g)
        assert torch.equal(blended, expected)
        assert torch.equal(target.mixture.components[1][0], partner)
        assert run.metrics["mosaic/MixUp/mixing"] == mixing

    def test_every_micro_batch_step_rank_and_seed_draws_anew(self):
        def draw(run):
            run.on_batch(images(), torch.arange(6))
            return run.metrics["mosaic/MixUp/mixing"]

        run = start()
        values = [draw(run), draw(run)]
        run.end_step()
        values += [draw(run), draw(start(rank=1)), draw(start(seed=1))]
        assert len(set(values)) == 5
        assert draw(start()) == values[0]

    def test_dense_targets(self):
        run, x, y = start(), images(), torch.eye(6)
        _, target = run.on_batch(x, y)
        (own, keep), (partner, lam) = run.mixture.components
        loss = F.mse_loss(torch.zeros(6, 6), target)
        torch.testing.assert_close(loss, keep * (own**2).mean() + lam * (partner**2).mean())

    def test_batch_of_one(self):
        x, y = images(1), torch.zeros(1, dtype=torch.long)
        blended, target = start().on_batch(x, y)
        torch.testing.assert_close(blended, x)
        assert torch.equal(target.mixture.components[1][0], y)

    def test_integer_images(self):
        with pytest.raises(
            TypeError, match=r"input must be floating-point, got torch.uint8; convert"
        ):
            start().on_batch(torch.zeros(6, 3, 4, 4, dtype=torch.uint8), torch.arange(6))

    def test_target_of_the_wrong_length(self):
        message = "the target must have the length of the input, got input float32.* int64"
        with pytest.raises(ValueError, match=message):
            start().on_batch(images(), torch.arange(5))


class TestErrors:
    @pytest.mark.parametrize("alpha", [0, 0.0, -1.0, float("nan")])
    def test_alpha(self, alpha):
        with pytest.raises(ValueError, match=r"MixUp: alpha must be above 0, got"):
            MixUp(alpha=alpha)
        with pytest.raises(ValueError, match=r"mixup_batch: alpha must be above 0, got"):
            mixup_batch(images(), torch.arange(6), alpha=alpha)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
    def test_integer_input(self, dtype):
        with pytest.raises(
            TypeError, match=r"input must be floating-point, got torch\..*x.float\(\)"
        ):
            mixup_batch(torch.zeros(2, 3, dtype=dtype), torch.arange(2))

    def test_length(self):
        with pytest.raises(ValueError, match="target must have the length of input, 6, got 5"):
            mixup_batch(images(), torch.arange(5))

    @pytest.mark.parametrize("mixing", [-0.1, 1.1, float("nan")])
    def test_mixing(self, mixing):
        with pytest.raises(ValueError, match=r"mixing must be in \[0, 1\], got"):
            mixup_batch(images(), torch.arange(6), mixing)

    @pytest.mark.parametrize("indices", [torch.arange(5), torch.zeros(6, 1, dtype=torch.long)])
    def test_indices(self, indices):
        with pytest.raises(ValueError, match=r"indices must have shape \(6,\), got"):
            mixup_batch(images(), torch.arange(6), 0.5, indices=indices)
