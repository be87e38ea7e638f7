"""RandAugment: every image its own operations, from the run's seed, on images of every kind."""

import functools
import itertools
import pickle

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from mosaic_core import BatchError, Run
from mosaic_core.algorithms import MixUp, RandAugment, randaugment_image
from mosaic_core.augmentation import Policy, apply_each


def images(n=6, dtype=torch.float32, size=(16, 20), channels=3):
    x = torch.rand(n, channels, *size, generator=torch.Generator().manual_seed(0))
    return (x * 255).to(dtype) if dtype == torch.uint8 else x.to(dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def start(*algorithms, seed=0):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Run(algorithms or [RandAugment()], model=model, optimizer=optimizer, seed=seed)


class TestFunction:
    @pytest.mark.parametrize("depth", [1, 3])
    @pytest.mark.parametrize("severity", [0, 4.5, 10])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.uint8])
    def test_each_image_goes_through_its_own_chain(self, dtype, severity, depth):
        """One image after the other, drawn from the same generator."""
        x, g = images(40, dtype), generator()
        policy = Policy(0.3, (150 / 331 * 20, 150 / 331 * 16), 30.0, 0.9, (8, 4), identity=True)
        drawn = [policy.draw(40, [severity / 10], g) for _ in range(depth)]
        before = x.clone()
        out = randaugment_image(x, severity, depth, generator())
        assert torch.equal(x, before)
        for i, chain in enumerate(zip(*drawn, strict=True)):
            one = x[i : i + 1]
            for operation in chain:
                one = apply_each(one, [operation])
            tol = 1 if dtype == torch.uint8 else 1e-12
            torch.testing.assert_close(out[i], one[0], rtol=0, atol=tol)

    def test_severity_is_a_third_of_torchvisions_magnitude(self):
        """An image of torchvision's, at magnitude 27, is one of ours at severity 9."""
        x = images(1)[0]
        ours = torch.stack([randaugment_image(x, 9, 1, generator(i)) for i in range(250)])
        others = torch.stack([randaugment_image(x, 6, 1, generator(i)) for i in range(250)])
        missed = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for _ in range(40):
                theirs = v2.RandAugment(1, 27)(x)
                assert (ours - theirs).abs().flatten(1).mean(1).min() <= 1e-3
                missed += (others - theirs).abs().flatten(1).mean(1).min() > 1e-3
        assert missed > 20

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_kind_is_kept(self, dtype, channels, memory_format):
        x = images(12, dtype, channels=channels).contiguous(memory_format=memory_format)
        out = randaugment_image(x, generator=generator())
        assert out.shape == x.shape
        assert out.dtype == dtype
        assert out.is_contiguous(memory_format=memory_format)
        if dtype != torch.uint8:
            assert out.min() >= 0
            assert out.max() <= 1

    def test_one_image(self):
        x = images(1)
        out = randaugment_image(x[0], generator=generator(3))
        assert torch.equal(out, randaugment_image(x, generator=generator(3))[0])
        assert not torch.equal(out, x[0])

    @pytest.mark.parametrize("mode", ["RGB", "L"])
    def test_pil_images(self, mode):
        """The draws decide, not the kind: near the tensor's, whose kernels round otherwise."""
        g = np.random.default_rng(0)
        image = PIL.Image.fromarray(g.integers(0, 255, (16, 20, 3), dtype=np.uint8)).convert(mode)
        tensor = v2.functional.pil_to_tensor(image)
        apart = []
        for seed in range(40):
            out = randaugment_image(image, 5, 1, generator(seed))
            assert out.mode == mode
            assert out.size == image.size
            expected = randaugment_image(tensor, 5, 1, generator(seed)).float()
            difference = (v2.functional.pil_to_tensor(out).float() - expected).abs()
            apart.append(float(difference.mean()))
        assert np.median(apart) <= 1
        assert np.mean([a > 10 for a in apart]) <= 0.2  # of noise, shifted by half a pixel

    def test_the_generator_decides_and_nothing_else_moves(self):
        x, before = images(), torch.get_rng_state()
        first, again, other = (randaugment_image(x, generator=generator(s)) for s in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert torch.equal(torch.get_rng_state(), before)

    def test_without_a_generator_torch_is_asked(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            first = randaugment_image(images())
            torch.manual_seed(5)
            assert torch.equal(randaugment_image(images()), first)
            assert not torch.equal(randaugment_image(images()), first)

    def test_images_of_a_batch_differ(self):
        x = images(1).expand(32, -1, -1, -1)
        out = randaugment_image(x, generator=generator())
        pairs = itertools.combinations(out, 2)
        assert np.mean([torch.equal(a, b) for a, b in pairs]) < 0.1

    @pytest.mark.parametrize("severity", [-1, 10.5, float("nan")])
    def test_severity(self, severity):
        with pytest.raises(ValueError, match=r"randaugment_image: severity must be in \[0, 10\]"):
            randaugment_image(images(), severity)
        with pytest.raises(ValueError, match=r"RandAugment: severity must be in \[0, 10\], got"):
            RandAugment(severity)

    @pytest.mark.parametrize("depth", [0, -1, 1.5])
    def test_depth(self, depth):
        message = "depth must be a whole number of at least 1, got"
        with pytest.raises(ValueError, match=f"randaugment_image: {message}"):
            randaugment_image(images(), depth=depth)
        with pytest.raises(
            (ValueError, TypeError), match=r"RandAugment: depth must be a whole num"
        ):
            RandAugment(depth=depth)


def picture(i):
    return PIL.Image.new("RGB", (16, 16), (10 * i, 100, 200))


class Pictures(Dataset):
    """Data as users have it: PIL images with a transform."""

    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return self.transform(picture(i))


def test_as_a_transform_in_the_workers_of_a_loader():
    transform = functools.partial(randaugment_image, severity=9, depth=2)
    transform = pickle.loads(pickle.dumps(transform))
    data = Pictures(v2.Compose([transform, v2.PILToTensor()]))

    def read():
        return torch.cat(list(DataLoader(data, 4, num_workers=2, generator=generator())))

    first = read()
    assert first.shape == (8, 3, 16, 16)
    assert torch.equal(first, read())  # the loader seeds its workers
    plain = torch.stack([v2.functional.pil_to_tensor(picture(i)) for i in range(8)])
    assert not torch.equal(first, plain)


class TestInARun:
    def test_equals_the_function_with_the_runs_generator(self):
        run, x, y = start(RandAugment(5, 1)), images(), torch.arange(6)
        g = run.generator(run.recipe.algorithms[0])
        out, target = run.on_batch(x, y)
        assert torch.equal(out, randaugment_image(x, 5, 1, generator=g))
        assert target is y

    def test_every_micro_batch_step_and_seed_draws_anew(self):
        run, x, y = start(), images(), torch.arange(6)
        outs = [run.on_batch(x, y)[0], run.on_batch(x, y)[0]]
        run.end_step()
        outs += [run.on_batch(x, y)[0], start(seed=1).on_batch(x, y)[0]]
        for a, b in itertools.combinations(outs, 2):
            assert not torch.equal(a, b)
        assert torch.equal(start().on_batch(x, y)[0], outs[0])

    def test_normalised_images(self):
        """As if it had been done before Normalize, where the batch holds black and white."""
        x = images(8)
        x[0, :, 0, 0], x[1, :, 0, 0] = 0, 1
        normalise = v2.Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.25])
        y = torch.arange(8)
        out, _ = start().on_batch(normalise(x), y)
        apart = (out - normalise(start().on_batch(x, y)[0])).abs()
        assert apart.median() < 1e-5
        # A value next to a threshold of Posterize or Equalize may fall on its other side.
        assert (apart > 1e-4).float().mean() < 0.01

    def test_before_mixing(self):
        run, x, y = start(MixUp(), RandAugment()), images(), torch.arange(6)
        augmented = start(RandAugment()).on_batch(x, y)[0]
        mixed, _ = run.on_batch(x, y)
        lam, (partner, _) = run.metrics["mosaic/MixUp/mixing"], run.mixture.components[1]
        torch.testing.assert_close(mixed, (1 - lam) * augmented + lam * augmented[partner])

    @pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8), (2, 4, 8, 8), (2, 3, 4, 8, 8)])
    def test_what_is_no_batch_of_images(self, shape):
        message = r"RandAugment: images must have shape \(N, C, H, W\) with 1 or 3 channels, got"
        with pytest.raises(ValueError, match=message):
            start().on_batch(torch.zeros(shape), torch.zeros(shape[0]))

    def test_token_ids(self):
        with pytest.raises(TypeError, match=r"RandAugment: images must be uint8 or floating-point"):
            start().on_batch(torch.zeros(2, 3, 4, 4, dtype=torch.long), torch.zeros(2))

    def test_lists_of_pil_images(self):
        with pytest.raises(BatchError, match="not a tensor"):
            start().on_batch([PIL.Image.new("RGB", (4, 4))], torch.zeros(1))
