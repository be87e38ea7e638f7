"""LabelSmoothing: move a share of every target to the uniform distribution."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mosaic_core.algorithm import Algorithm, Card, Place
from mosaic_core.batch import Batch

if TYPE_CHECKING:
    from mosaic_core.run import Run

__all__ = ["LabelSmoothing", "smooth_labels"]


def smooth_labels(logits: Tensor, target: Tensor, smoothing: float = 0.1) -> Tensor:
    """Return dense targets ``(1 - smoothing) * one_hot(target) + smoothing / C``.

    For a loss of your own. ``F.cross_entropy(logits, target, label_smoothing=smoothing)`` computes
    the same loss without the dense tensor, and is what :class:`LabelSmoothing` uses.

    Args:
        logits: Output of the model, shape ``(N, C, ...)``; gives C, dtype and device.
        target: Class indices, int64, shape ``(N, ...)``, or dense targets of the shape of
            ``logits``.
        smoothing: Share of the uniform distribution, in [0, 1].

    Returns:
        A new tensor with the shape and dtype of ``logits``.

    Raises:
        ValueError: If ``smoothing`` is out of range, or the shapes do not fit, or a class index
            does not exist; ``-100`` has no dense counterpart.

    Example:
        >>> smooth_labels(torch.zeros(1, 4), torch.tensor([2]), smoothing=0.2)
        tensor([[0.0500, 0.0500, 0.8500, 0.0500]])

    References:
        Szegedy et al., `Rethinking the Inception Architecture for Computer Vision
        <https://arxiv.org/abs/1512.00567>`_, 2016, section 7.
    """
    _check_smoothing("smooth_labels", smoothing)
    classes = logits.shape[1]
    if target.shape == logits.shape:
        return target.to(logits.dtype) * (1 - smoothing) + smoothing / classes
    if target.shape == logits.shape[:1] + logits.shape[2:] and not target.is_floating_point():
        low, high = map(int, target.aminmax()) if target.numel() else (0, 0)
        if low < 0 or high >= classes:
            raise ValueError(
                f"smooth_labels: target must hold classes in [0, {classes}), got [{low}, {high}];"
                " F.cross_entropy with label_smoothing ignores such labels"
            )
        dense = torch.full_like(logits, smoothing / classes)
        # Written once; the one-hot tensor of F.one_hot would be int64, of twice the size or more.
        return dense.scatter_(1, target.long().unsqueeze(1), 1 - smoothing + smoothing / classes)
    raise ValueError(
        "smooth_labels: target must be class indices of shape (N, ...) or dense of the shape of"
        f" logits, {tuple(logits.shape)}, got {target.dtype} {tuple(target.shape)}"
    )


def _check_smoothing(where: str, smoothing: float) -> None:
    if not 0 <= smoothing <= 1:
        raise ValueError(f"{where}: smoothing must be in [0, 1], got {smoothing}")


@dataclass(frozen=True)
class LabelSmoothing(Algorithm):
    """Move a share of every target to the uniform distribution over the classes.

    Args:
        smoothing: The share, in [0, 1].

    Raises:
        ValueError: If ``smoothing`` is out of range.
    """

    smoothing: float = 0.1

    place = Place.SMOOTHING
    changes_labels = True
    excludes = frozenset({"trainer label smoothing"})
    card = Card(
        category="any",
        summary="Moves a share of every target to the uniform distribution over the classes.",
        effect="The fused label_smoothing of F.cross_entropy: no dense target is allocated. Ignored"
        " labels stay ignored and class weights keep torch's meaning; training loss is higher.",
        use_when="Classification with many epochs or noisy labels; not where the probabilities are"
        " distilled or calibrated afterwards.",
        interactions="Composes with mixing in any order; a label_smoothing of the loss itself"
        " composes with it, it does not replace it.",
        reference="Szegedy et al. 2016",
        url="https://arxiv.org/abs/1512.00567",
    )

    def __post_init__(self) -> None:
        """Check the settings."""
        _check_smoothing("LabelSmoothing", self.smoothing)

    def on_batch(self, batch: Batch, run: "Run") -> Batch:
        """Smooth the labels; the loss does the work."""
        return batch.replace(labels=batch.labels.smooth(self.smoothing))
