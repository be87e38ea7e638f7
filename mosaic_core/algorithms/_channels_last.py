"""ChannelsLast: keep images and convolutions in the memory layout that hardware prefers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from mosaic_core.algorithm import Algorithm, Card, Place
from mosaic_core.batch import Batch
from mosaic_core.surgery import warn_no_effect

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["ChannelsLast", "apply_channels_last"]


def apply_channels_last(model: nn.Module) -> list[str]:
    """Lay the 4-d weights of a model out channels last (NHWC), in place.

    Values, shapes, Parameter objects and names stay; only the strides change.

    Args:
        model: Model with convolutions.

    Returns:
        Names of the parameters and buffers that are 4-d.

    Warns:
        NoEffectWarning: If there is none.

    Example:
        >>> conv = nn.Conv2d(8, 8, 3)
        >>> apply_channels_last(conv)
        ['weight']
        >>> conv.weight.is_contiguous(memory_format=torch.channels_last)
        True

    References:
        `Channels last memory format in PyTorch
        <https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html>`_.
    """
    names = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
            names.append(name)
    if not names:
        warn_no_effect("apply_channels_last", "4-d weights")
    return names


@dataclass(frozen=True)
class ChannelsLast(Algorithm):
    """Keep the model and its image batches in the channels-last memory layout."""

    place = Place.LAYOUT
    card = Card(
        category="vision",
        summary="Keeps images and convolution weights in the channels-last memory layout.",
        effect="Same values in another order in memory; convolutions avoid transposes. The batch is"
        " copied once where the loader yields another layout.",
        use_when="Convolutional networks, most of all in bf16 or fp16 on tensor cores, and on CPUs;"
        " without effect where there are no convolutions.",
        interactions="Acts after mixing and resizing, so it sees the final batch. Rounding may"
        " differ in the last bit, as the kernels do.",
        reference="PyTorch 2020",
        url="https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html",
    )

    def prepare_model(self, model: nn.Module, run: "Run") -> None:
        """Lay the weights out; a checkpoint stays loadable anywhere."""
        names = apply_channels_last(model)
        run.report.notes.append(f"ChannelsLast laid out {len(names)} tensors channels last")

    def on_batch(self, batch: Batch, run: "Run") -> Batch:
        """Lay image batches out."""
        if batch.input.dim() != 4:
            return batch
        return batch.replace(batch.input.contiguous(memory_format=torch.channels_last))
