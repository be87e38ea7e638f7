"""What the adapter tells of itself; importing this imports no trainer."""

from mosaic_core.adapter import Adapter, Mode
from mosaic_core.algorithm import Need
from mosaic_core.plugins import hookimpl

SCALED = frozenset({Need.GRADIENTS, Need.SECOND_PASS})
"""What algorithms do not get where the loss, and so every gradient, is scaled."""

_STAGES = (0, 1, 2, 3)


def _bf16(stage: int) -> dict[str, str]:
    # Sums of gradients in float32 make ZeRO-1 another kind of optimizer, and are its usual form.
    return {"weights": "bf16", **({"sums": "fp32"} if stage == 1 else {})}


@hookimpl
def mosaic_adapter() -> Adapter:
    """Return the adapter of DeepSpeed."""
    modes = (
        *(Mode(f"ZeRO-{s}", options={"stage": s}) for s in _STAGES),
        *(Mode(f"ZeRO-{s}, accumulation", accumulate=4, options={"stage": s}) for s in _STAGES),
        *(Mode(f"ZeRO-{s}, accumulation of 2", accumulate=2, options={"stage": s}) for s in (2, 3)),
        *(Mode(f"ZeRO-{s}, autocast", precision="bf16", options={"stage": s}) for s in _STAGES),
        *(Mode(f"ZeRO-{s}, bf16", options={"stage": s, **_bf16(s)}) for s in _STAGES),
        *(
            Mode(f"ZeRO-{s}, fp16", SCALED, options={"stage": s, "weights": "fp16"})
            for s in _STAGES[1:]
        ),
        *(
            Mode(f"ZeRO-{s}, two processes", processes=2, accumulate=2, options={"stage": s})
            for s in _STAGES
        ),
    )
    return Adapter(
        name="deepspeed",
        title="DeepSpeed",
        # ZeRO gives the optimizer flat partitions, in which its groups can't be told apart.
        delivers=frozenset(Need) - {Need.OPTIMIZER},
        trainers=("deepspeed",),
        trainer="mosaic_deepspeed._workload:train",
        overhead="mosaic_deepspeed._workload:overhead",
        modes=modes,
    )
