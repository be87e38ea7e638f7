"""What the adapter tells of itself; importing this imports no trainer."""

from mosaic_core.adapter import Adapter, Mode
from mosaic_core.algorithm import Need
from mosaic_core.plugins import hookimpl

COUNTED = frozenset({Need.SELECTION})
"""What algorithms do not get with GradientAccumulation, which counts the examples of a window."""


@hookimpl
def mosaic_adapter() -> Adapter:
    """Return the adapter of fastai."""
    return Adapter(
        name="fastai",
        title="fastai",
        delivers=frozenset(Need),
        trainers=("fastai",),
        trainer="mosaic_fastai._workload:train",
        overhead="mosaic_fastai._workload:overhead",
        kernels="mosaic_fastai._kernels:peers",
        modes=(
            Mode("fp32"),
            Mode("accumulation", COUNTED, accumulate=4),
            Mode("bf16", precision="bf16"),
            Mode("fp16", precision="fp16"),
            Mode("two processes", COUNTED, processes=2, accumulate=2),
        ),
    )
