"""The models of the shipped workloads: small ones of the kinds that people train."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GPT", "ResNet", "ViT"]


class ResNet(nn.Sequential):
    """A small residual network that halves the image with each stage after the first.

    Args:
        channels: Channels of the images.
        classes: Number of classes.
        widths: Channels of each stage.
    """

    def __init__(
        self, channels: int = 1, classes: int = 10, widths: tuple[int, ...] = (16, 32, 64)
    ) -> None:
        stages = [_Block(widths[0], widths[0], stride=1)]
        stages += [_Block(n, m, 2) for n, m in itertools.pairwise(widths)]
        super().__init__(
            _convolution(channels, widths[0], 3, 1),
            nn.ReLU(),
            *stages,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(widths[-1], classes),
        )


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(inputs, outputs, 3, stride),
            nn.ReLU(),
            _convolution(outputs, outputs, 3, 1),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class ViT(nn.Module):
    """A small vision transformer: attention among patches, whose mean is classified.

    Args:
        channels: Channels of the images.
        size: Height and width of the images.
        patch: Height and width of a patch; divides ``size``.
        classes: Number of classes.
        width: Channels of a patch inside.
        depth: Number of blocks.
        heads: Attention heads of a block.
    """

    def __init__(
        self,
        channels: int = 1,
        size: int = 28,
        patch: int = 4,
        classes: int = 10,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(_Layer(width, heads, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, C, H, W)`` to logits ``(N, classes)``."""
        tokens: Tensor = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


class GPT(nn.Module):
    """A small decoder: every position attends to those before it and predicts the next token.

    Args:
        tokens: Size of the vocabulary.
        length: Longest sequence.
        width: Channels of a token inside.
        depth: Number of blocks.
        heads: Attention heads of a block.
    """

    def __init__(
        self,
        tokens: int = 256,
        length: int = 128,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, length, width))
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(_Layer(width, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens, int64 ``(N, T)``, to logits ``(N, tokens, T)``.

        The classes come second, where torch's losses look for them: labels are ``(N, T)``.
        """
        inside = self.embedding(x) + self.positions[:, : x.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(inside)))
        return logits.transpose(1, 2)


class _Layer(nn.Module):
    """Attention, then two linear maps, each normalised before and added to its input."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.body = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        projected = self.queries_keys_values(self.norm(x))
        parts = projected.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)  # (N, heads, T, width / heads) each
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.body(x)
        return out
