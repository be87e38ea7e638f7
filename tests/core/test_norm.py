"""The norm of many tensors against exact arithmetic, in every order in which they may lie."""

import fractions
import math

import pytest
import torch

from mosaic_core import norm
from mosaic_core.norm import global_norm

CPU = torch.device("cpu")
SHAPES = [(), (5,), (64, 32, 3, 3), (0, 2), (128, 64, 1, 1), (10, 128)]


def tensors(dtype=torch.float32, scale=1.0, shapes=SHAPES):
    g = torch.Generator().manual_seed(0)
    return [(scale * torch.randn(s, generator=g, dtype=torch.float64)).to(dtype) for s in shapes]


def exactly(tensors):
    """Return the norm, rounded once: the sum of the squares is that of rational numbers."""
    elements = [x for tensor in tensors for x in tensor.double().flatten().tolist()]
    square = sum(fractions.Fraction(x) ** 2 for x in elements)
    return math.sqrt(square)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30], ids=str)
def test_it_is_the_float32_nearest_to_the_exact_one(scale):
    """Also where the squares are beyond the range of float32."""
    found = tensors(scale=scale)
    expected = torch.tensor(exactly(found), dtype=torch.float32)
    assert torch.equal(global_norm(found, CPU), expected)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.float16], torch.float32),
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.float32, torch.bfloat16], torch.float32),
        ([torch.float64], torch.float64),
        ([torch.bfloat16, torch.float64], torch.float64),
    ],
    ids=str,
)
def test_of_any_dtypes_it_is_precise(dtypes, expected):
    found = [t.to(dtypes[i % len(dtypes)]) for i, t in enumerate(tensors(scale=100.0))]
    result = global_norm(found, CPU)
    assert result.dtype == expected
    assert result.shape == ()
    rel = 1e-14 if expected == torch.float64 else torch.finfo(expected).eps / 2
    assert result.item() == pytest.approx(exactly(found), rel=rel)


def layouts(found):
    """Return the same numbers in other orders in memory, as trainers keep them."""
    flat = torch.cat([t.flatten() for t in found])
    last = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in found]
    return {
        "channels last": last,
        "slices of one": list(flat.split([t.numel() for t in found])),
        "one": [flat],
        "backwards": found[::-1],
        "not dense": [torch.stack([t, t], -1)[..., 0] for t in found],
    }


@pytest.mark.parametrize("scale", [1.0, 3.7, 1e-4], ids=str)
@pytest.mark.parametrize("layout", layouts(tensors()))
def test_the_order_in_memory_is_not_seen(layout, scale):
    found = tensors(scale=scale)
    assert torch.equal(global_norm(layouts(found)[layout], CPU), global_norm(found, CPU))


def test_and_in_float32_it_would_be():
    found = tensors()
    square = {
        name: torch.stack(torch._foreach_norm(other, 2)).square().sum()
        for name, other in {"as is": found, **layouts(found)}.items()
    }
    assert len({value.item() for value in square.values()}) > 1


@pytest.mark.parametrize("cut", [0, 1, 10_000, 27_909, 27_910])
def test_nor_is_what_each_rank_owns(cut):
    """A rank that owns nothing takes part in the sum, in the same dtype."""
    found = tensors()
    flat = torch.cat([t.flatten() for t in found])
    assert flat.numel() == 27_910
    parts = [[part] if part.numel() else [] for part in (flat[:cut], flat[cut:])]
    squares = []
    for part in parts:
        global_norm(part, CPU, lambda square: squares.append(square) or square)
    assert {square.dtype for square in squares} == {torch.float64}
    for part in parts:
        whole = global_norm(part, CPU, lambda square: sum(squares))
        assert torch.equal(whole, global_norm(found, CPU))


def test_without_tensors_it_is_zero():
    assert torch.equal(global_norm([], CPU), torch.zeros(()))
    assert global_norm([], torch.device("meta")).device.type == "meta"


def test_what_is_not_finite_stays_so():
    assert global_norm([torch.tensor([1.0, math.inf])], CPU).item() == math.inf
    assert global_norm([torch.tensor([1.0, math.nan])], CPU).isnan()


def test_tensors_stay():
    found = tensors()
    before = [t.clone() for t in found]
    global_norm(found, CPU, lambda square: square.add_(1))
    assert all(map(torch.equal, found, before))


class TestWidest:
    def test_of_most_devices(self):
        for name in ("cpu", "cuda", "cuda:1", "meta"):
            assert norm._widest(torch.device(name)) == torch.float64

    def test_of_apples(self):
        assert norm._widest(torch.device("mps")) == torch.float32

    @pytest.mark.parametrize("has", [False, True])
    def test_of_intels(self, has, monkeypatch):
        class Properties:
            has_fp64 = has

        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: Properties)
        norm._widest.cache_clear()
        expected = torch.float64 if has else torch.float32
        assert norm._widest(torch.device("xpu:0")) == expected
        norm._widest.cache_clear()

    def test_where_there_is_no_float64(self, monkeypatch):
        monkeypatch.setattr(norm, "_widest", lambda device: torch.float32)
        found = tensors()
        assert global_norm(found, CPU).item() == pytest.approx(exactly(found), rel=1e-5)
        assert global_norm([], CPU).dtype == torch.float32
