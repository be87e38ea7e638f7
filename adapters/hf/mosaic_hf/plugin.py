"""What the adapter tells of itself; importing this imports no trainer."""

from mosaic_core.adapter import Adapter, Mode
from mosaic_core.algorithm import Need
from mosaic_core.plugins import hookimpl

# ZeRO gives the optimizer flat partitions, in which its groups can't be told apart.
_ZERO = frozenset({Need.OPTIMIZER})
# With float16 weights the loss is scaled, and with it every gradient until inside the step.
_SCALED = _ZERO | {Need.GRADIENTS, Need.SECOND_PASS}


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
            *(
                Mode(f"DeepSpeed ZeRO-{s}", _ZERO, accumulate=4, options={"stage": s})
                for s in (0, 1, 2, 3)
            ),
            Mode("DeepSpeed ZeRO-2, bf16", _ZERO, options={"stage": 2, "weights": "bf16"}),
            Mode("DeepSpeed ZeRO-2, fp16", _SCALED, options={"stage": 2, "weights": "fp16"}),
            *(
                Mode(
                    f"DeepSpeed ZeRO-{s}, two processes",
                    _ZERO,
                    accumulate=2,
                    processes=2,
                    options={"stage": s},
                )
                for s in (2, 3)
            ),
        ),
    )
