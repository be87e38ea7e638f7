"""Order does not corrupt targets: what the loss trains on is what the pixels show.

Every class has an image plane of its own: an image of class c is 1 on plane c and 0 elsewhere. So
the mean of each plane of a batch that was mixed, in whatever way, is the target it should have. The
target it really has is read off the gradient of the cross entropy, ``(softmax - target) / N``.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mosaic_core import Run
from mosaic_core.algorithms import ColOut, CutMix, CutOut, LabelSmoothing, MixUp
from mosaic_core.batch import Batch
from mosaic_core.mixture import Mixture
from mosaic_core.target import LossProxy, MixedTarget

N, C, H, W = 9, 5, 7, 10
SMOOTHING = 0.1
MIXING = [MixUp(alpha=1.0), CutMix()]
SEEDS = range(4)

RECIPES = [
    order
    for mixing in ([MIXING[0]], [MIXING[1]], MIXING)
    for smoothing in ([], [LabelSmoothing(SMOOTHING)])
    for order in itertools.permutations([*mixing, *smoothing])
]


def names(algorithms):
    return "-".join(a.name for a in algorithms)


@pytest.fixture(params=["hard", "one-hot"])
def labels(request):
    y = torch.arange(N) % C
    return y if request.param == "hard" else F.one_hot(y, C).float()


def planes():
    one_hot = F.one_hot(torch.arange(N) % C, C).float()
    return one_hot[:, :, None, None].repeat(1, 1, H, W)


def start(algorithms, seed=0, carrier="target"):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Run(algorithms, model=model, optimizer=optimizer, seed=seed, carrier=carrier)


def trained_on(loss, target):
    """The distribution over the classes that a loss pulls each example towards."""
    logits = torch.randn(N, C, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (grad,) = torch.autograd.grad(loss(logits, target), logits)
    return logits.detach().softmax(1) - N * grad


def shown(images, algorithms):
    """The target that the pixels ask for."""
    smoothing = SMOOTHING if any(a.name == "LabelSmoothing" for a in algorithms) else 0.0
    return (1 - smoothing) * images.mean((2, 3)) + smoothing / C


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("recipe", RECIPES, ids=names)
def test_carried_by_the_target(recipe, labels, seed):
    images, target = start(recipe, seed).on_batch(planes(), labels)
    assert isinstance(target, MixedTarget)
    assert_same(trained_on(F.cross_entropy, target), shown(images, recipe))


class Flattened:
    """A loss that keeps the module it calls in ``func``, as a trainer's wrapper may."""

    def __init__(self):
        self.func = nn.CrossEntropyLoss()

    def __call__(self, prediction, target):
        plain = target.as_subclass(torch.Tensor)
        return self.func(prediction.flatten(0, -2), plain)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "loss",
    [F.cross_entropy, nn.CrossEntropyLoss(), lambda p, t: F.cross_entropy(p, t), Flattened()],
    ids=["function", "module", "own", "wrapper"],
)
@pytest.mark.parametrize("recipe", RECIPES, ids=names)
def test_carried_by_the_loss(recipe, loss, labels, seed):
    run = start(recipe, seed, carrier="proxy")
    images, target = run.on_batch(planes(), labels)
    assert not isinstance(target, MixedTarget)
    assert_same(trained_on(LossProxy(loss, lambda: run.mixture), target), shown(images, recipe))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("recipe", RECIPES, ids=names)
def test_without_the_order_of_recipes(recipe, labels, seed):
    """Even where the labels are smoothed before they are mixed."""
    run, batch = start(recipe, seed), Batch(planes(), Mixture.of(labels))
    for algorithm in recipe:
        batch = algorithm.on_batch(batch, run)
    target = MixedTarget.of(batch.labels)
    assert_same(trained_on(F.cross_entropy, target), shown(batch.input, recipe))
    assert_same(batch.labels.dense(C), shown(batch.input, recipe))


@pytest.mark.parametrize("carrier", ["target", "proxy"])
@pytest.mark.parametrize(
    "recipe",
    list(itertools.permutations([*MIXING, LabelSmoothing(SMOOTHING), CutOut(length=0.3)])),
    ids=names,
)
def test_the_target_is_that_of_the_images_before_the_hole(recipe, carrier, labels):
    run = start(recipe, carrier=carrier)
    images, target = run.on_batch(planes(), labels)
    whole = start([a for a in recipe if a.name != "CutOut"])
    images_before, target_before = whole.on_batch(planes(), labels)

    loss = F.cross_entropy
    if carrier == "proxy":
        loss = LossProxy(nn.CrossEntropyLoss(), lambda: run.mixture)
    assert_same(trained_on(loss, target), shown(images_before, recipe))
    assert_same(trained_on(F.cross_entropy, target_before), shown(images_before, recipe))
    hole = (images == 0).all(1).all(0)
    assert hole.sum() == 2 * 2
    assert torch.equal(images, images_before * ~hole)


def test_smaller_images_ask_for_the_same(labels):
    recipe = [*MIXING, LabelSmoothing(SMOOTHING), ColOut()]
    images, target = start(recipe).on_batch(planes(), labels)
    assert images.shape == (N, C, 5, 8)
    assert_same(trained_on(F.cross_entropy, target), shown(images, recipe))


@pytest.mark.parametrize("order", [MIXING, MIXING[::-1]], ids=names)
def test_both_act_one_after_the_other_in_the_given_order(order):
    run = start(order)
    assert [a.name for a in run.recipe] == [a.name for a in order]
    images, _ = run.on_batch(planes(), torch.arange(N) % C)
    assert len(run.mixture.components) == 4
    again = planes()
    for algorithm in order:  # each alone draws what it draws beside the other
        again, _ = start([algorithm]).on_batch(again, torch.arange(N) % C)
    assert torch.equal(images, again)


def test_the_mixing_is_real():
    """The tests above would pass on plain batches: here it is seen that they are not."""
    plain = F.one_hot(torch.arange(N) % C, C).float()
    for recipe in RECIPES:
        moved = 0.0
        for seed in SEEDS:
            _, target = start(recipe, seed).on_batch(planes(), torch.arange(N) % C)
            moved = max(moved, float((trained_on(F.cross_entropy, target) - plain).abs().max()))
        assert moved > 0.09, recipe


def test_a_wrong_target_is_found():
    """A weight that is off by one pixel of seventy fails."""
    images, target = start([CutMix()]).on_batch(planes(), torch.arange(N) % C)
    (own, keep), (partner, mixing) = target.mixture.components
    off = Mixture(((own, keep - 1 / (H * W)), (partner, mixing + 1 / (H * W))))
    wrong = trained_on(F.cross_entropy, MixedTarget.of(off))
    assert (wrong - shown(images, [])).abs().max() > 1e-3
