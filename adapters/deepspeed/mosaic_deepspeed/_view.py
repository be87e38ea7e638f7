"""What the views of the parameters of an engine share."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mosaic_core import UnsupportedError
from mosaic_core.parameters import Fragment

__all__ = ["View"]


class View:
    """What the views share: fragments in the order of the model, gradients as float32."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._optimizer = engine, engine.optimizer
        self._fragments: tuple[Fragment, ...] = ()
        self._places: dict[str, Any] = {}  # where the gradient of a fragment is found

    def start(self) -> None:
        """Read the layout; what the optimizer holds may have been replaced by a checkpoint."""
        named = self._engine.module.named_parameters()
        names = {id(param): (i, name) for i, (name, param) in enumerate(named)}
        found: list[tuple[int, Fragment]] = []
        self._places = {}
        for param, start, numel, flat, place in self._layout():
            order, name = names[id(param)]
            shape = tuple(getattr(param, "ds_shape", param.shape))
            master = flat.detach()
            if master.dtype != torch.float32:
                raise UnsupportedError(
                    f"mosaic: the master weights must be float32, got {master.dtype} for {name!r};"
                    " leave them to DeepSpeed's default"
                )
            if numel == torch.Size(shape).numel():
                master = master.view(shape)
            found.append((order, Fragment(name, param, shape, start, numel, master)))
            self._places[name] = place
        self._fragments = tuple(f for _, f in sorted(found, key=lambda pair: pair[0]))

    def fragments(self) -> Iterable[Fragment]:
        """Return the fragments this rank owns."""
        return self._fragments

    def grad(self, fragment: Fragment) -> Tensor | None:
        """Return the gradient in float32; where it is kept in bfloat16, this is a copy."""
        tile = self._tile(fragment)
        return None if tile is None else tile.detach().float().reshape(fragment.master.shape)

    @torch.no_grad()
    def set_grad(self, fragment: Fragment, grad: Tensor) -> None:
        """Write a gradient, in the precision in which the engine keeps it.

        Raises:
            RuntimeError: If the parameter has none now.
        """
        tile = self._tile(fragment)
        if tile is None:
            raise RuntimeError(
                f"mosaic: {fragment.name!r} has no gradient to replace; gradients exist between"
                " engine.backward and engine.step of a full window"
            )
        tile.copy_(grad.reshape(tile.shape))

    def all_reduce(self, value: Tensor) -> Tensor:
        """Sum a value over the ranks."""
        value = value.to(self._engine.device)
        torch.distributed.all_reduce(value)
        return value

    def _layout(self) -> Iterator[tuple[nn.Parameter, int, int, Tensor, Any]]:
        """Yield parameter, first element, number of elements, master weights, place of grad."""
        raise NotImplementedError

    def _tile(self, fragment: Fragment) -> Tensor | None:
        raise NotImplementedError
