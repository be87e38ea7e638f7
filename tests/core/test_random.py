"""Stateless randomness: a function of its key, and of nothing else."""

from collections import Counter

import pytest
import torch
from scipy import stats

from mosaic_core.random import beta, derive_seed, generator, permutation, span, to_device, uniform

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("key", "seed"),
    [
        ((), 2847183694713211083),
        ((0,), 2631537505891389924),
        (("0",), 9180095682402304423),
        ((0, "MixUp", 3, 1, 0), 907345587999021475),
    ],
)
def test_seeds_never_change(key: tuple[int | str, ...], seed: int) -> None:
    # A run that goes on from an old checkpoint, and a paper, rely on these very numbers. Python's
    # own hash of texts would differ in every process.
    assert derive_seed(*key) == seed


def test_every_part_of_the_key_counts() -> None:
    base = [0, "MixUp", 3, 1, 0]
    keys = [tuple(base)]
    for i, other in enumerate([1, "CutMix", 4, 2, 1]):
        keys.append((*base[:i], other, *base[i + 1 :]))
    keys += [(*base, 0), (*base, ""), (0, "MixUp", 31, 0), (0, "MixUp", 3, 10), ("0MixUp", 310)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)


def test_seeds_fit_torch_and_fill_their_range() -> None:
    seeds = [derive_seed(i) for i in range(2000)]
    assert len(set(seeds)) == 2000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 0.99 * 2**63
    assert min(seeds) < 0.01 * 2**63
    ones = torch.tensor([[seed >> bit & 1 for bit in range(63)] for seed in seeds]).float().mean(0)
    assert ((ones - 0.5).abs() < 0.06).all()  # 5 standard deviations


def test_a_generator_is_its_key_and_leaves_the_global_one_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = torch.rand(5, generator=generator(0, "MixUp", 3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(5, generator=generator(0, "MixUp", 3)), first)
    assert not torch.equal(torch.rand(5, generator=generator(0, "MixUp", 4)), first)


def test_a_generator_draws_the_same_with_every_torch() -> None:
    drawn = torch.rand(3, generator=generator(0, "MixUp", 3), dtype=torch.float64)
    expected = [0.6140502235206988, 0.6877694088730737, 0.8087331834824751]
    torch.testing.assert_close(drawn, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0)


# uniform


def test_uniform_never_changes() -> None:
    expected = [
        [0.0, 0.39042454957962036, 0.24968558549880981],
        [0.8544191718101501, 0.9953170418739319, 0.2787792682647705],
    ]
    assert uniform((2, 3), torch.tensor(0), CPU).tolist() == expected
    expected = [0.6755649447441101, 0.7289301753044128, 0.9851200580596924, 0.10267150402069092]
    assert uniform((4,), torch.tensor(2**63 - 1), CPU).tolist() == expected


def test_uniform_is_a_reference_hash_of_the_position() -> None:
    def draw(seed: int, position: int) -> float:
        mask, low, high = 2**32 - 1, seed & 2**32 - 1, seed >> 32
        bits = position
        for word in (low, high, low):
            bits = (bits ^ word) & mask
            bits = ((bits >> 16) ^ bits) * 0x45D9F3B & mask
            bits = ((bits >> 15) ^ bits) * 0x2C1B3C6D & mask
            bits = (bits >> 16) ^ bits
        return (bits >> 8) / 2**24

    seed = derive_seed("reference")
    drawn = uniform((3, 5, 7), torch.tensor(seed), CPU)
    assert drawn.flatten().tolist() == [draw(seed, i) for i in range(105)]


def test_uniform_depends_on_seed_and_position_alone() -> None:
    seed = torch.tensor(derive_seed("a"))
    state = torch.get_rng_state()
    many = uniform((100,), seed, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(uniform((10,), seed, CPU), many[:10])
    assert torch.equal(uniform((10, 10), seed, CPU).flatten(), many)
    assert not torch.equal(uniform((100,), seed + 1, CPU), many)
    assert not torch.equal(uniform((100,), seed + 2**32, CPU), many)  # the high word counts too
    assert seed.item() == derive_seed("a")  # not written into


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2)])
def test_uniform_of_small_shapes(shape: tuple[int, ...]) -> None:
    drawn = uniform(shape, torch.tensor(1), CPU)
    assert drawn.shape == shape
    assert drawn.dtype == torch.float32


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1, derive_seed("x")])
def test_uniform_is_uniform(seed: int) -> None:
    n = 200_000
    u = uniform((n,), torch.tensor(seed), CPU).double()
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    counts = torch.histc(u, 100, 0, 1)
    assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 99 + 5 * (2 * 99) ** 0.5  # chi squared
    assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 5 / n**0.5


def test_uniforms_of_neighbouring_seeds_are_independent() -> None:
    n = 50_000
    draws = torch.stack([uniform((n,), torch.tensor(s), CPU) for s in (8, 9, 10, 8 + 2**32)])
    correlation = torch.corrcoef(draws.double()) - torch.eye(4)
    assert correlation.abs().max() < 5 / n**0.5


def test_uniform_compiles_to_one_graph() -> None:
    def draw(seed: torch.Tensor) -> torch.Tensor:
        return uniform((4, 1), seed, CPU)

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for i in range(3):
        seed = torch.tensor(derive_seed(i))
        assert torch.equal(compiled(seed), draw(seed))


# to_device


def test_to_device_of_the_cpu_is_no_copy() -> None:
    tensor = torch.arange(3)
    assert to_device(tensor, CPU) is tensor


def test_to_device_moves() -> None:
    assert to_device(torch.arange(3), torch.device("meta")).device.type == "meta"


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_beta_is_the_beta_distribution(alpha: float) -> None:
    g = generator(0)
    draws = [beta(alpha, g) for _ in range(2000)]
    assert stats.kstest(draws, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_draws_leave_the_global_streams_alone_given_a_generator() -> None:
    state = torch.get_rng_state()
    first = beta(1.0, generator(3)), permutation(9, generator(3), CPU), span(9, 3, True, None)
    assert not torch.equal(torch.get_rng_state(), state)  # the last had none
    torch.set_rng_state(state)
    again = beta(1.0, generator(3)), permutation(9, generator(3), CPU), span(9, 3, True, None)
    assert first[0] == again[0]
    assert torch.equal(first[1], again[1])
    assert sorted(first[1].tolist()) == list(range(9))
    assert first[2] == again[2]


def spans(size: int, length: int, uniform: bool, count: int) -> Counter[tuple[int, int]]:
    g = generator(size, length)
    return Counter(span(size, length, uniform, g) for _ in range(count))


@pytest.mark.parametrize(("size", "length"), [(5, 1), (5, 2), (5, 3), (4, 4), (1, 1), (3, 7)])
def test_a_span_around_a_centre_that_is_uniform(size: int, length: int) -> None:
    expected = Counter(
        (max(c - length // 2, 0), min(c - length // 2 + length, size)) for c in range(size)
    )
    seen = spans(size, length, False, 500 * size)
    assert seen.keys() == expected.keys()
    for interval, count in expected.items():
        assert abs(seen[interval] / 500 - count) < 0.25  # 5 standard deviations
        assert 0 <= interval[0] < interval[1] <= size


@pytest.mark.parametrize(("size", "length"), [(5, 1), (5, 2), (5, 3), (4, 4), (1, 1), (3, 7)])
def test_a_uniform_span_covers_each_position_alike(size: int, length: int) -> None:
    places = size + length - 1
    seen = spans(size, length, True, 500 * places)
    covered = [sum(n for (a, b), n in seen.items() if a <= i < b) / 500 for i in range(size)]
    assert all(abs(share - length) < 0.25 * length for share in covered)
    assert all(0 <= a < b <= size for a, b in seen)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("size", [1, 5])
def test_a_span_of_nothing(size: int, uniform: bool) -> None:
    start, end = span(size, 0, uniform, None)
    assert start == end
