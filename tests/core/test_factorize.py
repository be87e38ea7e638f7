"""Factorize against NumPy's singular value decomposition, and what becomes of the parameters."""

import copy
import io
import warnings

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet50, vit_b_16
from torchvision.models.resnet import BasicBlock, ResNet
from transformers import GPT2Config, GPT2LMHeadModel, ResNetConfig, ResNetModel, ViTConfig, ViTModel

from mosaic_core import NoEffectWarning, Run, UnsupportedError
from mosaic_core.algorithms import (
    BlurPool,
    Factorize,
    WeightStandardization,
    apply_factorization,
    factorize_matrix,
)
from mosaic_core.algorithms import _factorize as module_under_test
from mosaic_core.algorithms._blurpool import BlurConv2d, blur_pool2d
from mosaic_core.algorithms._factorize import FactorizedConv2d, FactorizedLinear
from mosaic_core.algorithms._weight_standardization import Standardized


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def best(weight: torch.Tensor, rank: int) -> np.ndarray:
    """The truncated singular value decomposition, as one matrix."""
    u, s, vt = np.linalg.svd(weight.detach().double().flatten(1).numpy(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def small_net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.Flatten(),
            nn.Linear(512, 24),
            nn.Linear(24, 5, bias=False),
        )


SMALL = {"min_channels": 16, "min_features": 5, "latent_features": 2}


class TestMatrix:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("shape", "rank"), [((12, 30), 4), ((30, 12), 4), ((20, 20), 9)])
    def test_it_is_the_best_of_its_rank(self, shape, rank, dtype):
        weight = draw(*shape, dtype=dtype)
        left, right = factorize_matrix(weight, rank)
        assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
        assert left.dtype == right.dtype == dtype
        assert left.is_contiguous()
        assert right.is_contiguous()
        expected = best(weight, rank)
        error = np.linalg.norm((left.double() @ right.double()).numpy() - expected)
        roundings = 100 if dtype == torch.float64 else 1
        assert error < roundings * torch.finfo(dtype).eps * np.linalg.norm(expected)

    def test_the_factors_share_the_singular_values_equally(self):
        weight = draw(12, 30, dtype=torch.float64)
        left, right = factorize_matrix(weight, 4)
        values = torch.linalg.svdvals(weight)[:4]
        torch.testing.assert_close(left.T @ left, torch.diag(values), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(right @ right.T, torch.diag(values), rtol=1e-9, atol=1e-9)

    def test_a_matrix_of_that_rank_is_kept(self):
        weight = draw(40, 3, dtype=torch.float64) @ draw(3, 50, dtype=torch.float64, seed=1)
        for rank in (3, 8):
            left, right = factorize_matrix(weight, rank)
            torch.testing.assert_close(left @ right, weight, rtol=1e-10, atol=1e-10)

    def test_a_zero_matrix_can_still_learn(self):
        left, right = (f.requires_grad_() for f in factorize_matrix(torch.zeros(8, 9), 2))
        assert torch.equal(left @ right, torch.zeros(8, 9))
        (left @ right).sum().backward()
        assert right.grad.abs().sum() > 0

    @pytest.mark.parametrize(("rank", "expected"), [(0.25, 5), (0.01, 1), (1, 1), (3.0, 3)])
    def test_ranks(self, rank, expected):
        assert factorize_matrix(draw(20, 30), rank)[0].shape == (20, expected)

    def test_the_input_stays_and_gets_no_gradient(self):
        weight = draw(12, 30).requires_grad_()
        left, right = factorize_matrix(weight, 4)
        assert torch.equal(weight, draw(12, 30))
        assert not left.requires_grad
        assert not right.requires_grad

    @pytest.mark.parametrize("rank", [12, 10, 13, 0.9])
    def test_a_rank_that_saves_nothing_is_refused(self, rank):
        with pytest.raises(
            ValueError, match=r"rank must be below m \* n / \(m \+ n\) = 10 to save"
        ):
            factorize_matrix(draw(20, 20), rank)

    @pytest.mark.parametrize("rank", [0, -1, 1.5, 0.0])
    def test_ranks_out_of_range(self, rank):
        message = r"rank must be a whole number of at least 1, or a fraction in \(0, 1\), got"
        with pytest.raises(ValueError, match=f"factorize_matrix: {message}"):
            factorize_matrix(draw(20, 20), rank)
        for name in ("latent_channels", "latent_features"):
            with pytest.raises(ValueError, match=f"Factorize: {name} must be a whole number"):
                Factorize(**{name: rank})
            with pytest.raises(ValueError, match=f"apply_factorization: {name} must be a whole"):
                apply_factorization(nn.Linear(2, 2), **{name: rank})

    def test_no_matrix(self):
        with pytest.raises(ValueError, match=r"weight must be a matrix, got \(2, 3, 4\)"):
            factorize_matrix(draw(2, 3, 4))


class TestLayers:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("sizes", [(40, 30), (30, 40)])
    def test_linear(self, sizes, bias):
        layer = nn.Linear(*sizes, bias=bias).double()
        weight, bias_before = layer.weight, layer.bias
        assert apply_factorization(layer, min_features=30, latent_features=0.2) == [""]
        assert type(layer) is FactorizedLinear
        x = draw(2, 5, sizes[0], dtype=torch.float64)
        expected = F.linear(x, torch.from_numpy(best(weight, 6)), bias_before)
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
        assert layer.bias is bias_before
        assert (layer.in_features, layer.out_features) == sizes
        np.testing.assert_allclose(layer.weight.detach().numpy(), best(weight, 6), atol=1e-10)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"stride": 2, "padding": 1, "bias": False},
            {"dilation": 2, "padding": "same"},
            {"padding": (1, 2), "padding_mode": "circular"},
            {"padding": 1, "padding_mode": "reflect", "stride": (1, 2)},
        ],
        ids=lambda o: ",".join(o),
    )
    @pytest.mark.parametrize("kernel", [1, 3, (1, 3)])
    def test_convolution(self, kernel, options):
        layer = nn.Conv2d(16, 20, kernel, **options).double()
        twin, bias = copy.deepcopy(layer), layer.bias
        apply_factorization(layer, min_channels=16, latent_channels=0.3)
        assert type(layer) is FactorizedConv2d
        assert layer.weight_in.shape == (4, *twin.weight.shape[1:])
        assert layer.weight_out.shape == (20, 4, 1, 1)
        assert layer.bias is bias
        product = torch.from_numpy(best(twin.weight, 4)).view_as(twin.weight)
        torch.testing.assert_close(layer.weight.detach(), product, rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            twin.weight.copy_(product)
        for x in (draw(2, 16, 9, 8, dtype=torch.float64), draw(16, 9, 8, dtype=torch.float64)):
            torch.testing.assert_close(layer(x), twin(x), rtol=1e-10, atol=1e-10)

    def test_gradients(self):
        layer = nn.Conv2d(6, 6, 3, bias=False).double()
        apply_factorization(layer, min_channels=6, latent_channels=2)
        names = ("weight_in", "weight_out")

        def function(x, *weights):
            return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), x)

        x = draw(1, 6, 4, 4, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(function, (x, layer.weight_in, layer.weight_out))

    def test_it_starts_nearer_than_chance(self):
        """Trained weights are kept as far as the rank allows."""
        layer = nn.Linear(64, 64)
        with torch.no_grad():
            layer.weight.copy_(draw(64, 8) @ draw(8, 64, seed=1) + 0.1 * draw(64, 64, seed=2))
        x = draw(32, 64)
        before = layer(x)
        apply_factorization(layer, min_features=64, latent_features=8)
        assert (layer(x) - before).norm() < 0.05 * before.norm()

    @pytest.mark.parametrize("norm_first", [True, False])
    def test_who_asks_for_the_weight_gets_the_product(self, norm_first):
        """Torch's transformer layer reads it in evaluation, past the layer's forward."""
        block = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True, norm_first=norm_first)
        assert apply_factorization(block, min_features=16, latent_features=4) == [
            *("linear1", "linear2")
        ]
        x = draw(2, 5, 16)
        expected = block.eval()(x)
        with torch.no_grad():
            torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)

    def test_fewer_parameters(self):
        layer = nn.Conv2d(64, 64, 3, bias=False)
        apply_factorization(layer, min_channels=64)
        assert sum(p.numel() for p in layer.parameters()) == 16 * (64 * 9 + 64)


class TestWhatIsSplit:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, ["1", "4", "5"]),
            ({"factorize_convs": False}, ["4", "5"]),
            ({"factorize_linears": False}, ["1"]),
            ({"min_channels": 17}, ["4", "5"]),
            ({"min_features": 6}, ["1", "4"]),
            ({"latent_features": 5}, ["1", "4"]),  # saves nothing for 24 x 5
            ({"latent_channels": 1000}, ["4", "5"]),
        ],
    )
    def test_settings(self, options, expected):
        assert apply_factorization(small_net(), **{**SMALL, **options}) == expected

    def test_left_untouched(self):
        class Own(nn.Linear):
            pass

        shared = nn.Linear(16, 16)
        tied = nn.Linear(16, 16)
        tied.weight = shared.weight
        layers = [
            Own(16, 16),
            nn.Conv2d(16, 16, 3, groups=2),
            nn.ConvTranspose2d(16, 16, 3),
            nn.Conv1d(16, 16, 3),
            nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
            shared,
            tied,
            nn.MultiheadAttention(16, 2),
        ]
        model, kinds = nn.Sequential(*layers), [type(layer) for layer in layers]
        with pytest.warns(NoEffectWarning, match="apply_factorization: the model has no layers wi"):
            assert apply_factorization(model, True, True, 16, 2, 16, 2) == []
        assert [type(layer) for layer in layers] == kinds

    def test_tied_embeddings_stay_tied(self):
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=64))
        with pytest.warns(NoEffectWarning):
            apply_factorization(model, min_features=16, latent_features=2)
        assert model.lm_head.weight is model.transformer.wte.weight

    @pytest.mark.parametrize(
        ("make", "count"),
        [
            (resnet50, 31),
            (vit_b_16, 25),
            (lambda: timm.create_model("resnet50"), 31),
            (lambda: timm.create_model("vit_base_patch16_224"), 49),
            (lambda: ResNetModel(ResNetConfig()), 30),
            (lambda: ViTModel(ViTConfig()), 73),
        ],
        ids=["torchvision resnet", "torchvision vit", "timm resnet", "timm vit", "hf", "hf vit"],
    )
    def test_known_models(self, make, count, monkeypatch):
        """Which layers, without the decomposition, which takes seconds."""

        def shapes(weight, rank):
            return weight.new_empty(len(weight), rank), weight.new_empty(rank, weight.shape[1])

        monkeypatch.setattr(module_under_test, "factorize_matrix", shapes)
        with torch.device("meta"):
            model = make()
        before = sum(p.numel() for p in model.parameters())
        assert len(apply_factorization(model)) == count
        assert sum(p.numel() for p in model.parameters()) < 0.6 * before

    def test_a_vision_transformer_still_runs(self):
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = ViTConfig(**sizes, intermediate_size=64, image_size=16, patch_size=8)
        model, x = ViTModel(config).eval(), draw(2, 3, 16, 16)
        assert len(apply_factorization(model, min_features=32, latent_features=8)) == 7
        assert torch.isfinite(model(x).last_hidden_state).all()


class TestSurgery:
    def test_names(self):
        model = small_net()
        keys, others = list(model.state_dict()), dict(model.named_parameters())
        modules = dict(model.named_modules())
        names = apply_factorization(model, **SMALL)
        split = {f"{name}.weight" for name in names}
        expected = set(keys) - split
        expected |= {f"{n}.{factor}" for n in names for factor in ("weight_in", "weight_out")}
        assert set(model.state_dict()) == expected
        assert all(model.get_parameter(n) is others[n] for n in others.keys() - split)
        assert dict(model.named_modules()) == modules

    def test_checkpoints(self):
        model, again = small_net().eval(), small_net().eval()
        apply_factorization(model, **SMALL)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
        apply_factorization(again, **SMALL)
        again.load_state_dict(model.state_dict())
        x = draw(2, 3, 8, 8)
        assert torch.equal(again(x), model(x))
        with pytest.raises(RuntimeError, match="Missing key"):
            small_net().load_state_dict(model.state_dict())

    def test_the_same_on_every_call(self):
        one, other = small_net(), small_net()
        for model in (one, other):
            apply_factorization(model, **SMALL)
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_idempotent(self):
        model = small_net()
        first = apply_factorization(model, **SMALL)
        parameters = list(model.parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert apply_factorization(model, **SMALL) == first
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))

    def test_hooks_mode_and_frozen_weights_stay(self):
        model, calls = small_net().eval(), []
        model[1].register_forward_hook(lambda *args: calls.append(1))
        model[1].weight.requires_grad_(False)
        apply_factorization(model, **SMALL)
        model(draw(1, 3, 8, 8))
        assert calls == [1]
        assert not model[1].training
        assert not model[1].weight_in.requires_grad
        assert not model[1].weight_out.requires_grad
        assert model[4].weight_in.requires_grad

    def test_copies_and_files(self):
        model, file = small_net().eval(), io.BytesIO()
        apply_factorization(model, **SMALL)
        x = draw(2, 3, 8, 8)
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(other(x), model(x))

    def test_optimizers_made_before_get_the_factors_in_the_same_group(self):
        model = small_net()
        decay = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() <= 1]
        optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest}])
        apply_factorization(model, **SMALL, optimizers=optimizer)
        held = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
        assert held[0] == {id(p) for p in model.parameters() if p.dim() > 1}
        assert held[1] == {id(p) for p in model.parameters() if p.dim() <= 1}
        before = copy.deepcopy(list(model.parameters()))
        model(draw(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        assert not any(map(torch.equal, before, model.parameters()))

    def test_frozen_layers_may_be_unfrozen_later(self):
        """As fastai's do: the optimizer holds them all the time."""
        model = small_net().requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        apply_factorization(model, **SMALL, optimizers=optimizer)
        assert not any(p.requires_grad for p in model.parameters())
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters()}

    def test_an_optimizer_of_other_parameters_is_refused(self):
        optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
        with pytest.raises(UnsupportedError, match="no optimizer trains the one they belong to"):
            apply_factorization(small_net(), **SMALL, optimizers=[optimizer])

    def test_run(self):
        model = small_net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        run = Run([Factorize(**{**SMALL, "latent_features": 5})], model=model, optimizer=optimizer)
        assert run.report.changes["Factorize"] == ["1", "4"]
        assert "Factorize left 5: at this rank two layers would be no smaller" in run.report.notes
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters()}


class TestWithOthers:
    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
    def test_a_recipe(self, order):
        """Factorize comes first: blurred are the factors, standardised is what is whole."""
        algorithms = [Factorize(**SMALL), BlurPool(), WeightStandardization()]
        model = small_net().double()
        run = Run([algorithms[i] for i in order], model=model)
        assert isinstance(model[1], FactorizedConv2d)
        assert isinstance(model[1], BlurConv2d)
        assert not isinstance(model[1], Standardized)
        assert run.report.changes["WeightStandardization"] == ["0"]
        assert run.report.changes["BlurPool"] == ["1"]
        x = draw(2, 16, 8, 8, dtype=torch.float64)
        blurred = blur_pool2d(x, model[1].blur_filter)
        expected = F.conv2d(blurred, model[1].weight, model[1].bias, 2, 1)
        torch.testing.assert_close(model[1](x), expected)
        torch.testing.assert_close(copy.deepcopy(model)[1](x), expected)

    def test_standardised_or_blurred_before_it_stays_whole(self):
        model = small_net()
        Run([BlurPool(), WeightStandardization()], model=model)
        assert apply_factorization(model, **SMALL) == ["4", "5"]


class TestPrecisionAndCompilation:
    def test_autocast(self):
        model, x = small_net().eval(), draw(2, 3, 8, 8)
        apply_factorization(model, **SMALL)
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x)
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), exact, rtol=0.05, atol=0.05)

    def test_compiles_without_a_graph_break(self):
        model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
        names = apply_factorization(model, min_channels=256)
        assert names == ["layer3.0.conv2"] + [
            f"layer4.0.{name}" for name in ("conv1", "conv2", "downsample.0")
        ]
        eager = copy.deepcopy(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        x = draw(4, 3, 32, 32)
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["min_channels", "min_features"])
def test_settings(name):
    with pytest.raises(ValueError, match=f"Factorize: {name} must be at least 1, got 0"):
        Factorize(**{name: 0})


def test_something_to_split():
    with pytest.raises(ValueError, match="factorize_convs or factorize_linears must be true"):
        Factorize(factorize_convs=False, factorize_linears=False)
