"""Finding the residual blocks of a model by what they compute, and leaving them out.

With the weights of its branch at zero and its norms neutral, a residual block ``x + f(x)`` returns
its input. That holds for convolutional and transformer blocks of all libraries, and for no plain
stack of layers, so no table of class names is needed.
"""

import fnmatch
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["Shortcut", "no_gradient", "residual_blocks"]


class Shortcut(NamedTuple):
    """What a residual block returns where its branch is zero.

    Attributes:
        rectified: Whether it is the input through a ReLU, rather than the input.
        boxed: Whether it stands first in a tuple.
        beside: What else is in the tuple, if that is known without computing the block: Nones.
            None if it is not known.
    """

    rectified: bool
    boxed: bool
    beside: tuple[None, ...] | None


def residual_blocks(
    model: nn.Module, pattern: str | None = None
) -> dict[str, tuple[nn.Module, Shortcut]]:
    """Find the residual blocks that keep the shape of their input.

    Every candidate is tried out on small random inputs, in evaluation and on the CPU, wherever the
    model lies; weights, buffers, modes and global random streams stay. Blocks that write into
    their input are left out.

    Args:
        model: Any model.
        pattern: Shell-style pattern of module names, or the name of a class or base class. Of
            nested matches the outermost counts; matches that are not residual are left out, those
            that can't be tried, as they take other arguments, are trusted. None looks at the
            members of ``nn.Sequential`` and ``nn.ModuleList``; of nested blocks the innermost
            count, and those that can't be tried go by their class.

    Returns:
        The blocks by name, in the order of the model, each with its shortcut.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16)
        >>> model = nn.Sequential(nn.Linear(4, 8), layer, nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
        >>> list(residual_blocks(model))
        ['1']
    """
    training = {module: module.training for module in model.modules()}
    try:
        for module in training:  # not by eval(), which models override
            module.training = False
        tried = {name: (m, _try(m)) for name, m in _candidates(model, pattern)}
    finally:
        for module, mode in training.items():
            module.training = mode
    alike = {type(m): shortcut for m, shortcut in tried.values() if shortcut}
    for name, (m, shortcut) in tried.items():
        if shortcut is None:  # it takes other arguments, or a size that is fixed
            fallback = Shortcut(False, False, None) if pattern is not None else None
            tried[name] = m, alike.get(type(m), fallback)
    found = {name: (m, shortcut) for name, (m, shortcut) in tried.items() if shortcut}
    if pattern is not None:
        return found
    return {n: b for n, b in found.items() if not any(m.startswith(f"{n}.") for m in found)}


def _candidates(model: nn.Module, pattern: str | None) -> Iterator[tuple[str, nn.Module]]:
    parents, matched = {"": model}, ["."]  # no name begins with a dot
    for name, module in model.named_modules():
        parent = parents.get(name.rpartition(".")[0]) if name else None
        parents[name] = module
        if pattern is None:
            layered = len(list(module.children())) and any(p.dim() > 1 for p in module.parameters())
            if layered and isinstance(parent, nn.Sequential | nn.ModuleList):
                yield name, module
        elif not name.startswith(matched[-1]):
            kinds = [kind.__name__ for kind in type(module).__mro__]
            if fnmatch.fnmatchcase(name, pattern) or pattern in kinds:
                matched.append(f"{name}." if name else "")
                yield name, module


@torch.no_grad()
def _try(block: nn.Module) -> Shortcut | Literal[False] | None:
    """Return the shortcut of a block, False if it is not residual, None if it can't be tried."""
    judged: Literal[False] | None = None
    named = [*block.named_parameters(), *block.named_buffers()]
    neutral = {name: _neutral(name, tensor) for name, tensor in named}
    first = next((p for p in block.parameters() if p.numel() > 1), torch.empty(0))
    for width in dict.fromkeys((*first.shape[1:2], *first.shape[:1])):
        for shape in ((2, width, 8, 8), (2, 8, 8, width), (2, 4, width), (2, width, 8), (2, width)):
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(shape, generator=generator, device="cpu")
            x = F.layer_norm(x, shape[-1:])  # what a norm at the end of a block keeps
            written = x._version
            try:
                output = functional_call(block, neutral, (x,))
            except Exception:  # it takes inputs of another kind
                continue
            boxed = isinstance(output, tuple)
            y = output[0] if boxed and output else output
            if isinstance(y, Tensor) and y.isnan().any():  # a weight that is divided by its norm
                continue
            judged = False
            if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
                continue
            if x._version != written:  # in place: where it is kept, what it was added to is gone
                continue
            rest = output[1:] if boxed else ()
            beside = None if any(item is not None for item in rest) else rest
            for rectified, expected in ((False, x), (True, F.relu(x))):
                if torch.allclose(y, expected, rtol=1e-3, atol=1e-3):
                    return Shortcut(rectified, boxed, beside)
    return judged


def _neutral(name: str, tensor: Tensor) -> Any:
    if not tensor.is_floating_point():  # positions and the like
        return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor.cpu()
    scale = tensor.dim() < 2 and name.endswith(("weight", "running_var"))  # of a norm
    return torch.full((), float(scale), device="cpu").expand(tensor.shape)


def no_gradient(block: nn.Module, x: Tensor) -> Tensor:
    """Return a zero to add to ``x``; it gives the parameters of a skipped block gradients of zero.

    As if the branch had been weighted by zero. Without gradients optimizers would not decay the
    parameters, and data-parallel training would wait for them for ever.

    Args:
        block: The block that is not computed.
        x: Its input.

    Returns:
        A zero of the dtype and device of ``x``, shape ``()``.

    Example:
        >>> block, x = nn.Linear(2, 2), torch.ones(2)
        >>> (x + no_gradient(block, x)).sum().backward()
        >>> block.bias.grad
        tensor([0., 0.])
    """
    parameters = [p for p in block.parameters() if p.requires_grad]
    return _NoGradient.apply(x, *parameters)  # type: ignore[no-any-return]  # apply is untyped


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *(p.new_zeros(()).expand_as(p) for p in ctx.parameters)
