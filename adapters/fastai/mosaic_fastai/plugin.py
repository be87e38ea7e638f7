"""What the adapter tells of itself; importing this imports no trainer."""

from mosaic_core.adapter import Adapter, Mode
from mosaic_core.algorithm import Need
from mosaic_core.plugins import hookimpl


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
        modes=(
            Mode("fp32"),
            Mode("accumulation", accumulate=4),
            Mode("bf16", precision="bf16"),
            Mode("fp16", precision="fp16"),
            Mode("two processes", processes=2, accumulate=2),
        ),
    )
