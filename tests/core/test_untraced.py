"""A forward pass that leaves no trace in buffers and random streams."""

import pytest
import torch
from torch import nn

from mosaic_core.untraced import Untraced


class Replaces(nn.Module):
    """Gives its buffer another tensor in forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + 1
        return x


def make_model():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), Replaces())


@pytest.mark.parametrize("later", [False, True])
def test_buffers_and_streams_are_put_back(later):
    model = make_model()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    count, stream = model[3].count, torch.get_rng_state()
    if later:
        untraced = Untraced(model)
        model(torch.randn(5, 3))
        untraced.restore()
    else:
        with Untraced(model):
            model(torch.randn(5, 3))
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert model[3].count is count  # what others refer to


def test_they_are_put_back_after_an_exception():
    model, before = make_model(), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), Untraced(model):
        model(torch.dropout(torch.randn(5, 7), 0.5, True))
    assert torch.equal(torch.get_rng_state(), before)
    assert model[1].num_batches_tracked == 0
