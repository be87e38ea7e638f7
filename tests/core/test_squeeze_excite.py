"""SqueezeExcite against its equations in NumPy, and which optimizer groups its weights join."""

import copy
import io
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.models import resnet50, vit_b_16
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from mosaic_core import NoEffectWarning, Run, UnsupportedError
from mosaic_core.algorithms import (
    BlurPool,
    Factorize,
    SqueezeExcite,
    apply_blurpool,
    apply_squeeze_excite,
)
from mosaic_core.algorithms._squeeze_excite import SqueezeExcite2d


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def excite_by_hand(x, squeeze, excite):
    """Eq. 2 to 4 of the paper."""
    z = x.mean((2, 3))
    s = 1 / (1 + np.exp(-np.maximum(z @ squeeze.T, 0) @ excite.T))
    return x * s[:, :, None, None]


def small_resnet(kind=BasicBlock):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResNet(kind, [1, 1, 1, 1], num_classes=5)


def on_meta(make):
    with torch.device("meta"):
        return make()


def new(model):
    return [n for n in dict(model.named_parameters()) if ".squeeze_excite." in f".{n}"]


class TestBlock:
    @pytest.mark.parametrize("size", [(4, 4), (1, 7)])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_equals_the_paper(self, dtype, size):
        block = SqueezeExcite2d(6, 3).to(dtype)
        x = draw(2, 6, *size, dtype=dtype)
        y = block(x)
        weights = (w.detach().double().numpy() for w in block.parameters())
        expected = excite_by_hand(x.double().numpy(), *weights)
        assert y.dtype == dtype
        tolerance = 8 * torch.finfo(dtype).eps
        np.testing.assert_allclose(
            y.detach().double().numpy(), expected, rtol=tolerance, atol=tolerance
        )

    def test_unbatched_and_gradients(self):
        block, x = SqueezeExcite2d(6, 3).double(), draw(2, 6, 3, 3, dtype=torch.float64)
        torch.testing.assert_close(block(x[0]), block(x)[0])
        assert torch.autograd.gradcheck(block, (x.requires_grad_(),))

    def test_is_initialised_as_a_linear_layer_from_the_generator(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            ours = SqueezeExcite2d(64, 16)
            torch.manual_seed(3)
            layers = nn.Linear(64, 16, bias=False), nn.Linear(16, 64, bias=False)
        assert torch.equal(ours.squeeze.weight, layers[0].weight)
        assert torch.equal(ours.excite.weight, layers[1].weight)
        state = torch.get_rng_state()
        one, other = (SqueezeExcite2d(64, 16, generator(s)).squeeze.weight for s in (1, 1))
        assert torch.equal(one, other)
        assert not torch.equal(one, SqueezeExcite2d(64, 16, generator(2)).squeeze.weight)
        assert torch.equal(torch.get_rng_state(), state)


class TestPlacement:
    def test_output_is_the_convolution_weighted(self):
        conv = nn.Conv2d(4, 6, 3).double()
        x = draw(2, 4, 5, 5, dtype=torch.float64)
        plain = conv(x).detach().numpy()
        assert apply_squeeze_excite(nn.Sequential(conv), 3, 4) == ["0"]
        weights = (w.detach().numpy() for w in conv.squeeze_excite.parameters())
        np.testing.assert_allclose(
            conv(x).detach().numpy(), excite_by_hand(plain, *weights), rtol=1e-12, atol=1e-12
        )

    @pytest.mark.parametrize(
        ("channels", "changed"),
        [((8, 8), True), ((7, 8), False), ((8, 7), False), ((16, 9), True)],
    )
    def test_min_channels(self, channels, changed):
        model = nn.Sequential(nn.Conv2d(*channels, 1), nn.Conv2d(8, 8, 1))
        assert apply_squeeze_excite(model, min_channels=8) == (["0", "1"] if changed else ["1"])

    @pytest.mark.parametrize(("latent", "size"), [(64, 64), (1, 1), (1.0, 1), (0.25, 4), (0.01, 1)])
    def test_latent_channels(self, latent, size):
        model = nn.Sequential(nn.Conv2d(8, 16, 1))
        apply_squeeze_excite(model, latent, 8)
        assert model[0].squeeze_excite.squeeze.weight.shape == (size, 16)
        assert model[0].squeeze_excite.excite.weight.shape == (16, size)

    def test_resnet50(self):
        model = on_meta(resnet50)
        wide = [
            n
            for n, m in model.named_modules()
            if isinstance(m, nn.Conv2d) and min(m.in_channels, m.out_channels) >= 128
        ]
        assert apply_squeeze_excite(model) == wide
        assert len(wide) == 42
        assert "conv1" not in wide

    @pytest.mark.parametrize(
        ("library", "make", "count"),
        [
            ("timm", lambda timm: timm.create_model("resnet50"), 42),
            ("transformers", lambda hf: hf.ResNetModel(hf.ResNetConfig()), 42),
        ],
    )
    def test_other_libraries(self, library, make, count):
        module = pytest.importorskip(library)
        assert len(apply_squeeze_excite(on_meta(lambda: make(module)))) == count

    def test_no_effect(self):
        for model in (on_meta(vit_b_16), nn.Conv2d(3, 8, 1)):
            with pytest.warns(NoEffectWarning, match="no convolution of 128 channels or more"):
                assert apply_squeeze_excite(model) == []

    @pytest.mark.parametrize("first", [True, False])
    def test_composes_with_other_surgery_of_the_convolution(self, first):
        model = nn.Sequential(nn.Conv2d(16, 16, 3, 2, padding=1))
        for apply in (apply_blurpool, apply_squeeze_excite)[:: 1 if first else -1]:
            arguments = {"min_channels": 16}
            assert apply(model, **arguments) == ["0"]
        y = model(x := draw(1, 16, 8, 8))
        blurred = copy.deepcopy(model)
        blurred[0]._forward_hooks.clear()
        assert torch.equal(y, model[0].squeeze_excite(blurred(x)))
        plain = nn.Sequential(nn.Conv2d(16, 16, 3, 2, padding=1))
        plain.load_state_dict(model.state_dict(), strict=False)
        assert not torch.allclose(plain(x), blurred(x))


class TestErrors:
    @pytest.mark.parametrize("latent", [0, -1, 1.5, float("nan")])
    def test_latent_channels(self, latent):
        with pytest.raises(ValueError, match="SqueezeExcite: latent_channels must be a whole"):
            SqueezeExcite(latent_channels=latent)
        with pytest.raises(ValueError, match="apply_squeeze_excite: latent_channels must be"):
            apply_squeeze_excite(nn.Conv2d(1, 1, 1), latent)

    def test_min_channels(self):
        with pytest.raises(ValueError, match="SqueezeExcite: min_channels must be at least 1"):
            SqueezeExcite(min_channels=0)


class TestSurgery:
    def test_old_parameters_and_names_stay(self):
        model = small_resnet()
        parameters, keys = dict(model.named_parameters()), list(model.state_dict())
        modules = dict(model.named_modules())
        names = apply_squeeze_excite(model)
        assert all(model.get_parameter(n) is p for n, p in parameters.items())
        assert all(model.get_submodule(n) is m for n, m in modules.items())
        added = [key for key in model.state_dict() if key not in keys]
        assert [key for key in model.state_dict() if key in keys] == keys
        assert added == [
            f"{n}.squeeze_excite.{part}.weight" for n in names for part in ("squeeze", "excite")
        ]
        assert all(type(model.get_submodule(n)) is nn.Conv2d for n in names)

    def test_idempotent(self):
        model = small_resnet()
        first, x = apply_squeeze_excite(model), draw(2, 3, 32, 32)
        parameters, y = list(model.parameters()), model.eval()(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert apply_squeeze_excite(model) == first
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert torch.equal(model(x), y)

    def test_weights_take_device_dtype_and_mode_of_the_convolution(self):
        model = nn.Sequential(
            nn.Conv2d(8, 8, 1, dtype=torch.bfloat16).eval(), nn.Conv2d(8, 8, 1, device="meta")
        )
        apply_squeeze_excite(model, 4, 8)
        weights = [m.squeeze_excite.squeeze.weight for m in model]
        assert [(w.dtype, w.device.type) for w in weights] == [
            (torch.bfloat16, "cpu"),
            (torch.float32, "meta"),
        ]
        assert not model[0].squeeze_excite.training
        assert model[1].squeeze_excite.training

    def test_copies_and_files(self):
        model = small_resnet().eval()
        apply_squeeze_excite(model)
        x, file = draw(2, 3, 32, 32), io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(other(x), model(x))

    def test_channels_last(self):
        model = nn.Sequential(nn.Conv2d(8, 8, 3)).to(memory_format=torch.channels_last)
        apply_squeeze_excite(model, 4, 8)
        y = model(draw(2, 8, 6, 6).contiguous(memory_format=torch.channels_last))
        assert y.is_contiguous(memory_format=torch.channels_last)

    def test_autocast(self):
        model, x = nn.Sequential(nn.Conv2d(8, 8, 3)), draw(2, 8, 6, 6)
        apply_squeeze_excite(model, 4, 8)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x)
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), model(x), rtol=0.03, atol=0.03)

    def test_compiles_without_a_graph_break(self):
        model, x = small_resnet().layer3.eval(), draw(2, 128, 8, 8)
        assert len(apply_squeeze_excite(model)) == 3
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def groups(model):
    """The usual two: norms and biases do not decay."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


def ids(optimizer):
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


class TestOptimizers:
    @pytest.mark.parametrize("how", ["function", "run", "late start", "several"])
    def test_new_parameters_join_the_group_of_their_convolution(self, how):
        model = small_resnet()
        if how == "several":
            optimizer = [torch.optim.SGD([group], lr=0.1) for group in groups(model)]
            decay, rest = (o.param_groups[0] for o in optimizer)
        else:
            optimizer = torch.optim.SGD(groups(model), lr=0.1)
            decay, rest = optimizer.param_groups
        before = list(map(id, rest["params"]))
        if how == "run":
            Run([SqueezeExcite()], model=model, optimizer=optimizer)
        elif how == "late start":
            Run([SqueezeExcite()], model=model).start([optimizer])
        else:
            apply_squeeze_excite(model, optimizers=optimizer)
        held = {id(p) for p in decay["params"]}
        assert new(model)
        assert all(id(model.get_parameter(name)) in held for name in new(model))
        assert len(decay["params"]) == len(held) == len(groups(model)[0]["params"])
        assert list(map(id, rest["params"])) == before
        at = {id(p): i for i, p in enumerate(decay["params"])}
        conv = model.layer3[0].conv1
        follow = [conv.weight, *conv.squeeze_excite.parameters()]
        assert [at[id(p)] - at[id(conv.weight)] for p in follow] == [0, 1, 2]

    @pytest.mark.parametrize("made_by", ["Factorize", "weight_norm"])
    def test_beside_a_weight_that_is_made_of_others(self, made_by):
        model = nn.Sequential(nn.Conv2d(128, 128, 3), nn.Conv2d(3, 8, 1))
        recipe = [SqueezeExcite()]
        if made_by == "Factorize":
            recipe.append(Factorize(min_channels=128))
        else:
            weight_norm(model[0])
        optimizer = torch.optim.SGD(groups(model), lr=0.1)
        Run(recipe, model=model, optimizer=optimizer)
        assert [len(group["params"]) for group in optimizer.param_groups] == [5, 2]
        assert all(id(p) in ids(optimizer) for p in model.parameters())

    def test_a_step_trains_and_decays_them(self):
        model = small_resnet()
        optimizer = torch.optim.SGD(groups(model), lr=0.1, momentum=0.9)
        run = Run([SqueezeExcite()], model=model, optimizer=optimizer)
        before = {n: model.get_parameter(n).detach().clone() for n in new(model)}
        x, y = run.on_batch(draw(4, 3, 32, 32), torch.arange(4))
        F.cross_entropy(model(x), y).backward()
        grads = {n: model.get_parameter(n).grad.clone() for n in before}
        run.step()
        for name, weight in before.items():
            assert grads[name].abs().sum() > 0
            expected = weight - 0.1 * (grads[name] + 0.1 * weight)
            torch.testing.assert_close(model.get_parameter(name).detach(), expected)

    def test_applied_again_they_are_in_no_group_twice(self):
        model = small_resnet()
        optimizer = torch.optim.SGD(groups(model), lr=0.1)
        for _ in range(2):
            apply_squeeze_excite(model, optimizers=[optimizer])
        assert sum(len(g["params"]) for g in optimizer.param_groups) == len(
            list(model.parameters())
        )

    def test_an_optimizer_of_other_parameters_is_refused(self):
        model = small_resnet()
        with pytest.raises(UnsupportedError, match="no optimizer trains the one they belong to"):
            apply_squeeze_excite(model, optimizers=torch.optim.SGD(model.fc.parameters(), lr=0.1))


class TestInARun:
    def weights(self, seed=0, rank=0, wrap=False):
        model = small_resnet(Bottleneck)
        if wrap:
            holder = nn.Module()
            holder.net = model
        Run([SqueezeExcite()], model=holder if wrap else model, seed=seed, rank=rank)
        return [model.get_parameter(n).detach() for n in new(model)]

    def test_the_seed_alone_decides_the_new_weights(self):
        """Every rank has the same, wherever the model stands and whatever the global stream."""
        first = self.weights()
        state = torch.get_rng_state()
        for other in (self.weights(rank=1), self.weights(wrap=True)):
            assert all(map(torch.equal, first, other))
        assert torch.equal(torch.get_rng_state(), state)
        assert not any(map(torch.equal, first, self.weights(seed=1)))
        assert len({float(w.flatten()[0]) for w in first}) == len(first)

    def test_is_reported(self):
        model = small_resnet()
        run = Run([SqueezeExcite()], model=model)
        assert run.report.changes["SqueezeExcite"] == apply_squeeze_excite(model)

    def test_a_checkpoint_loads_into_a_model_with_the_recipe(self):
        model, other = small_resnet(), small_resnet()
        Run([BlurPool(), SqueezeExcite()], model=model, seed=0)
        Run([BlurPool(), SqueezeExcite()], model=other, seed=1)
        x = draw(2, 3, 32, 32)
        assert not torch.equal(model.eval()(x), other.eval()(x))
        other.load_state_dict(model.state_dict())
        assert torch.equal(model(x), other(x))
        with pytest.raises(RuntimeError, match=r"Unexpected key.*squeeze_excite"):
            small_resnet().load_state_dict(model.state_dict())
