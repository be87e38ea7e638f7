"""TrivialAugment: one operation an image, of any strength."""

import itertools
import pickle

import PIL.Image
import pytest
import torch
from torch import nn

from mosaic_core import Run
from mosaic_core.algorithms import TrivialAugment, trivialaugment_image
from mosaic_core.augmentation import Policy, apply_each


def images(n=6, dtype=torch.float32, size=(16, 20)):
    x = torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(0))
    return (x * 255).to(dtype) if dtype == torch.uint8 else x.to(dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def start(seed=0):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Run([TrivialAugment()], model=model, optimizer=optimizer, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_each_image_goes_through_its_own_operation(dtype, memory_format):
    """Of the wide space of the paper, which test_augmentation compares with torchvision's."""
    x = images(60, dtype).contiguous(memory_format=memory_format)
    before = x.clone()
    wide = Policy(0.99, (32.0, 32.0), 135.0, 0.99, (8, 2), identity=True)
    drawn = wide.draw(60, [k / 30 for k in range(31)], generator())
    out = trivialaugment_image(x, generator())
    assert torch.equal(x, before)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)
    for i, operation in enumerate(drawn):
        one = x[i : i + 1].contiguous()
        precise = one if dtype == torch.uint8 else one.to(torch.promote_types(dtype, torch.float32))
        alone = apply_each(precise, [operation])[0].to(dtype)
        torch.testing.assert_close(out[i], alone, rtol=0, atol=0 if dtype == torch.uint8 else 1e-6)


def test_strengths_vary_from_image_to_image():
    x = images(1).expand(200, -1, -1, -1)
    out = trivialaugment_image(x, generator())
    assert len({image.numpy().tobytes() for image in out}) > 100


def test_one_image_of_each_kind():
    x, pil = images(1), PIL.Image.new("RGB", (20, 16), (10, 100, 200))
    out = trivialaugment_image(x[0], generator(3))
    assert torch.equal(out, trivialaugment_image(x, generator(3))[0])
    assert trivialaugment_image(pil, generator()).size == (20, 16)
    seen = {trivialaugment_image(pil, generator(s)).tobytes() for s in range(20)}
    assert len(seen) > 5


def test_the_function_is_a_transform():
    transform = pickle.loads(pickle.dumps(trivialaugment_image))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = transform(images()), transform(images())
        torch.manual_seed(0)
        assert torch.equal(transform(images()), first)
    assert not torch.equal(first, second)


def test_in_a_run_it_equals_the_function_with_the_runs_generator():
    run, other, x, y = start(), start(seed=1), images(), torch.arange(6)
    g, before = run.generator(run.recipe.algorithms[0]), torch.get_rng_state()
    out, target = run.on_batch(x, y)
    assert target is y
    assert torch.equal(out, trivialaugment_image(x, g))
    run.end_step()
    outs = [out, run.on_batch(x, y)[0], other.on_batch(x, y)[0]]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(outs, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_no_image():
    message = r"images must have shape \(N, C, H, W\) with 1 or 3 channels, got"
    with pytest.raises(ValueError, match=f"TrivialAugment: {message}"):
        start().on_batch(torch.zeros(2, 8), torch.zeros(2))
    with pytest.raises(ValueError, match=f"trivialaugment_image: {message}"):
        trivialaugment_image(torch.zeros(2, 8))
    with pytest.raises(TypeError, match="trivialaugment_image: img must be a PIL image or a"):
        trivialaugment_image("cat.png")
