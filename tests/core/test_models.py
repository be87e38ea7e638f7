"""The models of the shipped workloads."""

import pytest
import torch
import torch.nn.functional as F

from mosaic_core.models import GPT, ResNet, ViT


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (ResNet(), (3, 1, 8, 8)),
        (ResNet(channels=3, classes=7, widths=(4, 8)), (3, 3, 32, 32)),
        (ViT(), (3, 1, 28, 28)),
        (ViT(channels=3, size=32, patch=8, classes=7, width=12, depth=1, heads=3), (3, 3, 32, 32)),
    ],
    ids=["ResNet", "ResNet in colour", "ViT", "ViT in colour"],
)
def test_images_become_logits(model, shape):
    classes = list(model.parameters())[-1].numel()
    logits = model(torch.randn(shape))
    assert logits.shape == (3, classes)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_transformer_knows_where_a_patch_is():
    model = ViT().eval()
    x = torch.randn(1, 1, 28, 28)
    assert not torch.allclose(model(x), model(x.roll(4, dims=2)), atol=1e-6)


def test_a_decoder_sees_only_what_came_before():
    model = GPT(tokens=11, length=12, width=16, depth=2, heads=2).eval()
    x = torch.randint(11, (2, 12))
    logits = model(x)
    assert logits.shape == (2, 11, 12)
    changed = x.clone()
    changed[:, 7] = (x[:, 7] + 1) % 11
    other = model(changed)
    assert torch.equal(logits[..., :7], other[..., :7])
    assert (logits[..., 7:] != other[..., 7:]).any(1).all()
    assert torch.allclose(model(x[:, :5]), logits[..., :5], atol=1e-6)  # a shorter one will do


def test_a_decoder_begins_without_an_opinion():
    model, x = GPT(), torch.randint(256, (4, 128))
    loss = F.cross_entropy(model(x), x)
    assert loss.item() == pytest.approx(torch.tensor(256.0).log().item(), abs=0.3)


@pytest.mark.parametrize("model", [ViT(depth=1), GPT(tokens=9, length=8, depth=1)], ids=str)
def test_a_graph_holds_the_whole_transformer(model):
    x = torch.randint(9, (2, 8)) if isinstance(model, GPT) else torch.randn(2, 1, 28, 28)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
