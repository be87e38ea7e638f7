"""WeightStandardization against NumPy in float64, and what surgery must leave as it was."""

import copy
import io
import warnings

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, StdConv2d
from torch import nn
from torchvision.models import resnet50, vit_b_16
from torchvision.models.resnet import BasicBlock, ResNet
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

from mosaic_core import NoEffectWarning, Run
from mosaic_core.algorithms import (
    BlurPool,
    ChannelsLast,
    WeightStandardization,
    apply_blurpool,
    apply_weight_standardization,
    standardize_weight,
)
from mosaic_core.algorithms._blurpool import BlurConv2d, ConvBlur2d, blur_pool2d
from mosaic_core.algorithms._weight_standardization import Standardized

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_hand(weight: torch.Tensor, eps: float = 1e-10) -> np.ndarray:
    w = weight.detach().double().numpy()
    axes = tuple(range(1, w.ndim))
    return (w - w.mean(axes, keepdims=True)) / np.sqrt(w.var(axes, keepdims=True) + eps)


def small_resnet() -> ResNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)


class TestWeights:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(6, 2, 5), (64, 32, 3, 3), (8, 1, 2, 3, 3), (5, 7, 1, 1)])
    def test_equals_the_formula(self, shape, dtype):
        weight = (draw(*shape) * 0.01 + 0.03).to(dtype)
        y = standardize_weight(weight)
        assert y.dtype == dtype
        tol = 50 * torch.finfo(dtype).eps
        np.testing.assert_allclose(y.double().numpy(), by_hand(weight), rtol=tol, atol=tol)

    @pytest.mark.parametrize(
        "shape", [(6, 2, 5), (64, 32, 3, 3), (512, 512, 3, 3), (8, 1, 2, 3, 3)]
    )
    def test_filters_have_mean_0_and_variance_1(self, shape):
        """Also the small weights of a wide layer, as they are drawn at the start."""
        weight = KINDS[len(shape) - 2](shape[1], shape[0], shape[2:], device="meta").weight
        weight = nn.init.kaiming_uniform_(torch.empty(weight.shape), a=5**0.5)
        dims = tuple(range(1, weight.dim()))
        var, mean = torch.var_mean(standardize_weight(weight), dims, correction=0)
        torch.testing.assert_close(var, torch.ones(len(weight)))
        torch.testing.assert_close(mean, torch.zeros(len(weight)))

    def test_a_constant_filter_becomes_zero(self):
        weight = torch.full((2, 3, 3), 0.7).requires_grad_()
        y = standardize_weight(weight)
        assert torch.equal(y, torch.zeros(2, 3, 3))
        assert torch.isfinite(torch.autograd.grad(y.sum(), weight)[0]).all()

    def test_scale_and_shift_of_a_filter_do_not_matter(self):
        weight = draw(4, 3, 3, dtype=torch.float64)
        torch.testing.assert_close(standardize_weight(5 * weight + 3), standardize_weight(weight))

    def test_eps(self):
        weight = draw(4, 3, 3, dtype=torch.float64)
        y = standardize_weight(weight, 0.5)
        np.testing.assert_allclose(y.numpy(), by_hand(weight, 0.5))

    def test_gradients(self):
        weight = draw(2, 3, 2, 2, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(standardize_weight, weight)
        assert torch.autograd.gradgradcheck(standardize_weight, weight)

    @pytest.mark.parametrize("dims", [2, 3])
    def test_memory_format_is_kept(self, dims):
        weight = draw(4, 5, *(3,) * dims)
        last = weight.contiguous(memory_format=FORMATS[dims])
        y = standardize_weight(last)
        assert y.is_contiguous(memory_format=FORMATS[dims])
        assert standardize_weight(weight).is_contiguous()
        assert torch.equal(y, standardize_weight(weight))

    def test_gradients_are_the_same_in_every_memory_format(self):
        """To the last bit: ZeRO keeps a channels-last weight as a flat one."""
        weight, grad = draw(16, 24, 3, 3), draw(16, 24, 3, 3).flip(0)
        flat = weight.clone().requires_grad_()
        last = weight.contiguous(memory_format=torch.channels_last).requires_grad_()
        for w in (flat, last):
            standardize_weight(w).backward(grad.contiguous(memory_format=torch.channels_last))
        assert last.grad.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(flat.grad, last.grad)


class TestConvolutions:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"stride": 2, "padding": 1, "bias": False},
            {"groups": 2, "dilation": 2, "padding": "same"},
            {"padding": 1, "padding_mode": "circular"},
        ],
        ids=lambda o: ",".join(o),
    )
    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_convolves_by_the_standardised_weight(self, dims, options):
        conv = KINDS[dims](4, 6, 3, **options).double()
        twin, x = copy.deepcopy(conv), draw(2, 4, *(7,) * dims, dtype=torch.float64)
        assert apply_weight_standardization(nn.Sequential(conv)) == ["0"]
        with torch.no_grad():
            twin.weight.copy_(torch.from_numpy(by_hand(conv.weight)))
        y = conv(x)
        torch.testing.assert_close(y, twin(x), rtol=1e-12, atol=1e-12)
        y.sum().backward()
        assert conv.weight.grad.abs().sum() > 0

    def test_evaluation_and_a_batch_of_1(self):
        conv, x = nn.Conv2d(3, 4, 3), draw(3, 3, 8, 8)
        apply_weight_standardization(conv)
        torch.testing.assert_close(conv.eval()(x[:1]), conv.train()(x)[:1])

    @pytest.mark.parametrize(("ignored", "expected"), [(0, 3), (1, 2), (2, 1), (3, 0), (5, 0)])
    @pytest.mark.filterwarnings("ignore::mosaic_core.NoEffectWarning")
    def test_last_layers(self, ignored, expected):
        model = nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(3)), nn.Linear(3, 3))
        names = ["0", "1", "2"][:expected]
        assert apply_weight_standardization(model, n_last_layers_ignore=ignored) == names
        assert [isinstance(m, Standardized) for m in model[:3]] == [i < expected for i in range(3)]

    def test_left_untouched(self):
        class Own(nn.Conv2d):
            def forward(self, input):
                return input

        parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3))
        layers = [
            nn.ConvTranspose2d(3, 3, 3),
            nn.LazyConv2d(3, 3),
            nn.Conv2d(3, 3, 1, groups=3),  # a weight a filter
            nn.Linear(3, 3),
            Own(3, 3, 3),
            StdConv2d(3, 3, 3),
            Conv2dSame(3, 3, 3),
            parametrized,
        ]
        kinds = [type(layer) for layer in layers]
        model = nn.Sequential(*layers)
        with pytest.warns(NoEffectWarning, match="the model has no convolutions to standardise"):
            assert apply_weight_standardization(model) == []
        assert [type(layer) for layer in layers] == kinds

    def test_subclasses_that_convolve_as_torch_does(self):
        class Depthwise(nn.Conv2d):
            def __init__(self, channels):
                super().__init__(channels, channels, 3, groups=channels)

        model = nn.Sequential(Depthwise(4))
        assert apply_weight_standardization(model) == ["0"]
        assert isinstance(model[0], Depthwise)
        expected = F.conv2d(
            draw(1, 4, 5, 5), standardize_weight(model[0].weight), model[0].bias, groups=4
        )
        torch.testing.assert_close(model(draw(1, 4, 5, 5)), expected)

    @pytest.mark.parametrize(
        ("make", "count"),
        [
            (lambda: resnet50(num_classes=2), 53),
            (vit_b_16, 1),
            (lambda: timm.create_model("resnet50"), 53),
            (lambda: timm.create_model("vit_base_patch16_224"), 1),
            (lambda: ResNetModel(ResNetConfig()), 53),
            (lambda: ViTModel(ViTConfig()), 1),
        ],
        ids=["torchvision resnet", "torchvision vit", "timm resnet", "timm vit", "hf", "hf vit"],
    )
    def test_every_convolution_of_known_models(self, make, count):
        with torch.device("meta"):
            model = make()
        keys, parameters = list(model.state_dict()), list(model.parameters())
        assert len(apply_weight_standardization(model)) == count
        assert list(model.state_dict()) == keys
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


class TestSurgery:
    def test_parameters_names_and_checkpoints_stay(self):
        model = small_resnet()
        parameters, keys = dict(model.named_parameters()), list(model.state_dict())
        values = copy.deepcopy(model.state_dict())
        apply_weight_standardization(model)
        assert all(p is parameters[name] for name, p in model.named_parameters())
        assert list(model.state_dict()) == keys
        assert all(torch.equal(values[k], v) for k, v in model.state_dict().items())
        small_resnet().load_state_dict(model.state_dict())

    def test_it_acts(self):
        model, x = small_resnet().eval(), draw(2, 3, 32, 32)
        apply_weight_standardization(model)
        assert not torch.allclose(model(x), small_resnet().eval()(x))

    def test_idempotent(self):
        model = small_resnet().eval()
        first = apply_weight_standardization(model, 1)
        x = draw(2, 3, 32, 32)
        y, kinds = model(x), [type(m) for m in model.modules()]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert apply_weight_standardization(model, 1) == first
        assert [type(m) for m in model.modules()] == kinds
        assert torch.equal(model(x), y)

    def test_decay_groups_and_optimizer_made_before(self):
        model = small_resnet()
        decay = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() <= 1]
        optimizer = torch.optim.SGD([{"params": decay, "weight_decay": 0.1}, {"params": rest}], 0.1)
        apply_weight_standardization(model)
        before = model.conv1.weight.detach().clone()
        model(draw(4, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        assert not torch.equal(model.conv1.weight, before)

    def test_copies_and_files(self):
        model, file = small_resnet().eval(), io.BytesIO()
        apply_weight_standardization(model)
        x = draw(2, 3, 32, 32)
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(other(x), model(x))

    def test_report(self):
        model = small_resnet()
        run = Run([WeightStandardization(1)], model=model)
        assert run.report.changes["WeightStandardization"] == apply_weight_standardization(model, 1)
        assert len(run.report.changes["WeightStandardization"]) == 11


class TestWithOthers:
    @pytest.mark.parametrize("blur_first", [True, False])
    @pytest.mark.parametrize("order", ["blur, standardise", "standardise, blur"])
    def test_blurpool_in_either_order(self, order, blur_first):
        conv = nn.Conv2d(16, 8, 3, 2, padding=1).double()
        model, steps = nn.Sequential(conv), order.split(", ")
        for step in steps * 2:  # twice equals once
            if step == "blur":
                assert apply_blurpool(model, blur_first=blur_first) == ["0"]
            else:
                assert apply_weight_standardization(model) == ["0"]
        assert isinstance(conv, BlurConv2d if blur_first else ConvBlur2d)
        x = draw(2, 16, 9, 9, dtype=torch.float64)
        weight = torch.from_numpy(by_hand(conv.weight))
        if blur_first:
            expected = F.conv2d(blur_pool2d(x, conv.blur_filter), weight, conv.bias, 2, 1)
        else:
            expected = blur_pool2d(
                F.conv2d(x, weight, conv.bias, padding=1), conv.blur_filter, (2, 2)
            )
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
            torch.testing.assert_close(other(x), expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("recipe", [(0, 1, 2), (2, 1, 0)])
    def test_a_recipe_of_all_three(self, recipe):
        algorithms = [BlurPool(), WeightStandardization(), ChannelsLast()]
        model, x = small_resnet().double(), draw(2, 3, 32, 32, dtype=torch.float64)
        run = Run([algorithms[i] for i in recipe], model=model)
        assert len(run.report.changes["BlurPool"]) == 7
        assert len(run.report.changes["WeightStandardization"]) == 12
        plain = small_resnet().double()
        apply_blurpool(plain)
        apply_weight_standardization(plain)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-9)


class TestPrecisionAndCompilation:
    def test_autocast(self):
        conv, x = nn.Conv2d(16, 16, 3), draw(2, 16, 8, 8)
        apply_weight_standardization(conv)
        exact = conv(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = conv(x)
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), exact, rtol=0.02, atol=0.1)

    def test_compiles_without_a_graph_break(self):
        model = small_resnet()
        apply_blurpool(model)
        apply_weight_standardization(model)
        eager = copy.deepcopy(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        x = draw(4, 3, 32, 32)
        for net in (compiled, eager):
            net(x).square().mean().backward()
        for (name, a), b in zip(model.named_parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_settings():
    for call, name in (
        (WeightStandardization, "WeightStandardization"),
        (lambda n: apply_weight_standardization(nn.Conv2d(3, 3, 3), n), "apply_weight_s.*"),
    ):
        with pytest.raises(ValueError, match=f"{name}: n_last_layers_ignore must be at least 0"):
            call(-1)
