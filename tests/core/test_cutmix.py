"""CutMix against a float64 reference, the exact share of its box, and what it moves."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mosaic_core import Run
from mosaic_core.algorithms import CutMix, MixUp, cutmix_batch
from mosaic_core.target import MixedTarget

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64]
N, C, H, W = 6, 3, 8, 10


def images(n=N, dtype=torch.float32, shape=(C, H, W)):
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))
    return (50 * x.abs()).to(dtype)


def labels(n=N):
    return torch.arange(n)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def start(alpha=1.0, uniform_sampling=False, seed=0, rank=0):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = [CutMix(alpha, uniform_sampling)]
    return Run(recipe, model=model, optimizer=optimizer, seed=seed, rank=rank)


def by_hand(x, perm, bbox):
    """One pixel at a time, in float64."""
    top, left, bottom, right = bbox
    x = x.double().numpy()
    out = x.copy()
    for i, j in enumerate(perm.tolist()):
        for row in range(top, bottom):
            for column in range(left, right):
                out[i, ..., row, column] = x[j, ..., row, column]
    return out


class TestFunction:
    @pytest.mark.parametrize("bbox", [(2, 3, 5, 9), (0, 0, H, W), (7, 9, 8, 10), (4, 4, 4, 8)])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_formula(self, dtype, bbox):
        x, perm = images(dtype=dtype), torch.tensor([3, 3, 0, 2, 5, 4])
        expected = by_hand(x, perm, bbox)
        mixed, partner, mixing, used = cutmix_batch(x, labels(), bbox=bbox, indices=perm)
        assert mixed.dtype == dtype
        assert np.array_equal(mixed.double().numpy(), expected)
        assert torch.equal(partner, perm)
        assert used == bbox
        assert mixing == (bbox[2] - bbox[0]) * (bbox[3] - bbox[1]) / (H * W)

    @pytest.mark.parametrize("uniform_sampling", [False, True])
    @pytest.mark.parametrize("length", [None, 0.5])
    def test_the_weight_is_the_share_of_the_pixels_that_were_replaced(
        self, length, uniform_sampling
    ):
        """Also where the box was clipped: counted on images of a plane each."""
        clipped = 0
        for seed in range(60):
            y = torch.arange(4)
            x = torch.eye(4)[y][:, :, None, None].repeat(1, 1, H, W)
            mixed, partner, mixing, (top, left, bottom, right) = cutmix_batch(
                x, y, length, uniform_sampling=uniform_sampling, generator=generator(seed)
            )
            target = (1 - mixing) * torch.eye(4)[y] + mixing * torch.eye(4)[partner]
            torch.testing.assert_close(mixed.mean((2, 3)), target, rtol=0, atol=1e-6)
            clipped += (bottom - top, right - left) != (4, 5)
        assert clipped > 20

    @pytest.mark.parametrize("length", [0.25, 0.5, 0.6, 1.0])
    @pytest.mark.parametrize("size", [(32, 32), (17, 40), (224, 224)])
    def test_length_is_the_side_of_the_box(self, size, length):
        """Composer takes its area for the share to keep: a length of 0.25 gives it 0.94."""
        x, g = torch.zeros(1, 1, *size), generator()
        for _ in range(100):
            _, _, mixing, bbox = cutmix_batch(x, labels(1), length, generator=g)
            assert mixing <= length**2
            for n, start, end in zip(size, bbox[:2], bbox[2:], strict=True):
                side = int(n * length)
                clipped = start == 0 or end == n
                assert side // 2 <= end - start <= side if clipped else end - start == side

    @pytest.mark.parametrize(
        "target", [torch.randn(N, 2), torch.zeros(N, 3, 3, dtype=torch.uint8), torch.ones(N) > 0]
    )
    def test_targets_of_any_kind(self, target):
        perm, before = torch.tensor([1, 0, 2, 5, 4, 3]), target.clone()
        partner = cutmix_batch(images(), target, 0.5, indices=perm)[1]
        assert torch.equal(partner, target[perm])
        partner.zero_()
        assert torch.equal(target, before)

    @pytest.mark.parametrize(
        ("shape", "memory_format"),
        [
            ((8, 4, 5), torch.contiguous_format),
            ((8, 4, 5), torch.channels_last),
            ((4, 2, 3, 5), torch.channels_last_3d),
        ],
    )
    def test_in_place_in_every_memory_format(self, shape, memory_format):
        x = images(shape=shape).contiguous(memory_format=memory_format)
        perm = torch.tensor([3, 3, 0, 2, 5, 4])
        expected, strides = by_hand(x, perm, (1, 1, 2, 4)), x.stride()
        mixed = cutmix_batch(x, labels(), bbox=(1, 1, 2, 4), indices=perm)[0]
        assert mixed is x
        assert mixed.stride() == strides
        assert np.array_equal(mixed.double().numpy(), expected)

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_nothing_but_the_box_is_moved(self, memory_format):
        x = images(shape=(8, 32, 32)).contiguous(memory_format=memory_format)
        with Results() as results:
            cutmix_batch(x, labels(), bbox=(4, 4, 20, 12), indices=torch.randperm(N))
        assert max(results.made) == N * 8 * 16 * 8 * 4  # one box of each example

    def test_gradients_reach_the_partner(self):
        """For feature maps."""
        leaf = images().requires_grad_()
        perm = torch.tensor([1, 1, 1, 1, 1, 1])
        cutmix_batch(leaf * 1, labels(), bbox=(0, 0, 2, 2), indices=perm)[0].sum().backward()
        assert torch.all(leaf.grad[0, :, :2, :2] == 0)
        assert torch.all(leaf.grad[1, :, :2, :2] == N)
        assert torch.all(leaf.grad[:, :, 2:, 2:] == 1)

    def test_batch_of_one(self):
        x = images(1)
        mixed, partner, _, _ = cutmix_batch(x.clone(), labels(1))
        assert torch.equal(mixed, x)
        assert torch.equal(partner, labels(1))


class Results(TorchDispatchMode):
    """Records the bytes of everything that is newly made."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        given = {t.untyped_storage().data_ptr() for t in tensors}
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.made.append(t.untyped_storage().nbytes())
        return result


class TestDraws:
    def test_the_generator_decides(self):
        first, again = (cutmix_batch(images(), labels(), generator=generator(3)) for _ in range(2))
        assert first[2:] == again[2:]
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
        other = cutmix_batch(images(), labels(), generator=generator(4))
        assert first[2:] != other[2:]
        assert not torch.equal(first[1], other[1])

    def test_a_generator_is_advanced_and_nothing_else(self):
        torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
        g = generator()
        first, second = (cutmix_batch(images(), labels(), generator=g) for _ in range(2))
        assert first[3] != second[3]
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert np.array_equal(np.random.get_state()[1], numpy_state)

    def test_without_a_generator_torch_is_asked(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            first = cutmix_batch(images(), labels())
            torch.manual_seed(5)
            again = cutmix_batch(images(), labels())
            other = cutmix_batch(images(), labels())
        assert first[3] == again[3] != other[3]
        assert torch.equal(first[0], again[0])

    def test_partners_are_a_permutation(self):
        for seed in range(20):
            partner = cutmix_batch(images(), labels(), generator=generator(seed))[1]
            assert sorted(partner.tolist()) == list(range(N))

    @pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
    def test_distribution_of_the_area(self, alpha):
        """Beta(alpha, alpha): seen on boxes that no border clipped, (1 - side)**2 of them."""
        n, g = 1000, generator()
        x = torch.zeros(1, 1, n, n, dtype=torch.uint8)
        boxes = [cutmix_batch(x, labels(1), alpha=alpha, generator=g)[2:] for _ in range(2000)]
        areas = [area for area, b in boxes if min(b[:2]) > 0 and max(b[2:]) < n]
        assert len(areas) > 150
        grid = stats.beta(alpha, alpha).ppf((np.arange(5000) + 0.5) / 5000)
        cdf = np.cumsum((1 - np.sqrt(grid)) ** 2)
        assert stats.kstest(areas, lambda a: np.interp(a, grid, cdf / cdf[-1])).pvalue > 0.01

    def test_uniform_sampling_replaces_each_pixel_alike(self):
        """And the paper's way the middle more often."""
        counts = {}
        for uniform in (True, False):
            count, g = torch.zeros(12, 12), generator()
            for _ in range(3000):
                x = torch.zeros(1, 1, 12, 12)
                _, _, _, (top, left, bottom, right) = cutmix_batch(
                    x, labels(1), 0.5, uniform_sampling=uniform, generator=g
                )
                count[top:bottom, left:right] += 1 / 3000
            counts[uniform] = count
        even = counts[True]
        share = (6 / 17) ** 2  # a side of 6 has 17 places where it touches 12 pixels
        assert (even - share).abs().max() < 5 * (share / 3000) ** 0.5
        assert counts[False][6, 6] > 2 * counts[False][0, 0]


class TestInARun:
    def test_pastes_and_mixes_alike(self):
        run, x = start(), images()
        mixed, target = run.on_batch(x, labels())
        mixing = run.metrics["mosaic/CutMix/mixing"]
        assert 0 < mixing < 1
        assert isinstance(target, MixedTarget)
        (own, keep), (partner, weight) = run.mixture.components
        assert torch.equal(own, labels())
        assert weight.shape == ()
        assert float(keep + weight) == 1.0
        assert float(weight) == pytest.approx(mixing, rel=1e-6)
        replaced = (mixed != x).any(1)
        assert torch.equal(mixed, torch.where(replaced[:, None], x[partner], x))

    @pytest.mark.parametrize("uniform_sampling", [False, True])
    def test_equals_the_function_with_the_runs_generator(self, uniform_sampling):
        run, x = start(0.7, uniform_sampling), images()
        g = run.generator(run.recipe.algorithms[0])
        mixed, target = run.on_batch(x, labels())
        expected, partner, mixing, _ = cutmix_batch(
            x.clone(), labels(), alpha=0.7, uniform_sampling=uniform_sampling, generator=g
        )
        assert torch.equal(mixed, expected)
        assert torch.equal(target.mixture.components[1][0], partner)
        assert run.metrics["mosaic/CutMix/mixing"] == mixing

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_the_users_batch_is_copied_once(self, memory_format):
        x = images(shape=(8, 32, 32)).contiguous(memory_format=memory_format)
        before, run = x.clone(), start()
        with Results() as results:
            mixed, _ = run.on_batch(x, labels())
        assert torch.equal(x, before)
        assert mixed.stride() == x.stride()
        whole = x.untyped_storage().nbytes()
        assert sorted(results.made)[-1] == whole
        assert sorted(results.made)[-2] == round(run.metrics["mosaic/CutMix/mixing"] * whole)

    def test_every_micro_batch_step_rank_and_seed_draws_anew(self):
        def draw(run):
            mixed, _ = run.on_batch(images(), labels())
            return mixed.sum().item(), run.metrics["mosaic/CutMix/mixing"]

        run = start()
        values = [draw(run), draw(run)]
        run.end_step()
        values += [draw(run), draw(start(rank=1)), draw(start(seed=1))]
        assert len(set(values)) == 5
        assert draw(start()) == values[0]

    def test_dense_targets(self):
        run = start()
        _, target = run.on_batch(images(), torch.eye(N))
        (own, keep), (partner, mixing) = run.mixture.components
        loss = F.mse_loss(torch.zeros(N, N), target)
        torch.testing.assert_close(loss, keep * (own**2).mean() + mixing * (partner**2).mean())

    @pytest.mark.parametrize("mixup", [False, True])
    def test_a_target_for_each_pixel_gets_the_box_pasted(self, mixup):
        """A mask that equals a channel of the image still does."""
        x = torch.randint(4, (N, C, H, W)).float()
        mask = x[:, 0].long()
        before = mask.clone()
        model = nn.Linear(1, 1)
        recipe = [CutMix(), MixUp()] if mixup else [CutMix()]
        run = Run(recipe, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        mixed, target = run.on_batch(x, mask)
        assert torch.equal(mask, before)
        if not mixup:
            assert not isinstance(target, MixedTarget)
            assert torch.equal(target, mixed[:, 0].long())
            assert not torch.equal(target, mask)
        else:
            (own, keep), (partner, mixing) = run.mixture.components
            blended = keep * own + mixing * partner
            torch.testing.assert_close(blended, mixed[:, 0], rtol=1e-5, atol=1e-5)

    def test_text_is_refused(self):
        with pytest.raises(ValueError, match=r"must have shape \(N, C, ..., H, W\), got int64"):
            start().on_batch(torch.zeros(6, 12, dtype=torch.long), labels())


class TestErrors:
    @pytest.mark.parametrize("alpha", [0, -1.0, float("nan")])
    def test_alpha(self, alpha):
        with pytest.raises(ValueError, match=r"CutMix: alpha must be above 0, got"):
            CutMix(alpha=alpha)
        with pytest.raises(ValueError, match=r"cutmix_batch: alpha must be above 0, got"):
            cutmix_batch(images(), labels(), alpha=alpha)

    @pytest.mark.parametrize("length", [0, -0.5, 1.1, float("nan"), 0.1])
    def test_length(self, length):
        with pytest.raises(ValueError, match=r"length must be in \(0, 1\] and .* for .* 8 x 10"):
            cutmix_batch(images(), labels(), length)

    @pytest.mark.parametrize(
        "bbox", [(-1, 0, 4, 4), (0, 0, 9, 4), (0, 0, 4, 11), (4, 0, 3, 4), (0, 5, 4, 4)]
    )
    def test_bbox(self, bbox):
        x = images()
        with pytest.raises(ValueError, match=r"bbox must be \(top, left, bottom, right\) in an im"):
            cutmix_batch(x, labels(), bbox=bbox)
        assert torch.equal(x, images())

    def test_bbox_and_length(self):
        with pytest.raises(ValueError, match=r"length must be None where bbox is given, got 0.5"):
            cutmix_batch(images(), labels(), 0.5, bbox=(0, 0, 2, 2))

    def test_lengths_differ(self):
        with pytest.raises(ValueError, match="target must have the length of input, 6, got 5"):
            cutmix_batch(images(), labels(5))

    @pytest.mark.parametrize("shape", [(6, 4), (6, 4, 4)])
    @pytest.mark.parametrize("bbox", [None, (0, 0, 2, 2)])
    def test_no_images(self, shape, bbox):
        with pytest.raises(ValueError, match=r"input must have shape \(N, C, ..., H, W\), got"):
            cutmix_batch(torch.zeros(shape), labels(), bbox=bbox)

    @pytest.mark.parametrize("indices", [torch.arange(5), torch.zeros(6, 1, dtype=torch.long)])
    def test_indices(self, indices):
        x = images()
        with pytest.raises(ValueError, match=r"indices must have shape \(6,\), got"):
            cutmix_batch(x, labels(), 0.5, indices=indices)
        assert torch.equal(x, images())
