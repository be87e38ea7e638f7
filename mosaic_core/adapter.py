"""What an adapter tells of itself, without its trainer being imported."""

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mosaic_core.algorithm import Algorithm, Need
from mosaic_core.errors import UnsupportedError
from mosaic_core.recipe import Recipe

__all__ = ["Adapter", "Mode", "Precision"]

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Mode:
    """One way to train with a trainer: a column of the capability matrix.

    The adapter contract suite trains every algorithm in every mode an adapter lists, so the
    matrix says what was proved: an algorithm all of whose needs are delivered gives the weights
    of the plain loop, any other is refused before the first step.

    Attributes:
        name: Title of the column, such as ``"bf16"`` or ``"ZeRO-3"``.
        withheld: What algorithms do not get in this mode.
        accumulate: Micro-batches in a window.
        precision: Computation dtype: ``"bf16"`` and ``"fp16"`` are autocast, with a gradient scaler
            for ``"fp16"``.
        processes: Number of processes that train together.
        options: What else the adapter's test session needs to know, such as a ZeRO stage.
    """

    name: str
    withheld: frozenset[Need] = frozenset()
    accumulate: int = 1
    precision: Precision = "fp32"
    processes: int = 1
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Adapter:
    """One trainer's adapter, as its plugin describes it.

    Attributes:
        name: Name on the command line, one word in lower case.
        title: Name in tables.
        delivers: What it gives algorithms.
        trainers: Distributions of which at least one is needed.
        trainer: ``"module:function"`` that trains a workload with the trainer; see
            :class:`mosaic_core.training.Train`.
        overhead: ``"module:function"`` that times steps for ``mosaic bench overhead``; see
            :mod:`mosaic_core.bench.overhead`.
        modes: The ways to train that the contract suite proves, in the order of the columns.
        kernels: ``"module:function"`` that returns the trainer's own function for a task, for
            ``mosaic bench kernels``; see :mod:`mosaic_core.bench.kernels`. None where it has none.
        precedence: The lowest among the installed ones is used where a person names none.
    """

    name: str
    title: str
    delivers: frozenset[Need]
    trainers: tuple[str, ...]
    trainer: str
    overhead: str
    modes: tuple[Mode, ...] = (Mode("fp32"),)
    precedence: int = 50
    kernels: str | None = None

    def supports(self, algorithm: "type[Algorithm]", mode: Mode | None = None) -> bool:
        """Tell whether it delivers all that an algorithm needs, in some mode or in one."""
        return not self.missing(algorithm, mode)

    def missing(self, algorithm: "type[Algorithm]", mode: Mode | None = None) -> tuple[Need, ...]:
        """Return what an algorithm needs and does not get, in any mode or in one."""
        withheld = frozenset() if mode is None else mode.withheld
        return tuple(sorted(algorithm.needs() - (self.delivers - withheld)))

    def check(self, recipe: Recipe, mode: Mode | None = None) -> None:
        """Refuse a recipe with an algorithm that needs what is not delivered.

        Args:
            recipe: The recipe.
            mode: The way to train, where it withholds something.

        Raises:
            UnsupportedError: Naming the algorithm and what is missing.
        """
        where = "" if mode is None else f" in the mode {mode.name}"
        for algorithm in recipe:
            missing = self.missing(type(algorithm), mode)
            if missing:
                raise UnsupportedError(
                    f"mosaic: {algorithm.name} needs {' and '.join(missing)}, which the adapter for"
                    f" {self.title} does not deliver{where}; take it out of the recipe, or use a"
                    " plain loop with mosaic_core.Run"
                )

    def load(self, what: str) -> Callable[..., Any]:
        """Import and return ``"trainer"``, ``"overhead"`` or ``"kernels"``."""
        function: Callable[..., Any] = pkgutil.resolve_name(getattr(self, what))
        return function
