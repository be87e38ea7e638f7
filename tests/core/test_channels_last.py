"""ChannelsLast: another order in memory, everything else the same."""

import copy
import warnings

import pytest
import torch
from torch import nn

from mosaic_core import NoEffectWarning, Run
from mosaic_core.algorithms import ChannelsLast, LabelSmoothing, MixUp, apply_channels_last
from mosaic_core.target import MixedTarget

NHWC = torch.channels_last


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, groups=2),
        nn.Flatten(),
        nn.Linear(72, 4),
    )


def images(n=4):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def is_nhwc(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous(memory_format=NHWC) and not tensor.is_contiguous()


class TestFunction:
    def test_lays_out_4d_weights_only(self):
        model = network()
        model.register_buffer("table", torch.randn(2, 3, 4, 5))
        model.register_buffer("scalar", torch.zeros(()))
        values = {k: v.clone() for k, v in model.state_dict().items()}
        strides = {k: v.stride() for k, v in model.state_dict().items()}
        parameters = dict(model.named_parameters())
        assert apply_channels_last(model) == ["0.weight", "3.weight", "table"]
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, values[name])
            if tensor.dim() == 4:
                assert is_nhwc(tensor)
            else:
                assert tensor.stride() == strides[name]
        assert all(p is parameters[name] for name, p in model.named_parameters())

    def test_equals_torchs_own_way(self):
        model = network()
        other = copy.deepcopy(model).to(memory_format=NHWC)
        apply_channels_last(model)
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert a.stride() == b.stride()

    def test_output_and_gradients_are_the_same(self):
        model, x = network().double(), images().double()
        other = copy.deepcopy(model)
        apply_channels_last(model)
        y, expected = model(x.contiguous(memory_format=NHWC)), other(x)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        y.sum().backward()
        expected.sum().backward()
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)

    def test_optimizer_built_before_keeps_working(self):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        apply_channels_last(model)
        before = model[0].weight.detach().clone()
        model(images()).square().sum().backward()
        optimizer.step()
        assert not torch.equal(model[0].weight, before)
        assert is_nhwc(model[0].weight)

    def test_idempotent(self):
        model = network()
        names = apply_channels_last(model)
        places = [p.data_ptr() for p in model.parameters()]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert apply_channels_last(model) == names
        assert [p.data_ptr() for p in model.parameters()] == places

    def test_nothing_to_do(self):
        with pytest.warns(
            NoEffectWarning, match="apply_channels_last: the model has no 4-d weights"
        ):
            assert apply_channels_last(nn.Linear(2, 2)) == []


class TestInARun:
    def start(self, recipe, model=None):
        model = network() if model is None else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Run(recipe, model=model, optimizer=optimizer)

    def test_batches(self):
        run, x = self.start([ChannelsLast()]), images()
        before, y = x.clone(), torch.arange(4)
        laid_out, target = run.on_batch(x, y)
        assert is_nhwc(laid_out)
        assert torch.equal(laid_out, before)
        assert x.is_contiguous()
        assert target is y

    def test_a_batch_in_the_right_layout_is_not_copied(self):
        run, x = self.start([ChannelsLast()]), images().contiguous(memory_format=NHWC)
        assert run.on_batch(x, torch.arange(4))[0].data_ptr() == x.data_ptr()

    def test_other_inputs_are_left(self):
        run, x = self.start([ChannelsLast()]), torch.randn(4, 7)
        assert run.on_batch(x, torch.arange(4))[0] is x

    def test_after_mixing(self):
        run = self.start([ChannelsLast(), LabelSmoothing(), MixUp()])
        x, target = run.on_batch(images(), torch.arange(4))
        assert is_nhwc(x)
        assert isinstance(target, MixedTarget)

    def test_labels_are_not_asked_for(self):
        run = self.start([ChannelsLast()])
        assert is_nhwc(run.on_batch({"pixel_values": images()})["pixel_values"])

    def test_is_noted(self):
        run = self.start([ChannelsLast()])
        assert "ChannelsLast laid out 2 tensors channels last" in str(run.report)
        assert not run.report.changes
