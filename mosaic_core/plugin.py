"""What mosaic-core itself brings, through the same door as everybody else's plugin."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mosaic_core import algorithms
from mosaic_core.algorithm import Algorithm
from mosaic_core.plugins import hookimpl

if TYPE_CHECKING:
    from mosaic_core.workloads import Workload

__all__ = ["mosaic_algorithms", "mosaic_recipes", "mosaic_workloads"]


@hookimpl
def mosaic_algorithms() -> Sequence[type[Algorithm]]:
    """Return the algorithms of :mod:`mosaic_core.algorithms`."""
    return [
        value
        for value in vars(algorithms).values()
        if isinstance(value, type) and issubclass(value, Algorithm)
    ]


@hookimpl
def mosaic_recipes() -> Mapping[str, Sequence[Algorithm]]:
    """Return the empty recipe and the one of the demo."""
    from mosaic_core.workloads import DEMO_RECIPE

    return {"none": [], "demo": DEMO_RECIPE}


@hookimpl
def mosaic_workloads() -> "Sequence[Workload]":
    """Return the workloads that are shipped."""
    from mosaic_core.workloads import WORKLOADS

    return WORKLOADS
