"""Parameters in another memory layout than the usual one, such as channels last."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["plain_layout"]


@contextlib.contextmanager
def plain_layout(model: nn.Module) -> Iterator[None]:
    """Hold the parameters in the usual layout, and lay them out as they were afterwards.

    DeepSpeed 0.19 fails on others when it sends the parameters of rank 0 to all. Where ZeRO has
    made them slices of a flat tensor meanwhile, they stay such slices: their values are the same,
    and convolutions take the layout of their input.
    """
    strides = {p: p.stride() for p in model.parameters() if not p.is_contiguous()}
    for parameter in strides:
        parameter.data = parameter.data.contiguous()
    try:
        yield
    finally:
        for parameter, stride in strides.items():
            data = parameter.data
            if data.numel() and data.untyped_storage().nbytes() == data.nbytes:  # no slice
                parameter.data = torch.empty_strided(
                    data.shape, stride, dtype=data.dtype, device=data.device
                ).copy_(data)
