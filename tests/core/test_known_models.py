"""Surgery on the models that people use: names, parameters, groups, repetition and compilation."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mosaic_core import NoEffectWarning, Run
from mosaic_core.algorithms import (
    Backdrop,
    BlurPool,
    ChannelsLast,
    Factorize,
    GhostBatchNorm,
    GyroDropout,
    SqueezeExcite,
    StochasticDepth,
    WeightStandardization,
)

vision = pytest.importorskip("torchvision.models")
timm = pytest.importorskip("timm")


def hf(name):
    transformers = pytest.importorskip("transformers")
    if name == "ResNet":
        return transformers.ResNetForImageClassification(transformers.ResNetConfig())
    return transformers.ViTForImageClassification(transformers.ViTConfig())


MODELS = {
    "torchvision ResNet-50": vision.resnet50,
    "torchvision ViT-B": vision.vit_b_16,
    "timm ResNet-50": lambda: timm.create_model("resnet50"),
    "timm ViT-B": lambda: timm.create_model("vit_base_patch16_224"),
    "HF ResNet-50": lambda: hf("ResNet"),
    "HF ViT-B": lambda: hf("ViT"),
}

# How many modules each changes, or None where it finds nothing and warns. BlurPool: strided
# convolutions of 16 channels or more, and the max-pool; the patches of a ViT have 3 channels.
COUNTS = {
    BlurPool(): (7, None, 7, None, 7, None),
    GhostBatchNorm(): (53, None, 53, None, 53, None),
    WeightStandardization(): (53, 1, 53, 1, 53, 1),
    StochasticDepth(): (12, 12, 12, 12, 12, 12),
    GyroDropout(): (None, 37, None, 62, None, 37),
    SqueezeExcite(): (42, None, 42, None, 42, None),
    ChannelsLast(): (1, 1, 1, 1, 1, 1),
}
CELLS = [
    pytest.param(algorithm, model, count, id=f"{algorithm.name}-{model}")
    for algorithm, counts in COUNTS.items()
    for model, count in zip(MODELS, counts, strict=True)
]
ADDS = (SqueezeExcite,)


@pytest.fixture(scope="module")
def model_of():
    """Make each model once, and hand out copies that share nothing with it."""
    made = {}

    def make(name):
        if name not in made:
            with torch.random.fork_rng([]), torch.device("meta"):
                torch.manual_seed(0)
                made[name] = MODELS[name]()
        return copy.deepcopy(made[name])

    return make


def groups_of(model):
    """Decay for matrices and kernels, none for the rest, as most scripts do."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]


def ids(group):
    return list(map(id, group["params"]))


@pytest.mark.parametrize(("algorithm", "name", "count"), CELLS)
def test_surgery(algorithm, name, count, model_of):
    model = model_of(name)
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    optimizer = torch.optim.SGD(groups_of(model), lr=0.1)
    before = [ids(group) for group in optimizer.param_groups]
    if count is None:
        with pytest.warns(NoEffectWarning, match=r"nothing was changed"):
            Run([algorithm], model=model)
        assert list(model.state_dict()) == keys
        return
    run = Run([algorithm], model=model)
    run.start([optimizer], total_steps=100, steps_per_epoch=10)
    assert algorithm.name in str(run.report)
    changed = run.report.changes.get(algorithm.name)
    assert changed is None or len(changed) == count
    for key, parameter in parameters.items():
        assert model.get_parameter(key) is parameter
    after = [ids(group) for group in optimizer.param_groups]
    if isinstance(algorithm, ADDS):
        assert set(keys) < set(model.state_dict())
        # Beside the convolutions they follow, in the group that decays.
        assert set(before[0]) < set(after[0])
        assert before[1] == after[1]
        assert sum(map(len, after)) == len(list(model.parameters()))
    else:
        assert list(model.state_dict()) == keys
        assert before == after
    once = [(n, type(m)) for n, m in model.named_modules()]
    again = Run([algorithm], model=model)
    assert [(n, type(m)) for n, m in model.named_modules()] == once
    assert again.report.changes == run.report.changes


@pytest.mark.parametrize("name", ["timm ResNet-50", "torchvision ViT-B"])
def test_factorize_replaces_what_it_splits(name):
    with torch.random.fork_rng([]):
        model = MODELS[name]()  # it needs the weights themselves
    kept, before = dict(model.named_parameters()), sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.SGD(groups_of(model), lr=0.1)
    run = Run([Factorize()], model=model)
    run.start([optimizer], total_steps=100)
    split = run.report.changes["Factorize"]
    assert split
    for key, parameter in kept.items():
        if id(parameter) not in run.new_parameters.replaced:
            assert model.get_parameter(key) is parameter
    assert sum(p.numel() for p in model.parameters()) < before
    held = [i for group in optimizer.param_groups for i in ids(group)]
    assert sorted(held) == sorted(map(id, model.parameters()))
    assert all(p.dim() > 1 for p in optimizer.param_groups[0]["params"])


SURGERY = [
    Backdrop("layer4"),
    BlurPool(),
    ChannelsLast(),
    Factorize(min_channels=128),
    GhostBatchNorm(4),
    GyroDropout(),
    SqueezeExcite(min_channels=64),
    StochasticDepth(),
    StochasticDepth("sample", 0.5),
    WeightStandardization(),
]


@pytest.mark.parametrize("algorithm", SURGERY, ids=repr)
def test_a_changed_resnet_compiles_to_one_graph(algorithm):
    torch._dynamo.reset()  # of the last algorithm, or it counts as a recompilation
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = vision.resnet18(num_classes=5)
    model.fc = nn.Sequential(nn.Dropout(0.0), model.fc)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoEffectWarning)
        run = Run([algorithm], model=model)
    run.start([torch.optim.SGD(model.parameters(), lr=0.1)], total_steps=10, steps_per_epoch=5)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x, y = run.on_batch(torch.randn(8, 3, 32, 32), torch.randint(5, (8,)))
    other = Run([algorithm], model=compiled._orig_mod)  # draws the same
    other.start([torch.optim.SGD(compiled.parameters(), lr=0.1)], total_steps=10)
    other.on_batch(x, y)
    losses = [F.cross_entropy(m(x), y) for m in (model, compiled)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)
    for a, b in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)


# Forward and backward, on small members of the same families.


def small(name):
    if name == "torchvision ResNet":
        return vision.ResNet(vision.resnet.Bottleneck, [1, 2, 1, 1], num_classes=5)
    if name == "torchvision ViT":
        return vision.VisionTransformer(32, 16, 3, 2, 48, 96, num_classes=5)
    if name == "timm ResNet":
        return timm.create_model("resnet26", num_classes=5)
    if name == "timm ViT":
        return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=5)
    transformers = pytest.importorskip("transformers")
    if name == "HF ResNet":
        sizes = {"embedding_size": 16, "hidden_sizes": [32, 64, 128, 128], "depths": [2, 2, 2, 2]}
        config = transformers.ResNetConfig(**sizes, num_labels=5)
        return transformers.ResNetForImageClassification(config)
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, intermediate_size=96, image_size=32, num_labels=5)
    return transformers.ViTForImageClassification(config)


FAMILIES = [
    f"{library} {kind}" for library in ("torchvision", "timm", "HF") for kind in ("ResNet", "ViT")
]
EVERYWHERE = [ChannelsLast(), StochasticDepth(), WeightStandardization()]
CONVOLUTIONAL = [
    *EVERYWHERE,
    BlurPool(),
    Factorize(min_channels=64),
    GhostBatchNorm(4),
    SqueezeExcite(min_channels=64),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_changed_models_train_and_evaluate(name):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        plain = small(name)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    together = CONVOLUTIONAL if "ResNet" in name else EVERYWHERE
    for recipe in (*([algorithm] for algorithm in together), together):
        model = copy.deepcopy(plain)
        run = Run(recipe, model=model)
        run.start([torch.optim.SGD(model.parameters(), lr=0.1)], total_steps=10, steps_per_epoch=5)
        inputs, labels = run.on_batch(x, y)
        output = model(inputs)
        F.cross_entropy(getattr(output, "logits", output), labels).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        assert any(p.grad is not None and p.grad.any() for p in model.parameters())
        model.eval()
        with torch.no_grad():
            output = model(x)
        assert torch.isfinite(getattr(output, "logits", output)).all()
