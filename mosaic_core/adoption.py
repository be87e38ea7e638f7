"""Which optimizer group the parameters that surgery makes belong to."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from mosaic_core.errors import UnsupportedError

__all__ = ["NewParameters"]


class NewParameters:
    """Parameters that surgery made, each with the one whose optimizer group it joins.

    An optimizer made after the surgery holds them already, in the groups its maker chose, and is
    left as it is. One made before gets them here, so weight decay and learning rates that differ
    between groups keep their meaning.
    """

    def __init__(self) -> None:
        self._joining: list[tuple[nn.Parameter, list[nn.Parameter], bool]] = []

    def add(self, new: Iterable[nn.Parameter], beside: nn.Parameter) -> None:
        """Let new parameters be trained in the group of one that stays."""
        self._joining.append((beside, list(new), False))

    def replace(self, old: nn.Parameter, new: Iterable[nn.Parameter]) -> None:
        """Let new parameters be trained in the place of one that is gone from the model."""
        self._joining.append((old, list(new), True))

    @property
    def replaced(self) -> set[int]:
        """The ``id`` of every parameter that is gone from the model."""
        return {id(host) for host, _, gone in self._joining if gone}

    @property
    def added(self) -> set[int]:
        """The ``id`` of every new parameter."""
        return {id(parameter) for _, new, _ in self._joining for parameter in new}

    def heirs(self, held: Iterable[nn.Parameter]) -> set[nn.Parameter]:
        """Return those that belong to the group of a parameter that an optimizer holds."""
        known = set(held)
        for host, new, _ in self._joining:
            if host in known:
                known.update(new)
        return known.difference(held)

    def join(self, optimizers: Sequence[Any]) -> None:
        """Put them into the groups of optimizers that do not hold them yet.

        Args:
            optimizers: All optimizers of the run, before their first step.

        Raises:
            UnsupportedError: If no optimizer holds a parameter that new ones are to join, unless
                they are frozen.
        """
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        held = {id(parameter) for group in groups for parameter in group["params"]}
        for host, new, gone in self._joining:
            missing = [parameter for parameter in new if id(parameter) not in held]
            group = next((g for g in groups if any(p is host for p in g["params"])), None)
            if group is None and any(parameter.requires_grad for parameter in missing):
                raise UnsupportedError(
                    "mosaic: the recipe made new parameters, and no optimizer trains the one they"
                    f" belong to, of shape {tuple(host.shape)}; make the optimizer after the"
                    " surgery, or from all parameters of the model"
                )
            if group is None:
                continue
            at = next(i for i, parameter in enumerate(group["params"]) if parameter is host)
            group["params"][at : at + 1] = [*([] if gone else [host]), *missing]
            held.update(map(id, missing))
            if gone:
                for optimizer in optimizers:
                    optimizer.state.pop(host, None)
