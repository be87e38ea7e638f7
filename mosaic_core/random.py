"""Stateless randomness: every draw is a function of (seed, algorithm, step, micro-batch, rank).

Nothing is taken from, or put into, a global stream. So switching an algorithm on moves neither
the shuffling nor the dropout of a run, every trainer draws the same, and a resumed run needs no
generator state.
"""

import hashlib

import torch
from torch import Tensor

__all__ = ["derive_seed", "generator", "to_device", "uniform", "uniform_at"]


def derive_seed(*key: int | str) -> int:
    """Hash a key into a seed, uniform over [0, 2**63)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """Return a fresh CPU generator seeded by a key; CPU, so that all devices draw the same."""
    return torch.Generator().manual_seed(derive_seed(*key))


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
