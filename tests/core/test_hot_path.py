"""No step of an algorithm waits for the device.

On the device ``meta`` tensors have no values, so reading one is an error, as is mixing devices.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mosaic_core import Run, plugins
from mosaic_core.testing._network import network

EXAMPLES = {name: cls.example() for name, cls in sorted(plugins.algorithms().items())}
del EXAMPLES["Factorize"]  # it reads the weights once, before the first step


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # meta has none


@pytest.mark.parametrize("name", EXAMPLES)
def test_steps_read_nothing_from_the_device(name):
    model = network().to("meta")
    model.relu2 = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(2))  # images of any size
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = Run([EXAMPLES[name]], model=model, optimizer=optimizer, total_steps=6, steps_per_epoch=2)

    for _ in range(3):
        x = torch.ones(8, 3, 8, 8, device="meta")
        x, y = run.on_batch(x, torch.zeros(8, dtype=torch.int64, device="meta"))

        def forward_and_backward(x=x, y=y):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()

        forward_and_backward()
        run.step(forward_and_backward)


def test_a_read_is_found():
    with pytest.raises(RuntimeError, match="meta"):
        float(torch.ones((), device="meta"))
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(2, device="meta") + torch.ones(2)
