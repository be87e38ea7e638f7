"""The mixture of labels: what mixing, smoothing and weighting of examples do to the target.

MixUp, CutMix, LabelSmoothing and the like all turn the label of an example into a distribution.
That distribution is one value here, a :class:`Mixture`, so that they compose in any order; what
it means for a loss is defined once, in :mod:`mosaic_core.losses`. How it travels to the user's own
loss is the matter of :mod:`mosaic_core.target`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Mixture", "Receipt", "align", "compose"]


@dataclass
class Receipt:
    """Whether a loss has computed the mixture, shared by all views of one target.

    Attributes:
        consumed: Whether one has.
        values: What the losses returned, in a list, if somebody wants to know.
        elements: The losses without their reduction, each with the number of labels that count
            in every element, in a list, if somebody wants to know.
    """

    consumed: bool = False
    values: list[Tensor] | None = None
    elements: list[tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True)
class Mixture:
    """A target ``(1 - smoothing) * sum_k weight_k * label_k + smoothing * uniform``.

    Attributes:
        components: Pairs of label and weight. Labels are what the loss takes: class indices
            ``(N, ...)`` or dense targets. A weight is None for 1, or a float tensor of shape
            ``()`` or one that broadcasts against the labels from the left, such as ``(N,)``.
        smoothing: Share of the uniform distribution over the classes, in [0, 1].
        receipt: Marked when a loss has computed the mixture.
    """

    components: tuple[tuple[Tensor, Tensor | None], ...]
    smoothing: float = 0.0
    receipt: Receipt = field(default_factory=Receipt)

    @classmethod
    def of(cls, label: Tensor) -> "Mixture":
        """Return the mixture of one label per example and nothing else."""
        return cls(((label, None),))

    @property
    def label(self) -> Tensor:
        """The label of the first component: the example's own."""
        return self.components[0][0]

    @property
    def trivial(self) -> bool:
        """Whether it is the plain label."""
        return not self.smoothing and len(self.components) == 1 and self.components[0][1] is None

    # What algorithms do to it: each returns a new mixture.

    def mix(self, indices: Tensor, mixing: Tensor) -> "Mixture":
        """Blend every example's target with that of its partner.

        Args:
            indices: Partner of each example, int64, shape ``(N,)``.
            mixing: Weight of the partner, in [0, 1], shape ``()`` or ``(N,)``.
        """
        own = tuple((label, _times(1 - mixing, weight)) for label, weight in self.components)
        partner = tuple(
            (label[indices], _times(mixing, _select(weight, indices)))
            for label, weight in self.components
        )
        return replace(self, components=own + partner)

    def smooth(self, smoothing: float) -> "Mixture":
        """Move a share of the target to the uniform distribution over the classes."""
        # Written out: dataclasses.replace takes three times as long.
        return Mixture(self.components, compose(self.smoothing, smoothing), self.receipt)

    def weighted(self, weights: Tensor) -> "Mixture":
        """Weight the examples, shape ``(N,)``: a mean becomes the weighted mean."""
        weighted = ((label, _times(weights, weight)) for label, weight in self.components)
        return replace(self, components=tuple(weighted))

    def select(self, indices: Tensor) -> "Mixture":
        """Keep some of the examples, by index or mask of shape ``(N,)``."""
        kept = ((label[indices], _select(weight, indices)) for label, weight in self.components)
        return replace(self, components=tuple(kept))

    def map(self, function: Callable[[Tensor], Any]) -> "Mixture":
        """Apply one reshaping, indexing or moving operation to all labels and their weights."""
        return replace(
            self,
            components=tuple(
                (function(label), _map_weight(function, label, weight))
                for label, weight in self.components
            ),
        )

    # What it is.

    def dense(self, num_classes: int) -> Tensor:
        """Return the distribution, float32, shape ``(N, C, ...)``; for inspection, not training.

        Args:
            num_classes: Number C of classes.
        """
        total = torch.zeros(())
        for label, weight in self.components:
            one_hot = label
            if not label.is_floating_point():
                one_hot = F.one_hot(label, num_classes).movedim(-1, 1).float()
            total = total + (one_hot if weight is None else align(weight, one_hot) * one_hot)
        return total * (1 - self.smoothing) + self.smoothing / num_classes


def compose(first: float, second: float) -> float:
    """Return the smoothing that two of them in a row make: ``1 - (1 - first) * (1 - second)``."""
    if not first or not second:  # to the bit the one that is given
        return first or second
    return 1 - (1 - first) * (1 - second)


def _times(a: Tensor, b: Tensor | None) -> Tensor:
    if b is None:
        return a
    return a * b if a.dim() == 0 else align(a, b) * align(b, a)


def align(weight: Tensor, like: Tensor) -> Tensor:
    """Append dimensions of size 1, so that a weight broadcasts from the left."""
    return weight.reshape(weight.shape + (1,) * max(0, like.dim() - weight.dim()))


def _select(weight: Tensor | None, indices: Tensor) -> Tensor | None:
    return weight if weight is None or weight.dim() == 0 else weight[indices]


def _map_weight(
    function: Callable[[Tensor], Any], label: Tensor, weight: Tensor | None
) -> Tensor | None:
    if weight is None or weight.dim() == 0:
        return weight
    weight = align(weight, label).expand_as(label)
    moved: Tensor = function(weight)
    # A change of dtype is meant for the label: the weight keeps its precision.
    return moved if moved.dtype == weight.dtype else weight.to(moved.device)
