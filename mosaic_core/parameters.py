"""One view of parameters, gradients and master weights that hides how a trainer shards them.

Algorithms on gradients and weights see fragments: the slices of parameters that this rank owns.
Replicated training (one process, DDP) owns every parameter whole; an adapter of a sharded engine
brings a view of its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from mosaic_core.errors import UnsupportedError

__all__ = ["Fragment", "Parameters", "ReplicatedParameters", "replicated_parameters"]


@dataclass(frozen=True)
class Fragment:
    """Elements ``[start, start + numel)`` of a flattened parameter, as this rank owns them.

    Attributes:
        name: Name of the parameter in the model.
        param: The parameter that forward uses.
        shape: Shape of the whole parameter.
        start: First element owned.
        numel: Number of elements owned.
        master: The weights the optimizer updates, to change under ``no_grad``. A parameter that
            is owned whole keeps its shape, a slice has shape ``(numel,)``; gradients have the same
            shape.
    """

    name: str
    param: nn.Parameter
    shape: tuple[int, ...]
    start: int
    numel: int
    master: Tensor


class Parameters(Protocol):
    """What algorithms on gradients and weights may do, whatever the sharding."""

    def start(self) -> None:
        """Read the layout; called when training starts, again when it goes on."""

    def fragments(self) -> Iterable[Fragment]:
        """Return the fragments this rank owns, in the order of the model's parameters."""

    def grad(self, fragment: Fragment) -> Tensor | None:
        """Return the reduced gradient of a fragment, shaped like its master, or None."""

    def set_grad(self, fragment: Fragment, grad: Tensor) -> None:
        """Replace the gradient of a fragment."""

    def drop_grads(self) -> None:
        """Forget all gradients."""

    def all_reduce(self, value: Tensor) -> Tensor:
        """Sum a value over the ranks that own different fragments."""

    def publish(self) -> None:
        """Bring changed master weights to the weights that forward uses."""


class ReplicatedParameters:
    """The view of one process and of DDP: every rank owns every parameter whole."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._fragments: tuple[Fragment, ...] = ()

    def start(self) -> None:
        """List the parameters once, as walking the modules at every step would cost."""
        self._fragments = tuple(
            Fragment(name, param, tuple(param.shape), 0, param.numel(), param)
            for name, param in self._model.named_parameters()
        )

    def fragments(self) -> Iterable[Fragment]:
        """Return one fragment a parameter."""
        return self._fragments

    def grad(self, fragment: Fragment) -> Tensor | None:
        """Return the gradient itself; a change in place is a change of the gradient."""
        return fragment.param.grad

    def set_grad(self, fragment: Fragment, grad: Tensor) -> None:
        """Take a gradient over."""
        fragment.param.grad = grad

    def drop_grads(self) -> None:
        """Set all gradients to None."""
        for param in self._model.parameters():
            param.grad = None

    def all_reduce(self, value: Tensor) -> Tensor:
        """Return the value: DDP has reduced the gradients, and no rank owns a part."""
        return value

    def publish(self) -> None:
        """Do nothing: the master weights are the weights."""


def replicated_parameters(model: nn.Module) -> ReplicatedParameters:
    """Return the view of a model whose parameters every rank owns whole.

    Raises:
        UnsupportedError: If a parameter is sharded, which needs a view by the adapter.
    """
    for name, param in model.named_parameters():
        if hasattr(param, "device_mesh") or hasattr(param, "ds_id"):
            raise UnsupportedError(
                f"mosaic: parameter {name!r} is sharded ({type(param).__name__}) and this trainer's"
                " adapter brings no view of sharded parameters; use one process or DDP"
            )
    return ReplicatedParameters(model)
