"""Residual blocks are found by what they compute, in every library's models."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision import models

from mosaic_core.residual import Shortcut, no_gradient, residual_blocks


class Residual(nn.Module):
    """The input plus a branch; perhaps rectified, perhaps with more to return."""

    def __init__(self, branch, end=None, form=lambda y: y):
        super().__init__()
        self.branch, self.end, self.form = branch, end, form

    def forward(self, x):
        y = x + self.branch(x)
        return self.form(y if self.end is None else self.end(y))


class InPlace(Residual):
    """One that leaves nothing to fall back on."""

    def forward(self, x):
        x += self.branch(x)
        return x


def conv():
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))


def linear():
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))


BARE = Shortcut(False, False, ())
RELU = Shortcut(True, False, ())


def shortcuts(model, pattern=None):
    return {name: shortcut for name, (_, shortcut) in residual_blocks(model, pattern).items()}


def on_meta(make):
    with torch.device("meta"):
        return make()


def timm_model(name):
    return on_meta(lambda: pytest.importorskip("timm").create_model(name))


def hf_model(name, config, **options):
    hf = pytest.importorskip("transformers")
    return on_meta(lambda: getattr(hf, name)(getattr(hf, config)(**options)))


def bottlenecks(prefix="layer{}.{}", first=1):
    """The blocks of a ResNet-50 that keep the shape: all but the first of each stage."""
    return [
        prefix.format(stage + first, i) for stage, n in enumerate((3, 4, 6, 3)) for i in range(1, n)
    ]


class TestLibraries:
    @pytest.mark.parametrize(
        ("make", "names", "shortcut"),
        [
            (lambda: on_meta(models.resnet50), bottlenecks(), RELU),
            (
                lambda: on_meta(models.resnet18),
                ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"],
                RELU,
            ),
            (
                lambda: on_meta(models.vit_b_16),
                [f"encoder.layers.encoder_layer_{i}" for i in range(12)],
                BARE,
            ),
            (lambda: timm_model("resnet50"), bottlenecks(), RELU),
            (lambda: timm_model("vit_base_patch16_224"), [f"blocks.{i}" for i in range(12)], BARE),
            (
                lambda: hf_model("ResNetForImageClassification", "ResNetConfig"),
                bottlenecks("resnet.encoder.stages.{}.layers.{}", 0),
                RELU,
            ),
            (
                lambda: hf_model("BertModel", "BertConfig"),
                [f"encoder.layer.{i}" for i in range(12)],
                BARE,
            ),
            (
                lambda: hf_model("GPT2LMHeadModel", "GPT2Config"),
                [f"transformer.h.{i}" for i in range(12)],
                BARE,
            ),
            (
                lambda: nn.TransformerEncoder(
                    nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2
                ),
                ["layers.0", "layers.1"],
                BARE,
            ),
        ],
        ids=[
            *("torchvision resnet50", "torchvision resnet18", "torchvision vit", "timm resnet50"),
            *("timm vit", "HF resnet", "HF bert", "HF gpt2", "nn.TransformerEncoder"),
        ],
    )
    def test_blocks_are_found(self, make, names, shortcut):
        found = shortcuts(make())
        assert list(found) == names
        assert set(found.values()) == {shortcut}

    def test_blocks_of_hf_vit_are_found(self):
        found = shortcuts(hf_model("ViTModel", "ViTConfig"))
        assert [name.rpartition(".")[2] for name in found] == [str(i) for i in range(12)]
        assert all(shortcut.beside is not None for shortcut in found.values())

    @pytest.mark.parametrize("make", [models.vgg11_bn, models.densenet121, models.alexnet])
    def test_plain_stacks_have_none(self, make):
        assert shortcuts(on_meta(make)) == {}

    def test_blocks_that_need_more_arguments_are_trusted_by_name_alone(self):
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        model = hf_model("LlamaModel", "LlamaConfig", num_hidden_layers=2, vocab_size=9, **sizes)
        assert shortcuts(model) == {}
        trusted = Shortcut(False, False, None)
        assert shortcuts(model, "LlamaDecoderLayer") == {"layers.0": trusted, "layers.1": trusted}


class TestWhatIsFound:
    def test_forms_of_the_output(self):
        model = nn.Sequential(
            Residual(conv()),
            Residual(conv(), nn.ReLU()),
            Residual(linear()),
            Residual(linear(), nn.LayerNorm(6)),
            Residual(linear(), form=lambda y: (y,)),
            Residual(linear(), form=lambda y: (y, None)),
            Residual(linear(), form=lambda y: (y, y.sum())),
        )
        assert list(shortcuts(model).values()) == [
            *(BARE, RELU, BARE, BARE),
            *(Shortcut(False, True, ()), Shortcut(False, True, (None,))),
            Shortcut(False, True, None),
        ]

    @pytest.mark.parametrize(
        "block",
        [
            conv(),
            Residual(conv(), nn.SiLU()),
            nn.Sequential(conv(), nn.ReLU()),
            nn.Sequential(nn.LayerNorm(6), nn.Dropout()),
            Residual(nn.Conv2d(4, 8, 3)),
            nn.Conv2d(4, 4, 1),
            InPlace(linear()),
            nn.Sequential(nn.Identity()),
            nn.Sequential(),
        ],
        ids=["conv", "silu", "vgg", "norm", "shape", "leaf", "in place", "identity", "empty"],
    )
    def test_others_are_not(self, block):
        assert shortcuts(nn.Sequential(block)) == {}

    def test_a_gate_before_the_weights(self):
        block = Residual(linear())
        block.gate = nn.Parameter(torch.zeros(1))
        assert next(block.parameters()) is block.gate
        assert shortcuts(nn.Sequential(block)) == {"0": BARE}

    def test_weights_that_are_divided_by_their_norm_are_trusted_by_name(self):
        model = nn.Sequential(Residual(weight_norm(nn.Linear(6, 6))))
        assert shortcuts(model) == {}
        assert shortcuts(model, "0") == {"0": Shortcut(False, False, None)}

    def test_the_innermost_of_nested_blocks(self):
        model = nn.Sequential(nn.Sequential(Residual(conv()), Residual(conv())))
        assert list(shortcuts(model)) == ["0.0", "0.1"]

    def test_members_of_lists_only(self):
        holder = nn.Module()
        holder.block = Residual(conv())
        assert shortcuts(holder) == {}
        assert shortcuts(holder, "block") == {"block": BARE}

    def test_one_that_cannot_be_tried_goes_by_its_class(self):
        fixed = Residual(linear())
        fixed.branch[0] = nn.Linear(6, 12)
        fixed.register_buffer("mask", torch.zeros(49, 6))
        fixed.branch.register_forward_pre_hook(lambda m, args: (args[0] + fixed.mask,))
        assert shortcuts(nn.Sequential(fixed)) == {}
        model = nn.Sequential(Residual(linear()), fixed)
        assert shortcuts(model) == {"0": BARE, "1": BARE}


class TestPatterns:
    model = nn.Sequential(Residual(conv(), nn.ReLU()), Residual(conv()), nn.BatchNorm2d(4), conv())

    @pytest.mark.parametrize(
        ("pattern", "names"),
        [
            ("0", ["0"]),
            ("[01]", ["0", "1"]),
            ("Residual", ["0", "1"]),
            ("*", []),  # the model itself, which is not residual
            ("2", ["2"]),  # a norm that is neutral is the identity
            ("3", []),
            ("?.branch*", []),
            ("nothing", []),
        ],
    )
    def test_choose(self, pattern, names):
        assert list(shortcuts(self.model, pattern)) == names

    def test_the_outermost_of_nested_matches(self):
        model = nn.Sequential(nn.Sequential(Residual(conv()), Residual(conv())))
        assert list(shortcuts(model, "0*")) == ["0"]
        assert list(shortcuts(model, "0.?")) == ["0.0", "0.1"]


class TestTrials:
    def test_leave_the_model_and_the_streams_as_they_were(self):
        model = nn.Sequential(Residual(conv(), nn.ReLU()), Residual(conv()).eval())
        before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
        parameters, stream = list(model.parameters()), torch.get_rng_state()
        assert len(residual_blocks(model)) == 2
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
        assert [m.training for m in model.modules()] == modes
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert torch.equal(torch.get_rng_state(), stream)

    def test_modes_come_back_after_an_error(self):
        class Stop(Residual):
            def forward(self, x):
                raise KeyboardInterrupt

        model = nn.Sequential(Stop(conv()))
        with pytest.raises(KeyboardInterrupt):
            residual_blocks(model)
        assert all(m.training for m in model.modules())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_any_dtype_and_any_weights(self, dtype):
        model = nn.Sequential(Residual(conv(), nn.ReLU())).to(dtype)
        model[0].branch[1].running_mean += 3
        model[0].branch[1].weight.data.fill_(float("nan"))
        assert shortcuts(model) == {"0": RELU}


class TestNoGradient:
    def test_gives_zeros_and_counts_as_used(self):
        block, calls = nn.Linear(2, 3), []
        block.bias.requires_grad_(False)
        block.weight.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.clone()))
        x = torch.ones(2, requires_grad=True)
        y = x + no_gradient(block, x)
        assert torch.equal(y, x)
        y.sum().backward()
        assert torch.equal(x.grad, torch.ones(2))
        assert block.bias.grad is None
        (grad,) = calls
        assert torch.equal(grad, torch.zeros(3, 2))
        assert grad.is_contiguous()

    def test_adds_to_what_is_there(self):
        block = nn.Linear(2, 3)
        block.weight.grad = torch.ones(3, 2)
        no_gradient(block, torch.ones(2)).backward()
        assert torch.equal(block.weight.grad, torch.ones(3, 2))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtype(self, dtype):
        block = nn.Linear(2, 2)
        zero = no_gradient(block, torch.ones(2, dtype=dtype))
        assert zero.dtype == dtype
        zero.backward()
        assert block.weight.grad.dtype == torch.float32

    def test_frozen(self):
        block = nn.Linear(2, 2).requires_grad_(False)
        assert not no_gradient(block, torch.ones(2)).requires_grad
