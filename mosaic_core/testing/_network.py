"""The network and the data that the contract suites train on."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

__all__ = ["examples", "network"]


def network() -> nn.Module:
    """Return a small convolutional network with batch norm, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # No bias before a batch norm: its gradient is rounding noise, which Adam scales up.
        return nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(3, 16, 3, padding=1, bias=False),
                norm1=nn.BatchNorm2d(16),
                relu1=nn.ReLU(),
                pool=nn.MaxPool2d(2),
                conv2=nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False),
                norm2=nn.BatchNorm2d(16),
                relu2=nn.ReLU(),
                flatten=nn.Flatten(),
                drop=nn.Dropout(0.0),  # for algorithms that look for one
                head=nn.Linear(64, 5),
            )
        )


def examples(index: int, count: int = 8) -> tuple[Tensor, Tensor]:
    """Return images and their classes, the same for the same index."""
    g = torch.Generator().manual_seed(index)
    return torch.randn(count, 3, 8, 8, generator=g), torch.randint(5, (count,), generator=g)
