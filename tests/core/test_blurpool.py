"""BlurPool against sliding sums in NumPy, and what surgery must leave as it was."""

import copy
import io
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock, ResNet

from mosaic_core import NoEffectWarning, Run
from mosaic_core.algorithms import BlurPool, apply_blurpool
from mosaic_core.algorithms._blurpool import (
    BlurConv2d,
    BlurMaxPool2d,
    ConvBlur2d,
    _binomial,
    blur_pool2d,
)

C = 16


def pair(value):
    return (value, value) if isinstance(value, int) else value


def blur_by_hand(x: np.ndarray, stride=1) -> np.ndarray:
    """Nine shifted copies, weighted 1 2 1 / 2 4 2 / 1 2 1 over 16, then every stride-th."""
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), (1, 1), (1, 1)])
    h, w = x.shape[2:]
    total = np.zeros(x.shape)
    for i, row in enumerate((1, 2, 1)):
        for j, column in enumerate((1, 2, 1)):
            total += row * column / 16 * padded[:, :, i : i + h, j : j + w]
    rows, columns = pair(stride)
    return total[:, :, ::rows, ::columns]


def max_by_hand(x: np.ndarray, kernel: int, padding: int, dilation: int) -> np.ndarray:
    """The maximum of every window, stride 1."""
    pads = [(0, 0), (0, 0), (padding, padding), (padding, padding)]
    padded = np.pad(x, pads, constant_values=-np.inf)
    reach = dilation * (kernel - 1)
    h, w = padded.shape[2] - reach, padded.shape[3] - reach
    windows = [
        padded[:, :, i * dilation : i * dilation + h, j * dilation : j * dilation + w]
        for i in range(kernel)
        for j in range(kernel)
    ]
    return np.max(windows, axis=0)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def small_resnet() -> ResNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)


class TestFilter:
    def test_values(self):
        expected = torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
        assert torch.equal(_binomial().view(3, 3), expected)

    @pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 5), (1, 1)])
    @pytest.mark.parametrize("stride", [1, 2, 3, (2, 1)])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_equals_sliding_sums(self, dtype, stride, size):
        x = draw(2, 3, *size, dtype=dtype)
        y = blur_pool2d(x, _binomial(), stride)
        expected = blur_by_hand(x.double().numpy(), stride)
        assert y.dtype == dtype
        assert y.shape == expected.shape
        tol = 4 * torch.finfo(dtype).eps
        np.testing.assert_allclose(y.double().numpy(), expected, rtol=tol, atol=tol)

    def test_unbatched(self):
        x = draw(3, 8, 8)
        assert torch.equal(blur_pool2d(x, _binomial(), 2), blur_pool2d(x[None], _binomial(), 2)[0])

    def test_constant_inside_stays_constant(self):
        assert torch.equal(
            blur_pool2d(torch.ones(1, 2, 5, 5), _binomial())[..., 1:-1, 1:-1],
            torch.ones(1, 2, 3, 3),
        )

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_memory_format_is_kept(self, dtype, memory_format):
        x = draw(2, 16, 8, 8, dtype=dtype).contiguous(memory_format=memory_format)
        for stride in (1, 2):
            y = blur_pool2d(x, _binomial(), stride)
            assert y.is_contiguous(memory_format=memory_format)


KERNELS = [(1, 1), (1, 3), (3, 1), (3, 3)]


class TestConvolutions:
    @pytest.mark.parametrize("size", [(8, 8), (7, 9)], ids=["even", "odd"])
    @pytest.mark.parametrize("blur_first", [True, False])
    @pytest.mark.parametrize("stride", [2, (2, 1), 3])
    @pytest.mark.parametrize("kernel", KERNELS)
    def test_values_and_shape(self, kernel, stride, blur_first, size):
        conv = nn.Conv2d(C, 6, kernel, stride, padding=(kernel[0] // 2, kernel[1] // 2)).double()
        x = draw(2, C, *size, dtype=torch.float64)
        plain = conv(x)
        weight, bias = conv.weight.detach().clone(), conv.bias.detach().clone()
        assert apply_blurpool(nn.Sequential(conv), blur_first=blur_first) == ["0"]
        y = conv(x)
        assert y.shape == plain.shape
        options = {"padding": conv.padding}
        if blur_first:
            blurred = torch.from_numpy(blur_by_hand(x.numpy()))
            expected = F.conv2d(blurred, weight, bias, stride=stride, **options)
        else:
            full = F.conv2d(x, weight, bias, **options)
            expected = torch.from_numpy(blur_by_hand(full.numpy(), stride))
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(y, plain)

    @pytest.mark.parametrize("blur_first", [True, False])
    @pytest.mark.parametrize(
        "options",
        [
            {"padding": 0},
            {"padding": 2, "dilation": 2},
            {"padding": 1, "groups": C, "bias": False},
            {"padding": 1, "padding_mode": "circular"},
            {"padding": 1, "padding_mode": "reflect"},
        ],
        ids=lambda o: ",".join(o),
    )
    @pytest.mark.parametrize("size", [(8, 8), (9, 7)], ids=["even", "odd"])
    def test_shape_for_other_options(self, size, options, blur_first):
        conv = nn.Conv2d(C, C, 3, 2, **options)
        x = draw(2, C, *size)
        shape = conv(x).shape
        apply_blurpool(nn.Sequential(conv), blur_first=blur_first)
        assert conv(x).shape == shape
        assert conv(x[0]).shape == shape[1:]

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_stride_1_is_left(self, kernel):
        conv, strided = nn.Conv2d(C, C, kernel), nn.Conv2d(C, C, kernel, 2)
        assert apply_blurpool(nn.Sequential(conv, strided)) == ["1"]
        assert type(conv) is nn.Conv2d

    @pytest.mark.parametrize(("channels", "changed"), [(15, False), (16, True), (17, True)])
    def test_min_channels(self, channels, changed):
        model = nn.Sequential(nn.Conv2d(channels, 4, 3, 2), nn.MaxPool2d(2))
        assert apply_blurpool(model) == (["0", "1"] if changed else ["1"])
        assert apply_blurpool(nn.Sequential(nn.Conv2d(3, 4, 3, 2)), min_channels=1) == ["0"]

    def test_gradients_reach_weights_and_input(self):
        conv = nn.Conv2d(C, 2, 3, 2, padding=1).double()
        apply_blurpool(nn.Sequential(conv))
        x = draw(1, C, 5, 5, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(conv, (x,))


class TestMaxPools:
    @pytest.mark.parametrize("size", [(8, 8), (7, 9)], ids=["even", "odd"])
    @pytest.mark.parametrize(
        ("kernel", "stride", "padding", "dilation"),
        [
            (2, None, 0, 1),
            (3, 2, 1, 1),
            (3, 2, 0, 1),
            (3, 3, 1, 1),
            (2, 2, 1, 2),
            (3, (2, 1), 1, 1),
        ],
    )
    def test_values_and_shape(self, kernel, stride, padding, dilation, size):
        pool = nn.MaxPool2d(kernel, stride, padding, dilation)
        x = draw(2, 3, *size, dtype=torch.float64)
        plain = pool(x)
        assert apply_blurpool(nn.Sequential(pool)) == ["0"]
        y = pool(x)
        assert y.shape == plain.shape
        full = max_by_hand(x.numpy(), kernel, padding, dilation)
        expected = blur_by_hand(full, kernel if stride is None else stride)
        np.testing.assert_allclose(y.numpy(), expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(
        "pool",
        [
            nn.MaxPool2d(2, ceil_mode=True),
            nn.MaxPool2d(2, return_indices=True),
            nn.MaxPool2d(3, 1),
            nn.MaxPool2d(3, (1, 1)),
            type("OwnPool", (nn.MaxPool2d,), {})(2),
            nn.AvgPool2d(2),
        ],
        ids=["ceil", "indices", "stride 1", "stride (1, 1)", "subclass", "average"],
    )
    def test_left_untouched(self, pool):
        model = nn.Sequential(pool)
        kind, x = type(pool), draw(1, 2, 7, 7)
        before = pool(x)
        with pytest.warns(NoEffectWarning, match="no strided convolutions or max-pools to blur"):
            assert apply_blurpool(model) == []
        assert type(pool) is kind
        for a, b in zip(pool(x), before, strict=True):
            assert torch.equal(a, b)

    def test_filter_lies_where_the_model_does(self):
        """A max-pool has no device of its own."""
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2)).to("meta")
        apply_blurpool(model)
        assert model[1].blur_filter.device.type == "meta"
        assert model(torch.empty(1, 3, 8, 8, device="meta")).shape == (1, 4, 4, 4)


class TestSurgery:
    def test_subclasses_of_convolutions_are_left(self):
        class Own(nn.Conv2d):
            pass

        model = nn.Sequential(
            Own(C, C, 3, 2), nn.Conv2d(C, C, 3, 2), nn.ConvTranspose2d(C, C, 3, 2)
        )
        assert apply_blurpool(model) == ["1"]
        assert type(model[0]) is Own

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, ["0", "1"]),
            ({"replace_convs": False}, ["1"]),
            ({"replace_maxpools": False}, ["0"]),
        ],
    )
    def test_what_is_replaced(self, options, expected):
        model = nn.Sequential(nn.Conv2d(C, C, 3, 2), nn.MaxPool2d(2))
        assert apply_blurpool(model, **options) == expected

    def test_classes(self):
        model = nn.Sequential(nn.Conv2d(C, C, 3, 2), nn.MaxPool2d(2))
        other = copy.deepcopy(model)
        apply_blurpool(model)
        apply_blurpool(other, blur_first=False)
        assert [type(m) for m in model] == [BlurConv2d, BlurMaxPool2d]
        assert [type(m) for m in other] == [ConvBlur2d, BlurMaxPool2d]
        assert isinstance(model[0], nn.Conv2d)

    def test_resnet18_changes_what_subsamples(self):
        model = resnet18()
        assert apply_blurpool(model) == [
            "maxpool",
            *("layer2.0.conv1", "layer2.0.downsample.0"),
            *("layer3.0.conv1", "layer3.0.downsample.0"),
            *("layer4.0.conv1", "layer4.0.downsample.0"),
        ]
        assert type(model.conv1) is nn.Conv2d

    @pytest.mark.parametrize("blur_first", [True, False])
    def test_parameters_names_and_shapes_stay(self, blur_first):
        model = small_resnet()
        parameters = dict(model.named_parameters())
        buffers, keys = dict(model.named_buffers()), list(model.state_dict())
        modules = dict(model.named_modules())
        apply_blurpool(model, blur_first=blur_first)
        assert list(dict(model.named_parameters())) == list(parameters)
        assert all(p is parameters[name] for name, p in model.named_parameters())
        assert all(model.get_buffer(name) is buffer for name, buffer in buffers.items())
        assert list(model.state_dict()) == keys
        assert all(module is modules[name] for name, module in model.named_modules())
        small_resnet().load_state_dict(model.state_dict())

    def test_optimizer_built_before_keeps_working(self):
        model = small_resnet()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        apply_blurpool(model, optimizers=optimizer)
        before = model.layer2[0].conv1.weight.detach().clone()
        model(draw(4, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        assert not torch.equal(model.layer2[0].conv1.weight, before)

    @pytest.mark.parametrize("blur_first", [True, False])
    def test_idempotent(self, blur_first):
        model = small_resnet().eval()
        first = apply_blurpool(model, blur_first=blur_first)
        x = draw(2, 3, 33, 33)
        y, kinds = model(x), [type(m) for m in model.modules()]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert apply_blurpool(model, blur_first=blur_first) == first
        assert [type(m) for m in model.modules()] == kinds
        assert torch.equal(model(x), y)

    def test_hooks_stay(self):
        conv, calls = nn.Conv2d(C, C, 3, 2), []
        conv.register_forward_hook(lambda *args: calls.append(1))
        apply_blurpool(nn.Sequential(conv))
        conv(draw(1, C, 8, 8))
        assert calls == [1]

    def test_copies_and_files(self):
        model = small_resnet().eval()
        apply_blurpool(model)
        x = draw(2, 3, 32, 32)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(other(x), model(x))
            assert other.conv1.weight.data_ptr() != model.conv1.weight.data_ptr()

    def test_run_reports_and_marks_what_it_changed(self):
        model = small_resnet()
        run = Run([BlurPool()], model=model)
        assert run.report.changes["BlurPool"] == apply_blurpool(model)
        with pytest.warns(NoEffectWarning, match="apply_blurpool: the model has no strided"):
            Run([BlurPool()], model=nn.Linear(2, 2))


class TestPrecisionAndCompilation:
    def test_bfloat16_model(self):
        model = small_resnet().eval()
        apply_blurpool(model)
        x = draw(2, 3, 32, 32)
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double())
            low = model.to(torch.bfloat16)(x.bfloat16())
        assert low.dtype == torch.bfloat16
        error = (low.double() - exact).norm() / exact.norm()
        assert error < 6 * torch.finfo(torch.bfloat16).eps

    @pytest.mark.parametrize("layer", [nn.Conv2d(C, C, 3, 2), nn.MaxPool2d(2)], ids=["conv", "max"])
    def test_autocast(self, layer):
        apply_blurpool(nn.Sequential(layer))
        x = draw(2, C, 8, 8)
        exact = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = layer(x)
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), exact, rtol=0.02, atol=0.02)

    def test_channels_last(self):
        model = small_resnet().eval()
        apply_blurpool(model)
        x = draw(2, 3, 32, 32)
        expected = model(x)
        model = model.to(memory_format=torch.channels_last)
        seen = []
        for name in ("maxpool", "layer2.0.conv1", "layer4.0.downsample.0"):
            model.get_submodule(name).register_forward_hook(
                lambda m, args, y: seen.append(y.is_contiguous(memory_format=torch.channels_last))
            )
        y = model(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert seen == [True] * 3

    @pytest.mark.parametrize(
        ("model", "blur_first"),
        [
            (small_resnet(), True),
            (nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 3, 2)), False),
        ],
        ids=["blur first", "blur last"],
    )
    def test_compiles_without_a_graph_break(self, model, blur_first):
        apply_blurpool(model, blur_first=blur_first)
        eager = copy.deepcopy(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        x = draw(4, 3, 32, 32)
        for net in (compiled, eager):
            net(x).square().mean().backward()
        for (name, a), b in zip(model.named_parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)


class TestSettings:
    def test_min_channels(self):
        with pytest.raises(ValueError, match="BlurPool: min_channels must be at least 1, got 0"):
            BlurPool(min_channels=0)

    def test_something_to_replace(self):
        with pytest.raises(ValueError, match="replace_convs or replace_maxpools must be true"):
            BlurPool(replace_convs=False, replace_maxpools=False)
