"""What the adapter contract suite looks at, and how it compares."""

import hashlib
import os
import signal
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaic_core.adapter import Mode

__all__ = [
    "Kill",
    "Watch",
    "attributes",
    "average_gradients",
    "by_hand",
    "copied",
    "digest",
    "first_layer",
    "interpolated",
    "ranks",
]


def by_hand(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the cross entropy of plain labels with operations that no carrier knows."""
    one_hot = F.one_hot(target, logits.shape[1])
    return -(one_hot * logits.log_softmax(1)).sum(1).mean()


def interpolated(logits: Tensor, target: Any) -> Tensor:
    """Compute the same of a mixture, once per component."""
    target.mixture.receipt.consumed = True
    parts = [weight * by_hand(logits, label) for label, weight in target.mixture.components]
    return torch.stack(parts).sum()


class Watch:
    """A forward hook that notes what a module sees in evaluation."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, module: Any, args: tuple[Tensor, ...], output: Any) -> None:
        if not module.training:
            self.seen.append((args[0].detach().clone(), module.weight.detach().clone()))


class Kill:
    """A forward hook that kills the process at its n-th call for training."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.left -= module.training
        if self.left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)


def first_layer(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the first layer of the network inside a wrapped model, which every forward runs."""
    return next((n, m) for n, m in model.named_modules() if n.split(".")[-1] == "conv1")


def copied(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def attributes(item: Any) -> dict[str, str]:
    """Describe the callables that hang on an instance, which a shadow would be among."""
    hooks = {
        name: str(len(value))
        for name, value in vars(item).items()
        if name.endswith("_hooks") and value and name not in _KEPT
    }
    shadows = {
        name: getattr(value, "__qualname__", type(value).__qualname__)
        for name, value in vars(item).items()
        if callable(value) and not isinstance(value, nn.Module | type)
    }
    return {f"{type(item).__name__}.{name}": value for name, value in {**hooks, **shadows}.items()}


_KEPT = {"_load_state_dict_pre_hooks"}  # so that a changed model goes on loading its checkpoints


def ranks(mode: Mode) -> dict[str, Any]:
    if mode.processes == 1:
        return {}
    if not torch.distributed.is_initialized():  # where the trainer has ended it
        torch.distributed.init_process_group("gloo")
    return {"rank": torch.distributed.get_rank(), "world_size": mode.processes}


def average_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= torch.distributed.get_world_size()
