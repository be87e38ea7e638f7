"""AugMix against the algorithm of the paper, written out image by image."""

import functools
import itertools
import pickle

import numpy as np
import PIL.Image
import pytest
import torch
from scipy import stats
from torch import nn
from torchvision.transforms import v2

from mosaic_core import Run
from mosaic_core.algorithms import AugMix, augmix_image
from mosaic_core.algorithms._augmix import _draw_weights
from mosaic_core.augmentation import Policy, apply_each


def images(n=6, dtype=torch.float32, size=(12, 15)):
    x = torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(0))
    return (x * 255).to(dtype) if dtype == torch.uint8 else x.to(dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def start(*algorithms, seed=0):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Run(algorithms or [AugMix()], model=model, optimizer=optimizer, seed=seed)


def reference(x, severity, width, depth, alpha, g):
    """Algorithm 1 of the paper in float64, with the draws in the order of the function."""
    n, policy = len(x), Policy(0.3, (15 / 3, 12 / 3), 30.0, 0.9, (4, 0), identity=False)
    lengths = [depth] * width * n
    if depth == -1:
        lengths = torch.randint(1, 4, (width * n,), generator=g).tolist()
    levels = [k / 9 for k in range(severity)]
    drawn = [policy.draw(width * n, levels, g) for _ in range(max(lengths))]
    weights = _draw_weights(n, width, alpha, g).double()
    result = torch.zeros(x.shape, dtype=torch.float64)
    for i in range(n):
        result[i] = weights[0, i] * x[i]
        for k in range(width):
            chain = x[i : i + 1]
            for step in range(lengths[k * n + i]):
                chain = apply_each(chain, [drawn[step][k * n + i]], "bilinear")
            result[i] += weights[k + 1, i] * chain[0]
    return result, lengths


@pytest.mark.parametrize(
    ("severity", "width", "depth", "alpha"),
    [(3, 3, -1, 1.0), (10, 2, 4, 0.3), (1, 1, 1, 1.0), (7, 5, -1, 2.0)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.uint8])
def test_paper(dtype, severity, width, depth, alpha):
    x = images(9, dtype)
    before = x.clone()
    out = augmix_image(x, severity, width, depth, alpha, generator())
    expected, lengths = reference(x, severity, width, depth, alpha, generator())
    assert torch.equal(x, before)
    assert out.dtype == dtype
    tol = {torch.float64: 1e-12, torch.float32: 2e-6, torch.uint8: 0.5 + 1e-3}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tol)
    assert set(lengths) == ({1, 2, 3} if depth == -1 else {depth})
    assert severity == 1 or not torch.equal(out, x)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_weights(alpha):
    """Those of the chains sum to m of Beta, and divide it as Dirichlet does."""
    weights = _draw_weights(4000, 3, alpha, generator()).double()
    assert weights.shape == (4, 4000)
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(0), torch.ones(4000).double(), rtol=0, atol=1e-6)
    m = 1 - weights[0].numpy()
    assert stats.kstest(m, stats.beta(alpha, alpha).cdf).pvalue > 0.01
    share = weights[2].numpy() / np.maximum(m, 1e-9)
    assert stats.kstest(share[m > 1e-3], stats.beta(alpha, 2 * alpha).cdf).pvalue > 0.01


def test_weakest_strength_changes_only_what_has_no_strength():
    """Level 0 is nothing but for AutoContrast, Equalize, and Posterize, which begins at 4 bits."""
    x = images(300, torch.uint8)
    out = augmix_image(x, 1, 1, 1, generator=generator())
    changed = (out != x).flatten(1).any(1).double().mean()
    assert 0 < changed <= 3 / 13 + 0.07


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("n", [1, 8])
def test_kind_is_kept(n, dtype, memory_format):
    x = images(n, dtype).contiguous(memory_format=memory_format)
    out = augmix_image(x, generator=generator())
    assert out.shape == x.shape
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pil_images_are_those_of_tensors(mode):
    g = np.random.default_rng(0)
    image = PIL.Image.fromarray(g.integers(0, 255, (12, 15, 3), dtype=np.uint8)).convert(mode)
    out = augmix_image(image, generator=generator())
    assert out.mode == mode
    tensor = v2.functional.pil_to_tensor(image)
    expected = augmix_image(tensor, generator=generator())
    assert torch.equal(v2.functional.pil_to_tensor(out), expected)
    assert torch.equal(augmix_image(tensor[None], generator=generator())[0], expected)


def test_as_a_transform():
    transform = pickle.loads(pickle.dumps(functools.partial(augmix_image, severity=5)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = transform(images()), transform(images())
        torch.manual_seed(0)
        assert torch.equal(transform(images()), first)
    assert not torch.equal(first, second)


def test_in_a_run_it_equals_the_function_with_the_runs_generator():
    run, x, y = start(AugMix(5, 2, 3, 0.5)), images(), torch.arange(6)
    g, before = run.generator(run.recipe.algorithms[0]), torch.get_rng_state()
    out, target = run.on_batch(x, y)
    assert target is y
    assert torch.equal(out, augmix_image(x, 5, 2, 3, 0.5, g))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_micro_batch_step_and_seed_draws_anew():
    run, x, y = start(), images(), torch.arange(6)
    outs = [run.on_batch(x, y)[0], run.on_batch(x, y)[0]]
    run.end_step()
    outs += [run.on_batch(x, y)[0], start(seed=1).on_batch(x, y)[0]]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(outs, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"severity": 0}, "severity must be one of 1, ..., 10, got 0"),
        ({"severity": 11}, "severity must be one of 1, ..., 10, got 11"),
        ({"width": 0}, "width must be a whole number of at least 1, got 0"),
        ({"depth": 0}, "depth must be a whole number of at least 1, or -1 to draw it, got 0"),
        ({"depth": -2}, "depth must be a whole number of at least 1, or -1 to draw it, got -2"),
        ({"alpha": 0}, "alpha must be above 0, got 0"),
        ({"alpha": float("nan")}, "alpha must be above 0, got nan"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=f"^AugMix: {message}$"):
        AugMix(**settings)
    with pytest.raises(ValueError, match=f"^augmix_image: {message}$"):
        augmix_image(images(), **settings)


def test_severity_is_a_whole_number():
    with pytest.raises(TypeError, match=r"^AugMix: severity must be a whole number, got 2.5$"):
        AugMix(2.5)
    with pytest.raises(ValueError, match=r"^augmix_image: severity must be one of 1, .* got 2.5$"):
        augmix_image(images(), severity=2.5)
