"""The loss of each example of a micro-batch, before it is trained on."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaic_core.errors import UnsupportedError
from mosaic_core.mixture import Mixture, Receipt
from mosaic_core.target import MixedTarget
from mosaic_core.untraced import Untraced

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["example_losses"]


@torch.no_grad()
def example_losses(run: "Run", input: Tensor, labels: Mixture) -> Tensor:
    """Return the loss of each example of the micro-batch that is being transformed.

    It is the trainer's own loss where ``run.forward`` computes one, as a mean over the labels that
    count in an example. Where the loss lies in a loop, cross entropy with class indices takes its
    place. The model runs as in training; batch-norm statistics and random streams stay.

    Args:
        run: The run, inside an algorithm's ``on_batch``.
        input: Input of the micro-batch, perhaps a smaller view of it, shape ``(N, ...)``.
        labels: Its labels.

    Returns:
        Shape ``(N,)``.

    Raises:
        UnsupportedError: If the losses of single examples are not to be had.
    """
    receipt = Receipt(elements=[])
    target = MixedTarget.of(replace(labels, receipt=receipt))
    changed = {} if input is run.locator.read(run.whole, "input") else {"input": input}
    batch = run.locator.write(run.whole, {**changed, "target": target})
    mixture, run.mixture = run.mixture, None  # that of the last micro-batch
    with Untraced(run.model):
        output = run.forward(batch)
    run.mixture = mixture
    if not receipt.elements and _are_classes(output, labels.label):  # the loss lies in a loop
        F.cross_entropy(output, target)
    examples = len(input)
    if not receipt.elements or any(loss.numel() % examples for loss, _ in receipt.elements):
        raise UnsupportedError(
            "mosaic: the losses of single examples are not to be had, because forward computed no"
            " loss that mosaic knows, or one that mixes examples; use F.cross_entropy, or make the"
            " loss known with mosaic_core.register_loss; in a plain loop, give Run a forward that"
            " computes it, unless the model returns logits (N, C, ...) for classes (N, ...)"
        )
    total = torch.zeros(examples, device=input.device)
    for loss, counted in receipt.elements:
        rows = loss.reshape(examples, -1)
        total += rows.sum(1) / counted.reshape(examples, -1).sum(1).clamp_min(1)
    return total


def _are_classes(output: object, label: Tensor) -> bool:
    """Tell whether a model returned logits, of two classes at least, for class indices."""
    if not isinstance(output, Tensor) or output.dim() < 2 or label.is_floating_point():
        return False
    return output.shape[1] > 1 and output.shape[:1] + output.shape[2:] == label.shape
