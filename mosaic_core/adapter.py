"""What an adapter tells of itself, without its trainer being imported."""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mosaic_core.algorithm import Algorithm, Need
from mosaic_core.errors import UnsupportedError
from mosaic_core.recipe import Recipe

__all__ = ["Adapter"]


@dataclass(frozen=True)
class Adapter:
    """One trainer's adapter, as its plugin describes it.

    Attributes:
        name: Name on the command line, one word in lower case.
        title: Name in tables.
        delivers: What it gives algorithms.
        trainers: Distributions of which at least one is needed.
        trainer: ``"module:function"`` that trains a workload with the trainer; see
            :mod:`mosaic_core.workloads`.
        overhead: ``"module:function"`` that returns the callables to time for
            ``mosaic bench overhead``.
    """

    name: str
    title: str
    delivers: frozenset[Need]
    trainers: tuple[str, ...]
    trainer: str
    overhead: str

    def supports(self, algorithm: "type[Algorithm]") -> bool:
        """Tell whether it delivers all that an algorithm needs."""
        return algorithm.needs() <= self.delivers

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe with an algorithm that needs what is not delivered.

        Raises:
            UnsupportedError: Naming the algorithm and what is missing.
        """
        for algorithm in recipe:
            missing = sorted(algorithm.needs() - self.delivers)
            if missing:
                raise UnsupportedError(
                    f"mosaic: {algorithm.name} needs {' and '.join(missing)}, which the adapter for"
                    f" {self.title} does not deliver; take it out of the recipe, or use a plain"
                    " loop with mosaic_core.Run"
                )

    def load(self, what: str) -> Callable[..., Any]:
        """Import and return ``"trainer"`` or ``"overhead"``."""
        function: Callable[..., Any] = pkgutil.resolve_name(getattr(self, what))
        return function
