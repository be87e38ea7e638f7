"""What the adapter tells of itself; importing this imports no trainer."""

from mosaic_core.adapter import Adapter, Mode
from mosaic_core.algorithm import Need
from mosaic_core.plugins import hookimpl


@hookimpl
def mosaic_adapter() -> Adapter:
    """Return the adapter of Hugging Face."""
    return Adapter(
        name="hf",
        title="Hugging Face",
        delivers=frozenset(Need),
        trainers=("transformers",),
        trainer="mosaic_hf._workload:train",
        overhead="mosaic_hf._workload:overhead",
        modes=(
            Mode("fp32"),
            Mode("accumulation", accumulate=4),
            Mode("bf16", precision="bf16"),
            Mode("fp16", precision="fp16"),
            Mode("two processes", processes=2, accumulate=2),
        ),
    )
