"""What the adapter tells of itself; importing this imports no trainer."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mosaic_core.adapter import Adapter, Mode
from mosaic_core.algorithm import Need
from mosaic_core.plugins import hookimpl

if TYPE_CHECKING:
    from torch import nn

    from mosaic_core.datasets import Data
    from mosaic_core.workloads import Workload

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
            Mode("DeepSpeed ZeRO-2, accumulation of 2", _ZERO, accumulate=2, options={"stage": 2}),
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


@hookimpl
def mosaic_workloads() -> "Sequence[Workload]":
    """Return the workload that fine-tunes a transformer."""
    from mosaic_core.workloads import Workload

    return [
        Workload(
            name="reuters-r8",
            title="5,485 news stories of 8 topics with a pretrained transformer, 2,189 to evaluate",
            load=_reuters,
            model=_classifier,
            batch_size=32,
            epochs=2,
            seeds=1,
            evaluations=3,  # of 171 steps
            learning_rate=1e-4,
            weight_decay=0.01,
            adam=True,
        )
    ]


def _reuters(data_dir: Path | None) -> "Data":
    from mosaic_hf._reuters import load

    return load(data_dir)


def _classifier() -> "nn.Module":
    from mosaic_hf._reuters import Classifier

    return Classifier()
