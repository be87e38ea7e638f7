"""The norm of many tensors together, which algorithms on gradients divide by."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["global_norm"]


def global_norm(
    tensors: list[Tensor],
    device: torch.device,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the norm of all elements of all tensors together: ``sqrt(sum(x ** 2))``.

    It is summed in float64 and rounded once, so neither the layout in memory nor how ranks share
    the elements out is seen in it, but for a rounding in a million. A sum in float32 shows both:
    channels-last gradients and the flat copies of ZeRO then give norms an ulp apart, which two
    passes a step carry to 1e-6 of the weights in twenty steps; and the CPU loses the last digits,
    2e-5 of the norm of a ResNet-50.

    Args:
        tensors: Floating-point tensors of any shapes and dtypes on one device, or none.
        device: That device; with no tensors too, where other ranks have some.
        all_reduce: Sums a value over the ranks, each of which has some of the tensors.

    Returns:
        A new tensor, shape ``()``, in float32 or, if a tensor is, in float64.

    Example:
        >>> global_norm([torch.tensor([3.0]), torch.tensor([[0.0], [4.0]])], torch.device("cpu"))
        tensor(5.)
    """
    widest = _widest(device)
    if tensors:
        square = torch.stack(torch._foreach_norm(tensors, 2, dtype=widest)).square().sum()
    else:
        square = torch.zeros((), dtype=widest, device=device)
    norm = (square if all_reduce is None else all_reduce(square)).sqrt()
    dtypes = (tensor.dtype for tensor in tensors)
    return norm.to(functools.reduce(torch.promote_types, dtypes, torch.float32))


@functools.cache
def _widest(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on devices without: Apple's, and some of Intel's."""
    lacking = device.type == "mps" or (
        device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64
    )
    return torch.float32 if lacking else torch.float64
