"""The image operations against torchvision's own policies, on batches of every kind."""

import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision.transforms import v2

from mosaic_core.augmentation import Policy, apply_each, augment, augment_batch, torchvision_for

WIDE = Policy(0.99, (32.0, 32.0), 135.0, 0.99, (8, 2), identity=True)
LEVELS = [k / 30 for k in range(31)]


def images(n=6, dtype=torch.float32, size=(24, 20), channels=3):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(n, channels, *size, generator=g)
    return (x * 255).to(dtype) if dtype == torch.uint8 else x.to(dtype)


def photograph(dtype):
    """An image with smooth parts, so that every operation changes it in its own way."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 40), indexing="ij")
    image = torch.stack([x * y, (x - y).abs(), (6 * x).sin().square()]) * 0.9 + 0.05
    return (image * 255).to(dtype) if dtype == torch.uint8 else image.to(dtype)


def everything(policy, levels):
    """All that a policy can draw."""
    found = set()
    g = torch.Generator().manual_seed(0)
    for _ in range(40):
        found |= set(policy.draw(1000, levels, g))
    return sorted(found)


def as_tensor(image):
    return torch.from_numpy(np.asarray(image).copy()).movedim(-1, 0)


def outcomes_in_common(transform, image, operations, draws, interpolation="nearest"):
    """Check that all that torchvision's policy does is one of ours, and how many it hit."""
    pil = isinstance(image, PIL.Image.Image)
    ours = []
    for operation in operations:
        out = apply_each(image if pil else image[None], [operation], interpolation)
        ours.append(as_tensor(out) if pil else out[0])
    ours = torch.stack(ours).double()
    limit = 255.0 if pil or image.dtype == torch.uint8 else 1.0
    hit = set()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(draws):
            theirs = transform(image)
            theirs = (as_tensor(theirs) if pil else theirs).double()
            apart = (ours - theirs).abs().flatten(1).mean(1) / limit
            # It rounds magnitudes to float32, so a pixel may fall on the other side of a threshold.
            assert apart.min() <= 3e-3, apart.min()
            hit |= set((apart == apart.min()).nonzero().flatten().tolist())
    return len(hit) / len(operations)


class TestOperations:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
    @pytest.mark.parametrize("magnitude", [3, 15, 27])
    def test_are_those_of_torchvisions_randaugment(self, dtype, magnitude):
        policy = Policy(0.3, (150 / 331 * 40, 150 / 331 * 32), 30.0, 0.9, (8, 4), identity=True)
        operations = everything(policy, [magnitude / 30])
        assert len({name for name, _ in operations}) == 14
        assert len(operations) == 9 * 2 + 5
        reference = v2.RandAugment(1, magnitude)
        assert outcomes_in_common(reference, photograph(dtype), operations, 250) == 1

    def test_are_those_of_torchvisions_trivialaugment(self):
        operations = everything(WIDE, LEVELS)
        share = outcomes_in_common(
            v2.TrivialAugmentWide(), photograph(torch.uint8), operations, 150
        )
        assert share > 0.15

    def test_are_those_of_torchvisions_augmix(self):
        class OneChain(v2.AugMix):
            def _sample_dirichlet(self, params):
                return torch.eye(params.shape[1])[[-1]]  # all weight on the last

        policy = Policy(0.3, (40 / 3, 32 / 3), 30.0, 0.9, (4, 0), identity=False)
        operations = everything(policy, [k / 9 for k in range(10)])
        assert len({name for name, _ in operations}) == 13
        reference = OneChain(10, mixture_width=1, chain_depth=1)
        image = photograph(torch.float32)
        assert outcomes_in_common(reference, image, operations, 400, "bilinear") > 0.7

    def test_of_pil_images_too(self):
        image = PIL.Image.fromarray(photograph(torch.uint8).movedim(0, -1).numpy())
        policy = Policy(0.3, (150 / 331 * 40, 150 / 331 * 32), 30.0, 0.9, (8, 4), identity=True)
        operations = everything(policy, [0.9])
        assert outcomes_in_common(v2.RandAugment(1, 27), image, operations, 250) == 1

    def test_draws_are_uniform(self):
        n = 28_000
        drawn = WIDE.draw(n, LEVELS, torch.Generator().manual_seed(0))
        names = [name for name, _ in drawn]
        for name in set(names):
            assert names.count(name) / n == pytest.approx(1 / 14, abs=0.006)
        angles = torch.tensor([m for name, m in drawn if name == "Rotate"])
        assert (angles > 0).float().mean() == pytest.approx(0.5 * 30 / 31, abs=0.04)
        assert angles.abs().mean() == pytest.approx(135 / 2, rel=0.06)
        assert angles.abs().max() == 135


class TestApplyEach:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_each_image_gets_its_own(self, dtype, memory_format):
        x = images(64, dtype).contiguous(memory_format=memory_format)
        before = x.clone()
        operations = WIDE.draw(64, LEVELS, torch.Generator().manual_seed(1))
        assert len(set(operations)) > 20
        operations[10:30] = operations[40:60]  # some draw the same
        out = apply_each(x, operations)
        assert torch.equal(x, before)
        assert out.dtype == dtype
        assert out.is_contiguous(memory_format=memory_format)
        for i, operation in enumerate(operations):
            alone = apply_each(x[i : i + 1].contiguous(), [operation])[0]
            torch.testing.assert_close(out[i], alone, rtol=0, atol=1e-6 * (dtype != torch.uint8))
        assert sum(not torch.equal(a, b) for a, b in zip(out, x, strict=True)) > 40

    def test_images_that_drew_the_same_go_together(self, monkeypatch):
        vision, calls = torchvision_for("test").functional, []
        real = vision.rotate

        def rotate(images, *args):
            calls.append(len(images))
            return real(images, *args)

        monkeypatch.setattr(vision, "rotate", rotate)
        a, b = ("Rotate", 20.0), ("Rotate", -20.0)
        apply_each(images(7), [a, b, a, ("Identity", 0), b, a, a])
        assert calls == [4, 2]


class TestKinds:
    def test_floats_in_the_unit_interval_and_bytes_stay(self):
        seen = []
        for x in (images(), images(dtype=torch.float64), images(dtype=torch.uint8)):
            out = augment_batch("f", x, lambda b: seen.append(b.clone()) or b.clone())
            assert torch.equal(seen.pop(), x)
            assert torch.equal(out, x)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_normalised_floats_become_what_they_were(self, dtype):
        """Where a batch holds black and white in each channel."""
        raw = images(4).double()
        raw[1, :, 3, 4], raw[2, :, 5, 6] = 0, 1
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        mean, std = mean.reshape(1, 3, 1, 1), std.reshape(1, 3, 1, 1)
        x = ((raw - mean) / std).to(dtype)
        seen = []

        def invert(batch):
            seen.append(batch.clone())
            return 1 - batch

        out = augment_batch("f", x, invert)
        assert out.dtype == dtype
        assert seen[0].dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
        assert seen[0].min() >= 0
        assert seen[0].max() <= 1
        tol = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(seen[0].double(), raw, rtol=0, atol=tol)
        torch.testing.assert_close(
            out.double(), (1 - raw - mean) / std, rtol=0, atol=8 * tol, check_dtype=False
        )

    @pytest.mark.parametrize(("low", "high"), [(0.0, 255.0), (-1.0, 1.0), (0.2, 0.7), (-2.0, 0.5)])
    def test_the_range_holds_the_unit_interval(self, low, high):
        x = torch.linspace(low, high, 48, dtype=torch.float64).reshape(1, 1, 6, 8)
        seen = []
        augment_batch("f", x, lambda b: seen.append(b.clone()) or b)
        low, high = min(low, 0), max(high, 1)
        torch.testing.assert_close(seen[0], (x - low) / (high - low))

    def test_constant_images(self):
        x = torch.full((2, 3, 4, 4), 5.0)
        out = augment_batch("f", x, torch.clone)
        torch.testing.assert_close(out, x)

    def test_one_image(self):
        x = images(1)[0]
        out = augment("f", x, lambda b: b.flip(-1))
        assert torch.equal(out, x.flip(-1))

    @pytest.mark.parametrize("shape", [(4, 4), (2, 4, 8, 8), (2, 2, 3, 8, 8), (5, 8, 8)])
    def test_shapes(self, shape):
        message = r"f: images must have shape \(N, C, H, W\) with 1 or 3 channels, got"
        with pytest.raises(ValueError, match=message):
            augment("f", torch.zeros(shape), torch.clone)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
    def test_dtypes(self, dtype):
        with pytest.raises(TypeError, match="f: images must be uint8 or floating-point, got"):
            augment_batch("f", torch.zeros(2, 3, 4, 4, dtype=dtype), torch.clone)

    def test_other_things(self):
        with pytest.raises(TypeError, match="f: img must be a PIL image or a tensor, got ndarray"):
            augment("f", np.zeros((4, 4, 3)), torch.clone)
        with pytest.raises(ValueError, match=r"f: img must be of mode L or RGB, got RGBA; use"):
            augment("f", PIL.Image.new("RGBA", (4, 4)), torch.clone)


NAMES = ("RandAugment", "AugMix", "TrivialAugment")


class TestWithoutTorchvision:
    @pytest.mark.parametrize("name", NAMES)
    def test_settings_say_how_to_install_it(self, name, monkeypatch):
        from mosaic_core import algorithms, functional

        for module in [m for m in sys.modules if m.startswith("torchvision")]:
            monkeypatch.setitem(sys.modules, module, None)
        message = r'needs torchvision, which is optional; pip install "mosaic-core\[vision\]"'
        with pytest.raises(ImportError, match=f"^{name}: {message}$"):
            getattr(algorithms, name)()
        function = f"{name.lower()}_image"
        with pytest.raises(ImportError, match=f"^{function}: {message}$"):
            getattr(functional, function)(images())

    def test_it_is_not_imported_before_it_is_used(self):
        code = (
            "import sys, mosaic_core, mosaic_core.algorithms, mosaic_core.functional;"
            "from mosaic_core import plugins; plugins.algorithms();"
            "print([m for m in sys.modules if m.startswith('torchvision')])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == "[]", done.stderr
