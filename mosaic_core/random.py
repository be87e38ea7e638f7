"""Stateless randomness: every draw is a function of (seed, algorithm, step, micro-batch, rank).

Nothing is taken from, or put into, a global stream. So switching an algorithm on moves neither
the shuffling nor the dropout of a run, every trainer draws the same, and a resumed run needs no
generator state.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "beta",
    "derive_seed",
    "generator",
    "permutation",
    "span",
    "to_device",
    "uniform",
    "uniform_at",
]


def derive_seed(*key: int | str) -> int:
    """Hash a key into a seed, uniform over [0, 2**63)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """Return a fresh CPU generator seeded by a key; CPU, so that all devices draw the same."""
    return torch.Generator().manual_seed(derive_seed(*key))


def beta(alpha: float, generator: torch.Generator | None) -> float:
    """Draw from Beta(alpha, alpha)."""
    # torch's own Beta takes no generator, so the generator seeds NumPy's.
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def permutation(n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Draw a permutation of n, int64, and put it on a device without waiting for the device."""
    return to_device(torch.randperm(n, generator=generator), device)


def span(
    size: int, length: int, uniform: bool, generator: torch.Generator | None
) -> tuple[int, int]:
    """Draw an interval among the positions of an axis, clipped to them.

    Args:
        size: Number of positions.
        length: Length of the interval before it is clipped, at least 0.
        uniform: Whether each position is as likely to lie in it, its centre then being outside at
            times; else the centre is uniform over the positions.
        generator: CPU generator to draw from; None draws from torch's default one.

    Returns:
        Its start, and its end, exclusive; it is empty only where ``length`` is 0.
    """
    if not length:
        return 0, 0
    if uniform:
        start = 1 - length + int(torch.randint(size + length - 1, (), generator=generator))
    else:
        start = int(torch.randint(size, (), generator=generator)) - length // 2
    return max(start, 0), min(start + length, size)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a small tensor drawn on the CPU to a device without waiting for the device."""
    if device.type == "cuda":  # from pageable memory the copy would synchronise
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def uniform(shape: tuple[int, ...], seed: Tensor, device: torch.device) -> Tensor:
    """Draw float32 uniforms in [0, 1) that depend on a seed tensor and the position alone.

    Args:
        shape: Shape of the result.
        seed: int64, shape ``()``, in [0, 2**63); on ``device`` or on the CPU.
        device: Where to draw.

    Returns:
        A new float32 tensor of ``shape``.
    """
    count = 1
    for size in shape:
        count *= size
    return uniform_at(torch.arange(count, device=device, dtype=torch.int64), seed).reshape(shape)


def uniform_at(positions: Tensor, seed: Tensor) -> Tensor:
    """Draw the float32 uniforms of :func:`uniform` at some positions.

    A counter hashed thrice by multiply-and-shift: the same numbers on every device and in every
    recomputation, and traceable by ``torch.compile``, which a generator is not.

    Args:
        positions: int64, of any shape; what exceeds 32 bits is cut off.
        seed: int64, shape ``()``, in [0, 2**63); on the same device or on the CPU.

    Returns:
        A new float32 tensor of the shape of ``positions``.
    """
    bits, mask = positions, 0xFFFFFFFF  # 32-bit words in int64: the products never overflow
    low, high = seed & mask, (seed >> 32) & mask
    for word in (low, high, low):
        bits = (bits ^ word) & mask
        bits = ((bits >> 16) ^ bits) * 0x45D9F3B & mask
        bits = ((bits >> 15) ^ bits) * 0x2C1B3C6D & mask
        bits = (bits >> 16) ^ bits
    return (bits >> 8).to(torch.float32) / (1 << 24)
