"""ColOut: which rows and columns stay, and which targets follow the images."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mosaic_core import Run
from mosaic_core.algorithms import ColOut, CutMix, MixUp, colout_batch

DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool]
SHAPES = [(3, 12, 20), (4, 3, 12, 20), (2, 3, 2, 12, 20), (1, 1, 12, 20)]
MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def positions(*shape):
    """Images whose values tell their row and column: 100 * row + column."""
    h, w = shape[-2:]
    return (100.0 * torch.arange(h)[:, None] + torch.arange(w)).expand(shape).contiguous()


def lines_of(image):
    """The rows and columns that stayed of positions; all examples and channels have the same."""
    flat = image.reshape(-1, *image.shape[-2:])
    assert torch.equal(flat, flat[:1].expand_as(flat))
    rows, columns = flat[0, :, 0] // 100, flat[0, 0] % 100
    assert torch.equal(flat[0], 100 * rows[:, None] + columns)
    return rows.int().tolist(), columns.int().tolist()


class TestFunction:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_rows_and_columns_stay_in_their_order(self, shape):
        x = positions(*shape)
        before = x.clone()
        rows, columns = lines_of(colout_batch(x, generator=generator()))
        assert (len(rows), len(columns)) == (10, 17)
        assert rows == sorted(set(rows))
        assert columns == sorted(set(columns))
        assert torch.equal(x, before)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtypes(self, dtype, shape):
        x = torch.randint(0, 255, shape).to(dtype)
        rows, columns = lines_of(colout_batch(positions(12, 20)[None], generator=generator()))
        out = colout_batch(x, generator=generator())
        assert out.dtype == dtype
        assert torch.equal(out, x[..., rows, :][..., columns])

    @pytest.mark.parametrize("mode", MODES)
    def test_pil_images_of_every_mode(self, mode):
        raw = np.random.default_rng(0).integers(0, 255, 20 * 12 * 4, dtype=np.uint8).tobytes()
        image = Image.frombytes(mode, (20, 12), raw[: len(Image.new(mode, (20, 12)).tobytes())])
        if mode == "P":
            image.putpalette(list(range(256)) * 3)
        before = image.tobytes()
        rows, columns = lines_of(colout_batch(positions(1, 12, 20), generator=generator()))
        out = colout_batch(image, generator=generator())
        assert isinstance(out, Image.Image)
        assert (out.mode, out.size) == (mode, (17, 10))
        assert out.getpalette() == image.getpalette()
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                pixel = out.crop((j, i, j + 1, i + 1)).tobytes()
                assert pixel == image.crop((column, row, column + 1, row + 1)).tobytes()
        assert image.tobytes() == before

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_memory_format_is_kept(self, memory_format):
        x = torch.randn(4, 3, 12, 20).contiguous(memory_format=memory_format)
        out = colout_batch(x, generator=generator())
        assert out.is_contiguous(memory_format=memory_format)
        assert torch.equal(out, colout_batch(x.contiguous(), generator=generator()))

    @pytest.mark.parametrize(
        ("p", "size", "kept"),
        [(0, 7, 7), (0.15, 32, 27), (0.15, 224, 190), (0.5, 7, 3), (0.99, 7, 1), (0.9, 1, 1)],
    )
    def test_how_many_stay(self, p, size, kept):
        """As many as in Composer, but never none."""
        x = torch.zeros(2, 3, size, 5)
        assert colout_batch(x, p_row=p, p_col=0).shape == (2, 3, kept, 5)
        assert colout_batch(x.mT, p_row=0, p_col=p).shape == (2, 3, 5, kept)

    def test_nothing_to_drop(self):
        x = torch.randn(2, 3, 5, 6)
        out = colout_batch(x, 0, 0)
        assert torch.equal(out, x)
        assert out.data_ptr() != x.data_ptr()

    def test_each_line_stays_as_often(self):
        g, count = generator(), torch.zeros(2, 20)
        for _ in range(1000):
            for axis, kept in enumerate(lines_of(colout_batch(positions(1, 20, 20), generator=g))):
                count[axis, kept] += 1 / 1000
        assert (count - 17 / 20).abs().max() < 0.05

    def test_the_generator_decides(self):
        x, state = positions(1, 30, 30), torch.get_rng_state()
        first, again = (colout_batch(x, generator=generator(3)) for _ in range(2))
        assert torch.equal(first, again)
        assert not torch.equal(first, colout_batch(x, generator=generator(4)))
        assert torch.equal(torch.get_rng_state(), state)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            first = colout_batch(x)
            torch.manual_seed(5)
            assert torch.equal(colout_batch(x), first)

    def test_gradients_reach_what_stays(self):
        x = torch.ones(2, 3, 12, 20, requires_grad=True)
        out = colout_batch(x)
        out.sum().backward()
        assert x.grad.sum() == out.numel()


class TestTargets:
    @pytest.mark.parametrize("resize_target", ["auto", True])
    @pytest.mark.parametrize(
        ("images", "targets"),
        [
            ((4, 3, 12, 20), (4, 12, 20)),  # masks of classes
            ((4, 3, 12, 20), (4, 1, 12, 20)),
            ((4, 3, 12, 20), (4, 5, 12, 20)),  # a channel a class
            ((3, 12, 20), (12, 20)),
            ((3, 12, 20), (1, 12, 20)),
        ],
    )
    def test_masks_follow(self, images, targets, resize_target):
        pair = positions(*images), positions(*targets).long()
        out, masks = colout_batch(pair, resize_target=resize_target)
        assert masks.dtype == torch.int64
        assert lines_of(masks.float()) == lines_of(out)

    @pytest.mark.parametrize(
        "target",
        [
            torch.arange(12),
            torch.zeros(12, 20),  # (N, classes) that equals (H, W)
            torch.zeros(12, 10, 10),  # a mask of another size
        ],
    )
    def test_other_targets_are_left(self, target):
        x = torch.zeros(12, 3, 12, 20)
        for resize_target in ("auto", False):
            images, out = colout_batch((x, target), resize_target=resize_target)
            assert images.shape == (12, 3, 10, 17)
            assert out is target
        with pytest.raises(ValueError, match=r"resize_target must be False or 'auto' for targets"):
            colout_batch((x, target), resize_target=True)

    def test_masks_may_be_left(self):
        pair = [torch.zeros(4, 3, 12, 20), torch.zeros(4, 12, 20)]
        images, masks = colout_batch(pair, resize_target=False)
        assert images.shape == (4, 3, 10, 17)
        assert masks is pair[1]

    def test_pil_pairs(self):
        image = Image.fromarray(np.arange(240, dtype=np.uint8).reshape(12, 20))
        out, mask = colout_batch((image, image.copy()))
        assert mask.size == (17, 10)
        assert mask.tobytes() == out.tobytes()
        out, mask = colout_batch((image, torch.from_numpy(np.array(image))))
        assert mask.numpy().tobytes() == out.tobytes()
        assert colout_batch((image, 3))[1] == 3


class TestInARun:
    def start(self, *recipe, **options):
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Run(recipe, model=model, optimizer=optimizer, **options)

    def test_equals_the_function_with_the_runs_generator(self):
        algorithm = ColOut(0.3, 0.1)
        run = self.start(algorithm)
        pair = torch.randn(4, 3, 12, 20), torch.randint(5, (4, 12, 20))
        g = run.generator(algorithm)
        images, masks = run.on_batch(*pair)
        expected = colout_batch(pair, 0.3, 0.1, generator=g)
        assert torch.equal(images, expected[0])
        assert torch.equal(masks, expected[1])
        assert type(masks) is torch.Tensor

    def test_class_labels_are_left(self):
        y = torch.arange(4)
        images, target = self.start(ColOut()).on_batch(torch.zeros(4, 3, 12, 20), y)
        assert images.shape == (4, 3, 10, 17)
        assert target is y

    def test_needs_no_loss(self):
        assert ColOut.needs() == {"batch"}
        assert ColOut().reads_labels
        assert not ColOut(resize_target=False).reads_labels

    def test_without_targets(self):
        out = self.start(ColOut(resize_target=False)).on_batch(torch.zeros(4, 3, 12, 20))
        assert out.shape == (4, 3, 10, 17)
        with pytest.raises(LookupError, match="the target of the batch was not found"):
            self.start(ColOut()).on_batch({"x": torch.zeros(4, 3, 12, 20)})

    def test_forced(self):
        run = self.start(ColOut(resize_target=True))
        x = torch.zeros(4, 3, 12, 20)
        assert run.on_batch(x, torch.zeros(4, 12, 20))[1].shape == (4, 10, 17)
        with pytest.raises(ValueError, match=r"ColOut: resize_target must be .* got int64\(4,\)"):
            run.on_batch(x, torch.arange(4))

    def test_masks_are_mixed_as_they_were_cut(self):
        """A mask that equals a channel of the image does so after ColOut, MixUp and CutMix."""
        x = torch.randint(4, (4, 3, 12, 20)).float()
        run = self.start(CutMix(), MixUp(), ColOut())
        images, _ = run.on_batch(x, x[:, 0].long())
        (own, keep), (partner, mixing) = run.mixture.components
        torch.testing.assert_close(keep * own + mixing * partner, images[:, 0])

    def test_every_micro_batch_step_rank_and_seed_draws_anew(self):
        x, y = positions(2, 1, 64, 64), torch.arange(2)
        run = self.start(ColOut())
        kept = [run.on_batch(x, y)[0], run.on_batch(x, y)[0]]
        run.end_step()
        kept.append(run.on_batch(x, y)[0])
        kept += [self.start(ColOut(), **o).on_batch(x, y)[0] for o in ({"rank": 1}, {"seed": 1})]
        assert len({images.numpy().tobytes() for images in kept}) == 5
        assert torch.equal(self.start(ColOut()).on_batch(x, y)[0], kept[0])

    @pytest.mark.parametrize("shape", [(4, 16), (4, 16, 16)])
    def test_no_images(self, shape):
        with pytest.raises(ValueError, match=r"ColOut: the input must have shape \(N, C, ..., H, "):
            self.start(ColOut()).on_batch(torch.zeros(shape), torch.arange(4))


class TestErrors:
    @pytest.mark.parametrize("name", ["p_row", "p_col"])
    @pytest.mark.parametrize("p", [-0.1, 1, 1.0, 1.5, float("nan")])
    def test_shares(self, name, p):
        with pytest.raises(ValueError, match=rf"ColOut: {name} must be in \[0, 1\), got"):
            ColOut(**{name: p})
        with pytest.raises(ValueError, match=rf"colout_batch: {name} must be in \[0, 1\), got"):
            colout_batch(torch.zeros(3, 8, 8), **{name: p})

    def test_resize_target(self):
        with pytest.raises(ValueError, match="ColOut: resize_target must be True, False or 'auto'"):
            ColOut(resize_target="yes")
        with pytest.raises(ValueError, match="colout_batch: resize_target must be True, False or"):
            colout_batch(torch.zeros(3, 8, 8), resize_target=None)

    @pytest.mark.parametrize("images", [np.ones((3, 8, 8)), "image", 3])
    def test_type(self, images):
        with pytest.raises(TypeError, match="images must be a tensor or PIL image, got"):
            colout_batch(images)

    @pytest.mark.parametrize("shape", [(8, 8), (8,), ()])
    def test_shape(self, shape):
        with pytest.raises(ValueError, match=r"images must have shape \(..., C, H, W\), got float"):
            colout_batch(torch.ones(shape))
