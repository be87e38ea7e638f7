"""GhostBatchNorm against NumPy in float64 and against a loop of torch's batch norm."""

import copy
import io
import math
import warnings

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, EvoNorm2dB0, SplitBatchNorm2d
from timm.layers.norm_act import SyncBatchNormAct
from torch import nn
from torch._dynamo.testing import CompileCounter
from torchvision.models import resnet50
from torchvision.models.resnet import BasicBlock, ResNet
from transformers import ResNetConfig, ResNetModel

from mosaic_core import NoEffectWarning, Run, UnsupportedError
from mosaic_core.algorithms import GhostBatchNorm, apply_ghost_batchnorm, ghost_batch_norm
from mosaic_core.algorithms._ghost_batchnorm import Ghost

C, EPS = 4, 1e-5
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm_of(dims: int, ghost_batch_size: int | None, dtype=torch.float32, **options) -> nn.Module:
    """Return a batch norm whose parameters and statistics are not those it starts with."""
    norm = NORMS[dims](C, **options).to(dtype)
    with torch.no_grad():
        for i, tensor in enumerate([*norm.parameters(), *norm.buffers()]):
            if tensor.is_floating_point():
                tensor.copy_(draw(C, seed=i).abs() + 0.1)
    if ghost_batch_size is not None:
        apply_ghost_batchnorm(norm, ghost_batch_size)
    return norm


def input_of(dims: int, examples: int, dtype=torch.float32, seed=9) -> torch.Tensor:
    return draw(examples, C, *(3,) * dims, dtype=dtype, seed=seed) * 2 + 1


def by_hand(x, ghost_batch_size, weight, bias):
    """Normalise the chunks one by one; return the output and each example's statistics' mean."""
    chunks = torch.chunk(torch.arange(len(x)), math.ceil(len(x) / ghost_batch_size))
    x, axes = x.double().numpy(), (0, *range(2, x.dim()))
    shape = (1, C) + (1,) * (x.ndim - 2)
    weight, bias = (p.detach().double().numpy().reshape(shape) for p in (weight, bias))
    out, mean, var = np.empty_like(x), np.zeros(C), np.zeros(C)
    for chunk in (c.numpy() for c in chunks):
        part = x[chunk]
        m, v = part.mean(axes, keepdims=True), part.var(axes, keepdims=True)
        out[chunk] = (part - m) / np.sqrt(v + EPS) * weight + bias
        mean += m.reshape(C) * len(chunk) / len(x)
        var += part.var(axes, ddof=1) * len(chunk) / len(x)
    return out, mean, var


class TestAgainstAReference:
    @pytest.mark.parametrize("ghost_batch_size", [1, 2, 3, 5])
    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_ghost_batches_of_12_have_mean_0_and_variance_1(self, dims, ghost_batch_size):
        norm = NORMS[dims](C, eps=1e-12)
        apply_ghost_batchnorm(norm, ghost_batch_size)
        output = norm(input_of(dims, 12))
        for chunk in output.chunk(math.ceil(12 / ghost_batch_size)):
            var, mean = torch.var_mean(chunk, (0, *range(2, chunk.dim())), correction=0)
            torch.testing.assert_close(var, torch.ones(C))
            torch.testing.assert_close(mean, torch.zeros(C))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("examples", [2, 7, 12, 13])
    @pytest.mark.parametrize("ghost_batch_size", [1, 2, 3, 5, 13])
    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_values_and_statistics(self, dims, ghost_batch_size, examples, dtype):
        norm = norm_of(dims, ghost_batch_size, dtype)
        x = input_of(dims, examples, dtype)
        start = norm.running_mean.clone(), norm.running_var.clone()
        expected, mean, var = by_hand(x, ghost_batch_size, norm.weight, norm.bias)
        y = norm(x)
        assert y.dtype == dtype
        tol = 20 * torch.finfo(dtype).eps
        np.testing.assert_allclose(y.detach().double().numpy(), expected, rtol=tol, atol=tol)
        for running, old, new in zip(
            (norm.running_mean, norm.running_var), start, (mean, var), strict=True
        ):
            moved = 0.9 * old.double().numpy() + 0.1 * new
            np.testing.assert_allclose(running.double().numpy(), moved, rtol=tol, atol=tol)
        assert norm.num_batches_tracked == 1

    @pytest.mark.parametrize(("examples", "size"), [(12, 4), (13, 5), (12, 1)])
    def test_gradients_are_those_of_a_loop(self, examples, size):
        norm, plain = norm_of(2, size, torch.float64), norm_of(2, None, torch.float64)
        x = input_of(2, examples, torch.float64)
        grad = draw(*x.shape, dtype=torch.float64, seed=5)
        found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
        norm(found).backward(grad)
        chunks = expected.chunk(math.ceil(examples / size))
        torch.cat([plain(chunk) for chunk in chunks]).backward(grad)
        for a, b in ((found, expected), (norm.weight, plain.weight), (norm.bias, plain.bias)):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("examples", [4, 5])
    def test_gradients_of_gradients(self, examples):
        def function(x, weight, bias):
            return ghost_batch_norm(x, weight, bias, 2)[0]

        leaves = [draw(examples, 2, 2), draw(2, seed=1), draw(2, seed=2)]
        leaves = [leaf.double().requires_grad_() for leaf in leaves]
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)

    def test_statistics_carry_no_gradient_and_the_input_stays(self):
        x = input_of(2, 12).requires_grad_()
        before = x.detach().clone()
        _, mean, var = ghost_batch_norm(x, ghost_batch_size=5)
        assert not mean.requires_grad
        assert not var.requires_grad
        assert torch.equal(x, before)

    def test_one_call_of_batch_norm_where_the_batch_divides(self, monkeypatch):
        calls, real = [], F.batch_norm
        monkeypatch.setattr(F, "batch_norm", lambda x, *a: calls.append(x.shape) or real(x, *a))
        ghost_batch_norm(input_of(2, 64), ghost_batch_size=4)
        assert calls == [(4, 16 * C, 3, 3)]
        calls.clear()
        ghost_batch_norm(input_of(2, 13), ghost_batch_size=5)
        assert calls == [(5, 2 * C, 3, 3), (3, C, 3, 3)]


class TestBatchSizes:
    @pytest.mark.parametrize("size", [12, 13, 1000])
    def test_within_one_ghost_batch_it_is_plain_to_the_bit(self, size):
        norm, plain = norm_of(2, size), norm_of(2, None)
        assert torch.equal(norm(input_of(2, 12)), plain(input_of(2, 12)))
        for name, tensor in plain.state_dict().items():
            assert torch.equal(norm.state_dict()[name], tensor)

    @pytest.mark.parametrize("examples", [1, 2, 12])
    @pytest.mark.parametrize("dims", [1, 2, 3])
    def test_evaluation_is_plain_to_the_bit(self, dims, examples):
        norm, plain = norm_of(dims, 2).eval(), norm_of(dims, None).eval()
        assert torch.equal(norm(input_of(dims, examples)), plain(input_of(dims, examples)))
        assert norm.num_batches_tracked == 0

    @pytest.mark.parametrize("examples", [1, 12])
    def test_evaluation_without_running_statistics_is_plain(self, examples):
        options = {"track_running_stats": False}
        norm, plain = (norm_of(2, size, **options).eval() for size in (2, None))
        assert torch.equal(norm(input_of(2, examples)), plain(input_of(2, examples)))
        norm.train()(input_of(2, 12))
        assert norm.running_mean is None

    def test_a_single_value_is_joined_to_the_ghost_batch_before(self):
        """7 in chunks of 3 would leave 1, and without space its variance is undefined."""
        norm, x = norm_of(1, 3), draw(7, C)
        y = norm(x)
        for part in (slice(3), slice(3, 7)):
            expected = F.batch_norm(x[part], None, None, norm.weight, norm.bias, True)
            torch.testing.assert_close(y[part], expected)
        expected = F.batch_norm(draw(3, C), None, None, norm.weight, norm.bias, True)
        torch.testing.assert_close(norm_of(1, 2)(draw(3, C)), expected)

    @pytest.mark.parametrize("examples", [1, 4])
    def test_one_value_per_channel_is_refused_as_torch_does(self, examples):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            norm_of(1, 1)(draw(examples, C))

    def test_wrong_dimensions_are_refused_as_torch_does(self):
        with pytest.raises(ValueError, match="expected 4D input"):
            norm_of(2, 2)(draw(6, C, 3))

    def test_without_affine_parameters(self):
        norm = norm_of(2, 3, affine=False)
        ones, zeros = torch.ones(C), torch.zeros(C)
        expected, _, _ = by_hand(input_of(2, 12), 3, ones, zeros)
        np.testing.assert_allclose(norm(input_of(2, 12)).numpy(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_momentum_none_is_the_mean_over_all_batches(self, dtype):
        norm = norm_of(2, 3, dtype, momentum=None)
        means, variances = [], []
        for seed, examples in enumerate((12, 7, 9)):
            x = input_of(2, examples, dtype, seed)
            norm(x)
            _, mean, var = by_hand(x, 3, norm.weight, norm.bias)
            means.append(mean)
            variances.append(var)
        tol = 20 * torch.finfo(dtype).eps
        np.testing.assert_allclose(norm.running_mean.numpy(), np.mean(means, 0), rtol=tol)
        np.testing.assert_allclose(norm.running_var.numpy(), np.mean(variances, 0), rtol=tol)

    def test_the_running_mean_does_not_depend_on_the_ghost_batch_size(self):
        """As the examples count alike, ragged or not."""
        plain = norm_of(2, None)
        plain(input_of(2, 13))
        for size in (1, 2, 5):
            norm = norm_of(2, size)
            norm(input_of(2, 13))
            torch.testing.assert_close(norm.running_mean, plain.running_mean)


class TestMemoryFormat:
    @pytest.mark.parametrize("examples", [12, 13])
    @pytest.mark.parametrize("dims", [2, 3])
    def test_channels_last_is_kept(self, dims, examples):
        x = input_of(dims, examples)
        last = x.contiguous(memory_format=FORMATS[dims]).requires_grad_()
        norm = norm_of(dims, 5)
        y, expected = norm(last), norm(x)
        assert y.is_contiguous(memory_format=FORMATS[dims])
        assert expected.is_contiguous()
        torch.testing.assert_close(y, expected)
        (grad,) = torch.autograd.grad(y.square().sum(), last)
        assert grad.is_contiguous(memory_format=FORMATS[dims])

    def test_any_strides(self):
        x = input_of(2, 12).transpose(2, 3)[..., ::2]
        torch.testing.assert_close(norm_of(2, 5)(x), norm_of(2, 5)(x.contiguous()))


class TestLayers:
    @pytest.mark.parametrize("drop", [None, nn.Dropout])
    def test_timms_norm_with_activation(self, drop):
        layer = BatchNormAct2d(C, act_layer=nn.GELU, drop_layer=drop)
        plain = copy.deepcopy(layer)
        assert apply_ghost_batchnorm(nn.Sequential(layer), 4) == ["0"]
        x = input_of(2, 12)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            y = layer(x)
            torch.manual_seed(0)
            normal = torch.cat([F.batch_norm(c, None, None, training=True) for c in x.split(4)])
            torch.testing.assert_close(y, plain.act(plain.drop(normal)))
        layer.eval(), plain.eval()
        torch.testing.assert_close(
            layer(x), plain.act(F.batch_norm(x, layer.running_mean, layer.running_var))
        )

    @pytest.mark.parametrize("cls", [nn.SyncBatchNorm, SyncBatchNormAct])
    def test_sync_batch_norm_stays_within_its_rank(self, cls, monkeypatch):
        layer = cls(C)
        layer.act = nn.ReLU()
        apply_ghost_batchnorm(layer, 4)
        # Torch's own would now ask for CUDA, and for the other ranks.
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
        act = layer.act if cls is SyncBatchNormAct else nn.Identity()
        for examples in (4, 12):
            x = input_of(2, examples)
            y = torch.cat([F.batch_norm(c, None, None, training=True) for c in x.split(4)])
            torch.testing.assert_close(layer(x), act(y))

    def test_subclasses(self):
        class Named(nn.BatchNorm2d):
            act = nn.ReLU()  # for who calls it, not for forward

        class Own(nn.BatchNorm2d):
            def forward(self, input):
                return super().forward(input) + 1

        layers = [Named(C), Own(C), SplitBatchNorm2d(C), EvoNorm2dB0(C), nn.LazyBatchNorm2d()]
        model = nn.Sequential(*layers, nn.GroupNorm(2, C), nn.InstanceNorm2d(C, affine=True))
        kinds = [type(m) for m in model]
        assert apply_ghost_batchnorm(model, 4) == ["0"]
        assert [type(m) for m in model][1:] == kinds[1:]
        assert isinstance(model[0], Named)
        assert model[0](input_of(2, 12)).min() < 0

    @pytest.mark.parametrize(
        ("make", "count"),
        [
            (lambda: resnet50(num_classes=2), 53),
            (lambda: timm.create_model("resnet50"), 53),
            (lambda: timm.create_model("efficientnet_b0"), 49),
            (lambda: ResNetModel(ResNetConfig()), 53),
        ],
        ids=["torchvision resnet50", "timm resnet50", "timm efficientnet", "hf resnet"],
    )
    def test_every_batch_norm_of_known_models(self, make, count):
        with torch.device("meta"):
            model = make()
        keys, parameters = list(model.state_dict()), list(model.parameters())
        assert len(apply_ghost_batchnorm(model)) == count
        assert list(model.state_dict()) == keys
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))

    def test_nothing_to_change(self):
        with pytest.warns(NoEffectWarning, match="apply_ghost_batchnorm: the model has no batch"):
            assert apply_ghost_batchnorm(nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3))) == []


def small_resnet() -> ResNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)


class TestSurgery:
    def test_parameters_names_and_checkpoints_stay(self):
        model = small_resnet()
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        keys, modules = list(model.state_dict()), dict(model.named_modules())
        apply_ghost_batchnorm(model, 4)
        assert all(p is parameters[name] for name, p in model.named_parameters())
        assert all(b is buffers[name] for name, b in model.named_buffers())
        assert list(model.state_dict()) == keys
        assert dict(model.named_modules()) == modules
        small_resnet().load_state_dict(model.state_dict())
        x = draw(2, 3, 32, 32)
        assert torch.equal(model.eval()(x), small_resnet().eval()(x))

    def test_it_acts_in_training(self):
        model, x = small_resnet(), draw(12, 3, 32, 32)
        apply_ghost_batchnorm(model, 4)
        assert not torch.allclose(model(x), small_resnet()(x), atol=1e-2)

    def test_idempotent(self):
        model = small_resnet()
        first = apply_ghost_batchnorm(model, 4)
        kinds = [type(m) for m in model.modules()]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert apply_ghost_batchnorm(model, 4) == first
        assert [type(m) for m in model.modules()] == kinds
        assert model.bn1.ghost_batch_size == 4

    def test_decay_groups_and_optimizer_made_before(self):
        model = small_resnet()
        decay = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() <= 1]
        optimizer = torch.optim.SGD([{"params": decay, "weight_decay": 0.1}, {"params": rest}], 0.1)
        apply_ghost_batchnorm(model, 4, optimizers=optimizer)
        before = model.bn1.weight.detach().clone()
        model(draw(8, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        assert not torch.equal(model.bn1.weight, before)

    def test_copies_and_files(self):
        model = small_resnet()
        model.bn1 = BatchNormAct2d(64)
        apply_ghost_batchnorm(model, 4)
        x, file = draw(12, 3, 32, 32), io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        others = [copy.deepcopy(model), torch.load(file, weights_only=False)]
        expected = model(x)
        for other in others:
            assert isinstance(other.bn1, Ghost)
            assert torch.equal(other(x), expected)

    def test_repr_says_what_it_is(self):
        assert repr(norm_of(2, 4)).startswith("GhostBatchNorm2d(4, eps=")

    def test_report(self):
        model = small_resnet()
        run = Run([GhostBatchNorm(4)], model=model)
        assert run.report.changes["GhostBatchNorm"] == apply_ghost_batchnorm(model)

    def test_a_conversion_that_undoes_it_is_refused(self):
        run = Run([GhostBatchNorm(4)], model=small_resnet())
        nn.SyncBatchNorm.convert_sync_batchnorm(run.model)
        optimizer = torch.optim.SGD(run.model.parameters(), 0.1)
        with pytest.raises(UnsupportedError, match="bn1 was replaced by SyncBatchNorm after the"):
            run.start([optimizer])

    def test_converted_before_it_is_changed(self):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(small_resnet())
        assert len(apply_ghost_batchnorm(model, 4)) == 12


class TestPrecisionAndCompilation:
    def test_autocast(self):
        norm, plain = norm_of(2, 4), norm_of(2, None)
        x = input_of(2, 12).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            y = norm(x)
            expected = torch.cat([plain(c) for c in x.split(4)])
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, expected)
        assert norm.running_mean.dtype == torch.float32

    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("examples", [12, 13])
    def test_compiles_without_a_graph_break(self, examples, momentum):
        model = nn.Sequential(nn.Conv2d(3, C, 3), norm_of(2, 5, momentum=momentum), nn.ReLU())
        eager = copy.deepcopy(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        x = draw(examples, 3, 8, 8)
        for net in (compiled, eager):
            net(x).square().mean().backward()
        for (name, a), b in zip(model.named_parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
        torch.testing.assert_close(model.state_dict(), eager.state_dict())

    def test_a_resnet_compiles(self):
        model, x = small_resnet(), draw(8, 3, 32, 32)
        apply_ghost_batchnorm(model, 4)
        eager = copy.deepcopy(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), eager(x))

    def test_batches_of_other_sizes_compile_as_often_as_without(self):
        def compilations(norm):
            torch._dynamo.reset()
            counter = CompileCounter()
            compiled = torch.compile(norm, fullgraph=True, backend=counter)
            for examples in (12, 16, 24, 20, 8):
                compiled(input_of(2, examples))
            return counter.frame_count

        assert compilations(norm_of(2, 4)) <= compilations(norm_of(2, None))


@pytest.mark.parametrize("size", [0, -1])
def test_settings(size):
    for call, name in (
        (GhostBatchNorm, "GhostBatchNorm"),
        (lambda n: apply_ghost_batchnorm(nn.BatchNorm1d(2), n), "apply_ghost_batchnorm"),
        (lambda n: ghost_batch_norm(draw(4, C), ghost_batch_size=n), "ghost_batch_norm"),
    ):
        message = f"{name}: ghost_batch_size must be at least 1, got {size}"
        with pytest.raises(ValueError, match=message):
            call(size)
