"""CutOut: where holes lie, what they leave alone, and images of every kind."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mosaic_core import Run
from mosaic_core.algorithms import CutMix, CutOut, MixUp, cutout_batch

DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64]
SHAPES = [(3, 8, 10), (4, 3, 8, 10), (2, 3, 2, 8, 10), (1, 1, 7, 7)]
MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def hole_of(before, after):
    """Rows and columns of the one rectangle in which all values became zero."""
    changed = (before != after).flatten(0, -3).any(0)
    rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
    top, bottom, left, right = (int(v) for r in (rows, columns) for v in (r.min(), r.max() + 1))
    assert torch.all(after[..., top:bottom, left:right] == 0)
    expected = before.clone()
    expected[..., top:bottom, left:right] = 0
    assert torch.equal(after, expected)
    return top, bottom, left, right


class TestFunction:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_one_hole_in_tensors_of_every_kind(self, dtype, shape):
        x = torch.ones(shape).to(dtype)
        out = cutout_batch(x, generator=generator())
        assert (out.dtype, out.shape, out.stride()) == (dtype, x.shape, x.stride())
        assert torch.equal(x, torch.ones(shape).to(dtype))  # untouched
        top, bottom, left, right = hole_of(x, out)
        side = int(0.5 * min(shape[-2:]))
        assert 0 < bottom - top <= side
        assert 0 < right - left <= side

    @pytest.mark.parametrize("mode", MODES)
    def test_pil_images_of_every_mode(self, mode):
        raw = np.random.default_rng(0).integers(1, 255, 10 * 8 * 4, dtype=np.uint8).tobytes()
        size = len(Image.new(mode, (10, 8)).tobytes())
        image = Image.frombytes(mode, (10, 8), raw[:size])
        if mode == "P":
            image.putpalette(list(range(256)) * 3)
        before = image.tobytes()
        out = cutout_batch(image, length=0.4, generator=generator(1))
        assert isinstance(out, Image.Image)
        assert (out.mode, out.size) == (mode, (10, 8))
        assert image.tobytes() == before
        assert out.getpalette() == image.getpalette()
        # The same hole as that of a tensor of this height and width.
        tensor = cutout_batch(torch.ones(1, 8, 10), length=0.4, generator=generator(1))
        top, bottom, left, right = hole_of(torch.ones(1, 8, 10), tensor)
        assert set(out.crop((left, top, right, bottom)).tobytes()) == {0}
        for box in [(0, 0, 10, top), (0, bottom, 10, 8), (0, 0, left, 8), (right, 0, 10, 8)]:
            if box[0] < box[2] and box[1] < box[3]:
                assert out.crop(box).tobytes() == image.crop(box).tobytes()

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_memory_format_is_kept(self, memory_format):
        x = torch.randn(4, 3, 8, 10).contiguous(memory_format=memory_format)
        assert cutout_batch(x).stride() == x.stride()

    @pytest.mark.parametrize("length", [0.13, 0.25, 0.5, 0.9, 1.0])
    def test_length_is_a_share_of_the_shorter_side(self, length):
        x, g = torch.ones(1, 16, 24), generator()
        for _ in range(60):
            top, bottom, left, right = hole_of(x, cutout_batch(x, length=length, generator=g))
            side = int(16 * length)
            for n, start, end in ((16, top, bottom), (24, left, right)):
                clipped = start == 0 or end == n
                assert side // 2 <= end - start <= side if clipped else end - start == side

    @pytest.mark.parametrize("num_holes", [1, 3])
    def test_number_of_holes(self, num_holes):
        """Holes of one pixel: now and then two of them are one."""
        x, g = torch.ones(1, 10, 10), generator()
        counts = Counter(
            int(100 - cutout_batch(x, num_holes, length=0.1, generator=g).sum()) for _ in range(300)
        )
        assert max(counts) == num_holes
        assert counts[num_holes] > 280

    def test_the_whole_batch_has_the_same_holes(self):
        out = cutout_batch(torch.ones(5, 3, 8, 8), 2, generator=generator())
        assert torch.equal(out, out[:1, :1].expand_as(out))

    @pytest.mark.parametrize("uniform_sampling", [False, True])
    def test_where_holes_fall(self, uniform_sampling):
        x, g, count = torch.ones(1, 12, 12), generator(), 2000
        blank = sum(
            1 - cutout_batch(x, uniform_sampling=uniform_sampling, generator=g)[0].double()
            for _ in range(count)
        )
        if uniform_sampling:
            share = (6 / 17) ** 2  # a side of 6 has 17 places where it touches 12 pixels
            assert (blank / count - share).abs().max() < 5 * math.sqrt(share / count)
        else:  # a centre in the image: 3 of 12 blank the first row, 6 a middle one
            assert float(blank[6, 6] / count) == pytest.approx(1 / 4, abs=0.05)
            assert float(blank[0, 0] / count) == pytest.approx(1 / 9, abs=0.05)

    def test_the_generator_decides(self):
        x = torch.ones(1, 30, 30)
        state = torch.get_rng_state()
        first, again = (cutout_batch(x, generator=generator(3)) for _ in range(2))
        assert torch.equal(first, again)
        assert not torch.equal(first, cutout_batch(x, generator=generator(4)))
        assert torch.equal(torch.get_rng_state(), state)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            first = cutout_batch(x)
            torch.manual_seed(5)
            assert torch.equal(cutout_batch(x), first)

    def test_gradients_pass_outside_the_hole(self):
        x = torch.ones(2, 3, 8, 8, requires_grad=True)
        out = cutout_batch(x)
        out.sum().backward()
        assert torch.equal(x.grad, out.detach())


class TestInARun:
    def start(self, *recipe, **options):
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Run(recipe, model=model, optimizer=optimizer, **options)

    def test_equals_the_function_with_the_runs_generator(self):
        algorithm = CutOut(2, 0.3, uniform_sampling=True)
        run, x, y = self.start(algorithm), torch.randn(4, 3, 16, 16), torch.arange(4)
        g, before = run.generator(algorithm), x.clone()
        out, target = run.on_batch(x, y)
        assert torch.equal(out, cutout_batch(x, 2, 0.3, True, generator=g))
        assert torch.equal(x, before)
        assert target is y

    def test_labels_are_not_asked_for(self):
        assert CutOut.needs() == {"batch"}
        out = self.start(CutOut()).on_batch(torch.ones(4, 3, 8, 8))
        assert (out == 0).any()

    def test_every_micro_batch_step_rank_and_seed_draws_anew(self):
        x, y = torch.ones(2, 1, 64, 64), torch.arange(2)
        run = self.start(CutOut())
        holes = [run.on_batch(x, y)[0], run.on_batch(x, y)[0]]
        run.end_step()
        holes.append(run.on_batch(x, y)[0])
        holes += [self.start(CutOut(), **o).on_batch(x, y)[0] for o in ({"rank": 1}, {"seed": 1})]
        assert len({hole.numpy().tobytes() for hole in holes}) == 5
        assert torch.equal(self.start(CutOut()).on_batch(x, y)[0], holes[0])

    def test_acts_before_mixing(self):
        run = self.start(CutMix(), MixUp(), CutOut())
        assert [a.name for a in run.recipe] == ["CutOut", "CutMix", "MixUp"]

    @pytest.mark.parametrize("shape", [(4, 16), (4, 16, 16)])
    def test_no_images(self, shape):
        """Three dimensions are a batch here, not one image."""
        with pytest.raises(ValueError, match=r"CutOut: the input must have shape \(N, C, ..., H, "):
            self.start(CutOut()).on_batch(torch.zeros(shape), torch.arange(4))


class TestErrors:
    @pytest.mark.parametrize("num_holes", [0, -1])
    def test_num_holes(self, num_holes):
        with pytest.raises(ValueError, match="CutOut: num_holes must be at least 1, got"):
            CutOut(num_holes)
        with pytest.raises(ValueError, match="cutout_batch: num_holes must be at least 1, got"):
            cutout_batch(torch.ones(3, 8, 8), num_holes)

    @pytest.mark.parametrize("length", [0, -0.5, 1.5, float("nan")])
    def test_length(self, length):
        with pytest.raises(ValueError, match=r"CutOut: length must be in \(0, 1\], got"):
            CutOut(length=length)
        with pytest.raises(ValueError, match=r"cutout_batch: length must be in \(0, 1\], got"):
            cutout_batch(torch.ones(3, 8, 8), length=length)

    def test_a_hole_of_nothing_is_no_silent_one(self):
        with pytest.raises(ValueError, match=r"at least one pixel, got 0.1 for images of 8 x 20"):
            cutout_batch(torch.ones(3, 8, 20), length=0.1)

    @pytest.mark.parametrize("input", [np.ones((3, 8, 8)), [1, 2], "image"])
    def test_type(self, input):
        with pytest.raises(TypeError, match="input must be a tensor or a PIL image, got"):
            cutout_batch(input)

    def test_shape(self):
        with pytest.raises(ValueError, match=r"must have shape \(..., C, H, W\), got float32"):
            cutout_batch(torch.ones(8, 8))
