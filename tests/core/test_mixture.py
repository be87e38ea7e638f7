"""A mixture of labels means the same for a loss as the dense target it stands for.

The reference below is written element by element, in float64, from the definition: a component
counts where its label is not ignored, and a mean divides by the weights of what counted.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosaic_core.errors import UnsupportedError
from mosaic_core.losses import evaluate, known_losses
from mosaic_core.mixture import Mixture
from mosaic_core.target import MixedTarget, register_loss

N, C = 6, 5
SHAPES = {"classes": (), "pixels": (2, 2)}
REDUCTIONS = ("mean", "sum", "none")


def dense_by_hand(mixture: Mixture, logits: Tensor) -> Tensor:
    """The distribution over classes, float64, shape ``(N, C, ...)``."""
    dense = torch.zeros(logits.shape, dtype=torch.float64)
    for label, weight in mixture.components:
        one_hot = torch.eye(logits.shape[1], dtype=torch.float64)[label].movedim(-1, 1)
        weight = torch.ones(()) if weight is None else weight
        dense += one_hot * weight.double().reshape(
            weight.shape + (1,) * (logits.dim() - weight.dim())
        )
    return dense * (1 - mixture.smoothing) + mixture.smoothing / logits.shape[1]


def cross_entropy_by_hand(
    logits: Tensor,
    mixture: Mixture,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
) -> dict[str, Tensor]:
    """The definition, one element and component at a time, for each reduction."""
    classes = logits.shape[1]
    cw = torch.ones(classes) if class_weight is None else class_weight
    s = mixture.smoothing
    losses, norm = [], torch.zeros((), dtype=torch.float64)
    positions = list(itertools.product(*(range(n) for n in mixture.label.shape)))
    for n, *at in positions:
        z = logits[(n, slice(None), *at)].double()
        log_p = z - z.exp().sum().log()
        total = torch.zeros((), dtype=torch.float64)
        for label, weight in mixture.components:
            y = int(label[(n, *at)])
            if y == ignore_index:
                continue
            share = 1.0 if weight is None else float(weight if weight.dim() == 0 else weight[n])
            total = total - share * (1 - s) * cw[y].double() * log_p[y]
            total = total - share * s / classes * (cw.double() * log_p).sum()
            norm = norm + share * cw[y].double()
        losses.append(total)
    stacked = torch.stack(losses).reshape(mixture.label.shape)
    return {"none": stacked, "sum": stacked.sum(), "mean": stacked.sum() / norm}


def value_and_grad(loss: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of a fixed random combination of its elements."""
    probe = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    (grad,) = torch.autograd.grad((loss * probe).sum(), logits, retain_graph=True)
    return loss.detach().double(), grad.double()


def assert_same(actual: Tensor, expected: Tensor, logits: Tensor, tol: float = 1e-6) -> None:
    """Compare value and gradient."""
    for a, e in zip(value_and_grad(actual, logits), value_and_grad(expected, logits), strict=True):
        torch.testing.assert_close(a, e, rtol=tol, atol=tol)


def draw(shape=(), ignored=(), seed=0):
    """Logits, labels and a partner for each example."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, C, *shape, generator=g).requires_grad_()
    labels = torch.randint(C, (N, *shape), generator=g)
    for i in ignored:
        labels.view(-1)[i] = -100
    return logits, labels, torch.randperm(N, generator=g)


def mixings(per_example: bool) -> Tensor:
    return torch.tensor([0.3, 0.0, 1.0, 0.05, 0.5, 0.8]) if per_example else torch.tensor(0.3)


CLASS_WEIGHT = torch.tensor([0.2, 1.0, 3.0, 0.7, 1.5])


class TestCrossEntropy:
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("per_example", [False, True], ids=["scalar", "per-example"])
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_equals_the_dense_target(self, shape, smoothing, per_example, reduction):
        logits, labels, perm = draw(shape)
        mixture = Mixture.of(labels).mix(perm, mixings(per_example)).smooth(smoothing)
        dense = dense_by_hand(mixture, logits).float()
        loss = F.cross_entropy(logits, MixedTarget.of(mixture), reduction=reduction)
        expected = F.cross_entropy(logits, dense, reduction=reduction)
        assert_same(loss, expected, logits)

    @pytest.mark.parametrize("ignored", [(), (0, 3)], ids=["all", "ignored"])
    @pytest.mark.parametrize("weighted", [False, True], ids=["plain", "class-weighted"])
    @pytest.mark.parametrize("per_example", [None, False, True], ids=["one", "scalar", "per-ex"])
    @pytest.mark.parametrize("smoothing", [0.0, 0.2])
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_equals_the_definition(self, shape, smoothing, per_example, weighted, ignored):
        logits, labels, perm = draw(shape, ignored)
        mixture = Mixture.of(labels)
        if per_example is not None:
            mixture = mixture.mix(perm, mixings(per_example))
        mixture = mixture.smooth(smoothing)
        weight = CLASS_WEIGHT if weighted else None
        expected = cross_entropy_by_hand(logits, mixture, weight)
        for reduction in REDUCTIONS:
            loss = F.cross_entropy(logits, MixedTarget.of(mixture), weight, reduction=reduction)
            assert loss.dtype == torch.float32
            assert_same(loss, expected[reduction], logits)

    @pytest.mark.parametrize("reduction", ["sum", "none"])
    def test_class_weights_equal_the_dense_target_unless_averaged(self, reduction):
        logits, labels, perm = draw()
        mixture = Mixture.of(labels).mix(perm, torch.tensor(0.3)).smooth(0.1)
        dense = dense_by_hand(mixture, logits).float()
        loss = F.cross_entropy(logits, MixedTarget.of(mixture), CLASS_WEIGHT, reduction=reduction)
        assert_same(loss, F.cross_entropy(logits, dense, CLASS_WEIGHT, reduction=reduction), logits)

    def test_class_weighted_mean_is_a_weighted_mean(self):
        """Torch divides a dense target's sum by N, class indices' by the weights of the labels."""
        logits, labels, perm = draw()
        lam = torch.tensor(0.3)
        mixture = Mixture.of(labels).mix(perm, lam)
        loss = F.cross_entropy(logits, MixedTarget.of(mixture), CLASS_WEIGHT)
        own = F.cross_entropy(logits, labels, CLASS_WEIGHT, reduction="none")
        other = F.cross_entropy(logits, labels[perm], CLASS_WEIGHT, reduction="none")
        norm = 0.7 * CLASS_WEIGHT[labels] + 0.3 * CLASS_WEIGHT[labels[perm]]
        assert_same(loss, (0.7 * own + 0.3 * other).sum() / norm.sum(), logits)

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("weight", [None, CLASS_WEIGHT], ids=["plain", "class-weighted"])
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_smoothing_alone_is_bit_equal_to_torch(self, shape, weight, reduction):
        logits, labels, _ = draw(shape, ignored=(1, 2))
        target = MixedTarget.of(Mixture.of(labels).smooth(0.1))
        options = {"weight": weight, "reduction": reduction}
        loss = F.cross_entropy(logits, target, **options)
        assert torch.equal(loss, F.cross_entropy(logits, labels, label_smoothing=0.1, **options))

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("weight", [None, CLASS_WEIGHT], ids=["plain", "class-weighted"])
    def test_mixing_by_zero_is_torch(self, weight, smoothing):
        logits, labels, perm = draw(ignored=(4,))
        mixture = Mixture.of(labels).mix(perm, torch.tensor(0.0)).smooth(smoothing)
        loss = F.cross_entropy(logits, MixedTarget.of(mixture), weight)
        expected = F.cross_entropy(logits, labels, weight, label_smoothing=smoothing)
        assert_same(loss, expected, logits)

    def test_other_ignore_index_and_positional_options(self):
        logits, labels, perm = draw()
        labels[2] = 4
        mixture = Mixture.of(labels).mix(perm, torch.tensor(0.3)).smooth(0.1)
        target = MixedTarget.of(mixture)
        expected = cross_entropy_by_hand(logits, mixture, CLASS_WEIGHT, 4)["sum"]
        loss = F.cross_entropy(logits, target, CLASS_WEIGHT, None, 4, None, "sum")
        assert_same(loss, expected, logits)
        loss = F.cross_entropy(
            target=target, input=logits, weight=CLASS_WEIGHT, ignore_index=4, reduction="sum"
        )
        assert_same(loss, expected, logits)

    def test_all_labels_ignored_is_nan_as_in_torch(self):
        logits, labels, perm = draw(ignored=range(N))
        mixture = Mixture.of(labels).mix(perm, torch.tensor(0.3))
        assert torch.isnan(F.cross_entropy(logits, MixedTarget.of(mixture)))
        assert torch.isnan(F.cross_entropy(logits, labels))

    def test_negative_ignored_labels_do_not_index_class_weights(self):
        """-100 lies outside five class weights; -1 would silently pick the last."""
        logits, labels, perm = draw()
        labels[0] = -1
        mixture = Mixture.of(labels).mix(perm, torch.tensor(0.4)).smooth(0.1)
        loss = F.cross_entropy(logits, MixedTarget.of(mixture), CLASS_WEIGHT, ignore_index=-1)
        expected = cross_entropy_by_hand(logits, mixture, CLASS_WEIGHT, -1)["mean"]
        assert_same(loss, expected, logits)

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("weight", [None, CLASS_WEIGHT], ids=["plain", "class-weighted"])
    def test_module(self, weight, reduction):
        logits, labels, perm = draw(ignored=(1,))
        mixture = Mixture.of(labels).mix(perm, torch.tensor(0.25))
        loss = nn.CrossEntropyLoss(weight, reduction=reduction, label_smoothing=0.2)
        expected = cross_entropy_by_hand(logits, mixture.smooth(0.2), weight)[reduction]
        assert_same(loss(logits, MixedTarget.of(mixture)), expected, logits)

    def test_users_own_smoothing_composes(self):
        logits, labels, perm = draw()
        mixture = Mixture.of(labels).mix(perm, torch.tensor(0.25)).smooth(0.1)
        loss = F.cross_entropy(logits, MixedTarget.of(mixture), label_smoothing=0.2)
        dense = dense_by_hand(mixture, logits).float()
        assert_same(loss, F.cross_entropy(logits, dense, label_smoothing=0.2), logits)

    def test_unbatched_logits(self):
        logits = torch.randn(C).requires_grad_()
        one, other, lam = torch.tensor(1), torch.tensor(3), torch.tensor(0.3)
        mixture = Mixture(((one, 1 - lam), (other, lam)), smoothing=0.1)
        loss = F.cross_entropy(logits, MixedTarget.of(mixture))
        dense = 0.9 * (0.7 * F.one_hot(one, C) + 0.3 * F.one_hot(other, C)) + 0.1 / C
        assert_same(loss, F.cross_entropy(logits, dense), logits)

    def test_float64_stays_float64(self):
        logits, labels, perm = draw()
        logits = logits.detach().double().requires_grad_()
        mixture = Mixture.of(labels).mix(perm, torch.tensor(0.5)).smooth(0.1)
        loss = F.cross_entropy(logits, MixedTarget.of(mixture), CLASS_WEIGHT.double())
        assert loss.dtype == torch.float64
        expected = cross_entropy_by_hand(logits, mixture, CLASS_WEIGHT)["mean"]
        assert_same(loss, expected, logits, 1e-12)

    @pytest.mark.parametrize("mixed", [False, True], ids=["smoothed", "mixed"])
    @pytest.mark.parametrize("weight", [None, CLASS_WEIGHT], ids=["plain", "class-weighted"])
    def test_autocast_computes_in_float32(self, weight, mixed):
        logits, labels, perm = draw(ignored=(2,))
        logits = logits.detach().bfloat16().requires_grad_()
        mixture = Mixture.of(labels).smooth(0.1)
        if mixed:
            mixture = mixture.mix(perm, torch.tensor(0.3))
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(logits, MixedTarget.of(mixture), weight)
        assert loss.dtype == torch.float32
        expected = cross_entropy_by_hand(logits, mixture, weight)["mean"]
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("per_example", [False, True], ids=["scalar", "per-example"])
    def test_bfloat16_without_autocast(self, per_example):
        logits, labels, perm = draw()
        logits = logits.detach().bfloat16()
        mixture = Mixture.of(labels).mix(perm, mixings(per_example)).smooth(0.1)
        loss = F.cross_entropy(logits, MixedTarget.of(mixture))
        assert loss.dtype == torch.bfloat16
        expected = cross_entropy_by_hand(logits, mixture)["mean"]
        eps = torch.finfo(torch.bfloat16).eps
        torch.testing.assert_close(loss.double(), expected, rtol=2 * eps, atol=2 * eps)

    def test_one_log_softmax_serves_all_components(self, monkeypatch):
        logits, labels, perm = draw()
        calls = []
        real = Tensor.log_softmax
        monkeypatch.setattr(
            Tensor, "log_softmax", lambda *args, **kw: calls.append(1) or real(*args, **kw)
        )
        mixture = Mixture.of(labels).mix(perm, torch.tensor(0.3)).mix(perm, torch.tensor(0.2))
        F.cross_entropy(logits, MixedTarget.of(mixture))
        assert len(mixture.components) == 4
        assert len(calls) == 1

    @pytest.mark.parametrize("options", [{"size_average": False}, {"reduce": False}])
    @pytest.mark.filterwarnings("ignore:size_average and reduce")
    def test_a_single_label_takes_all_that_torch_takes(self, options):
        logits, labels, _ = draw(ignored=(1,))
        target = MixedTarget.of(Mixture.of(labels).smooth(0.1))
        expected = F.cross_entropy(logits, labels, label_smoothing=0.1, **options)
        assert torch.equal(F.cross_entropy(logits, target, **options), expected)

    @pytest.mark.parametrize("option", ["size_average", "reduce"])
    @pytest.mark.filterwarnings("ignore:size_average and reduce")
    def test_legacy_reductions_are_refused(self, option):
        logits, labels, perm = draw()
        target = MixedTarget.of(Mixture.of(labels).mix(perm, torch.tensor(0.3)))
        with pytest.raises(
            UnsupportedError, match="cross_entropy: size_average and reduce are not"
        ):
            F.cross_entropy(logits, target, **{option: True})

    def test_unknown_reduction_is_refused_as_by_torch(self):
        logits, labels, perm = draw()
        target = MixedTarget.of(Mixture.of(labels).mix(perm, torch.tensor(0.3)))
        for label in (labels, target):
            with pytest.raises(ValueError, match="avg is not a valid value for reduction"):
                F.cross_entropy(logits, label, reduction="avg")


class TestNLLLoss:
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("weight", [None, CLASS_WEIGHT], ids=["plain", "class-weighted"])
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_equals_the_definition(self, shape, weight, reduction):
        logits, labels, perm = draw(shape, ignored=(1,))
        mixture = Mixture.of(labels).mix(perm, torch.tensor(0.3)).smooth(0.1)
        log_prob = F.log_softmax(logits, 1)
        loss = F.nll_loss(log_prob, MixedTarget.of(mixture), weight, reduction=reduction)
        expected = cross_entropy_by_hand(logits, mixture, weight)[reduction]
        assert_same(loss, expected, logits)

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_module_with_a_single_label(self, smoothing):
        logits, labels, _ = draw(ignored=(1,))
        target = MixedTarget.of(Mixture.of(labels).smooth(smoothing))
        loss = nn.NLLLoss(CLASS_WEIGHT)(F.log_softmax(logits, 1), target)
        expected = F.cross_entropy(logits, labels, CLASS_WEIGHT, label_smoothing=smoothing)
        assert_same(loss, expected, logits)


class TestDenseTargets:
    """Users who one-hot their labels themselves."""

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("per_example", [False, True], ids=["scalar", "per-example"])
    @pytest.mark.parametrize("weight", [None, CLASS_WEIGHT], ids=["plain", "class-weighted"])
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_cross_entropy(self, shape, weight, per_example, reduction):
        logits, labels, perm = draw(shape)
        one_hot = F.one_hot(labels, C).movedim(-1, 1).float()
        lam = mixings(per_example)
        target = MixedTarget.of(Mixture.of(one_hot).mix(perm, lam).smooth(0.1))
        dense = dense_by_hand(Mixture.of(labels).mix(perm, lam).smooth(0.1), logits).float()
        expected = F.cross_entropy(logits, dense, weight, reduction=reduction)
        assert_same(F.cross_entropy(logits, target, weight, reduction=reduction), expected, logits)
        moved = target.clone()  # carried: the weights now have the shape of the labels
        assert_same(F.cross_entropy(logits, moved, weight, reduction=reduction), expected, logits)

    @pytest.mark.parametrize("carried", [False, True])
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_weighted_examples(self, shape, carried):
        logits, labels, perm = draw(shape)
        one_hot = F.one_hot(labels, C).movedim(-1, 1).float()
        weights = torch.tensor([0.0, 2.0, 1.0, 0.5, 4.0, 1.0])

        def mixture(label):
            return Mixture.of(label).mix(perm, torch.tensor(0.3)).weighted(weights).smooth(0.1)

        target = MixedTarget.of(mixture(one_hot))
        target = target.clone() if carried else target
        expected = cross_entropy_by_hand(logits, mixture(labels))
        for reduction in REDUCTIONS:
            loss = F.cross_entropy(logits, target, reduction=reduction)
            assert_same(loss, expected[reduction], logits)

    def test_unbatched_logits_with_weights(self):
        logits, dense = torch.randn(C).requires_grad_(), torch.eye(C)[2]
        target = MixedTarget.of(Mixture(((dense, torch.full((C,), 3.0)),), smoothing=0.1))
        loss = F.cross_entropy(logits, target, reduction="sum")
        expected = 3 * F.cross_entropy(logits, dense, label_smoothing=0.1)
        assert_same(loss, expected, logits)


POS_WEIGHT = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0])
# Name: function, keyword arguments, whether the input is a probability, whether linear in target.
OTHER = {
    "bce": (F.binary_cross_entropy, {}, True),
    "bce-weight": (F.binary_cross_entropy, {"weight": POS_WEIGHT}, True),
    "bce-logits": (F.binary_cross_entropy_with_logits, {}, False),
    "bce-pos-weight": (F.binary_cross_entropy_with_logits, {"pos_weight": POS_WEIGHT}, False),
    "mse": (F.mse_loss, {}, False),
    "l1": (F.l1_loss, {}, False),
    "smooth-l1": (F.smooth_l1_loss, {"beta": 0.5}, False),
    "huber": (F.huber_loss, {"delta": 0.7}, False),
    "kl": (F.kl_div, {}, False),
    "kl-log": (F.kl_div, {"log_target": True}, False),
}
LINEAR = ("bce", "bce-weight", "bce-logits", "bce-pos-weight")
MODULES = {
    "bce": nn.BCELoss,
    "bce-logits": nn.BCEWithLogitsLoss,
    "mse": nn.MSELoss,
    "l1": nn.L1Loss,
    "smooth-l1": nn.SmoothL1Loss,
    "huber": nn.HuberLoss,
    "kl": nn.KLDivLoss,
}


def draw_dense(probability: bool):
    g = torch.Generator().manual_seed(1)
    input = torch.randn(N, C, generator=g)
    target = torch.rand(N, C, generator=g)
    input = input.sigmoid() if probability else input
    return input.requires_grad_(), target, torch.randperm(N, generator=g)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # torch's advice on kl_div
class TestOtherLosses:
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("name", OTHER)
    def test_mixed(self, name, reduction):
        function, options, probability = OTHER[name]
        input, target, perm = draw_dense(probability)
        mixed = MixedTarget.of(Mixture.of(target).mix(perm, torch.tensor(0.3)))
        loss = function(input, mixed, reduction=reduction, **options)
        own = function(input, target, reduction=reduction, **options)
        other = function(input, target[perm], reduction=reduction, **options)
        assert_same(loss, 0.7 * own + 0.3 * other, input)

    @pytest.mark.parametrize("name", MODULES)
    def test_module(self, name):
        _, _, probability = OTHER[name]
        input, target, perm = draw_dense(probability)
        mixed = MixedTarget.of(Mixture.of(target).mix(perm, torch.tensor(0.3)))
        module = MODULES[name]()
        expected = 0.7 * module(input, target) + 0.3 * module(input, target[perm])
        assert_same(module(input, mixed), expected, input)

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("name", OTHER)
    def test_per_example_mixing_and_weights(self, name, reduction):
        """Per-example weights: each element counts by its example's weight, a mean included."""
        function, options, probability = OTHER[name]
        input, target, perm = draw_dense(probability)
        lam, weights = mixings(True), torch.tensor([0.0, 2.0, 1.0, 0.5, 4.0, 1.0])
        mixed = Mixture.of(target).mix(perm, lam).weighted(weights)
        loss = function(input, MixedTarget.of(mixed), reduction=reduction, **options)
        own = function(input, target, reduction="none", **options)
        other = function(input, target[perm], reduction="none", **options)
        each = weights[:, None] * ((1 - lam)[:, None] * own + lam[:, None] * other)
        expected = {
            "none": each,
            "sum": each.sum(),
            "mean": each.sum() / (weights.sum() * C),
        }[reduction]
        assert_same(loss, expected, input)

    def test_batchmean(self):
        input, target, perm = draw_dense(False)
        mixture = Mixture.of(target).mix(perm, torch.tensor(0.3))
        own = F.kl_div(input, target, reduction="none").sum(1)
        other = F.kl_div(input, target[perm], reduction="none").sum(1)
        each = 0.7 * own + 0.3 * other
        loss = F.kl_div(input, MixedTarget.of(mixture), reduction="batchmean")
        assert_same(loss, each.sum() / N, input)
        weights = torch.tensor([0.0, 2.0, 1.0, 0.5, 4.0, 1.0])
        weighted = MixedTarget.of(mixture.weighted(weights))
        loss = F.kl_div(input, weighted, reduction="batchmean")
        assert_same(loss, (weights * each).sum() / weights.sum(), input)

    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("name", LINEAR)
    def test_smoothing_of_multi_label_targets(self, name, weighted):
        function, options, probability = OTHER[name]
        input, target, perm = draw_dense(probability)
        mixture = Mixture.of(target).mix(perm, torch.tensor(0.3)).smooth(0.2)
        weights = torch.tensor([0.0, 2.0, 1.0, 0.5, 4.0, 1.0]) if weighted else torch.ones(N)
        if weighted:
            mixture = mixture.weighted(weights)
        loss = function(input, MixedTarget.of(mixture), **options)
        smoothed = 0.8 * (0.7 * target + 0.3 * target[perm]) + 0.2 / C
        each = function(input, smoothed, reduction="none", **options)
        assert_same(loss, (weights[:, None] * each).sum() / (weights.sum() * C), input)

    def test_binary_labels_made_float_by_the_user(self):
        logits = torch.randn(N, 1).requires_grad_()
        labels, perm = torch.tensor([0, 1, 1, 0, 1, 0]), torch.randperm(N)
        target = MixedTarget.of(Mixture.of(labels).mix(perm, torch.tensor(0.3)))
        loss = F.binary_cross_entropy_with_logits(logits, target.float().unsqueeze(1))
        dense = (0.7 * labels + 0.3 * labels[perm]).unsqueeze(1)
        assert_same(loss, F.binary_cross_entropy_with_logits(logits, dense), logits)

    @pytest.mark.parametrize("name", [n for n in OTHER if n not in LINEAR])
    def test_smoothing_of_a_regression_is_refused(self, name):
        function, options, _ = OTHER[name]
        input, target, _ = draw_dense(False)
        mixed = MixedTarget.of(Mixture.of(target).smooth(0.1))
        message = f"{function.__name__}: label smoothing is defined for F.cross_entropy"
        with pytest.raises(UnsupportedError, match=message):
            function(input, mixed, **options)

    @pytest.mark.parametrize("shape", [(N,), (N, 1)])
    def test_smoothing_of_binary_targets_is_refused(self, shape):
        mixed = MixedTarget.of(Mixture.of(torch.ones(shape)).smooth(0.1))
        message = r"binary_cross_entropy_with_logits: label smoothing needs targets of shape \(N, C"
        with pytest.raises(UnsupportedError, match=message):
            F.binary_cross_entropy_with_logits(torch.zeros(shape), mixed)

    def test_weights_need_a_loss_per_example(self):
        @register_loss
        def no_reduction(input, target):
            return F.multi_margin_loss(input, target)

        @register_loss
        def deaf(input, target, reduction="mean"):
            return F.multi_margin_loss(input, target)

        logits, labels, perm = draw()
        target = MixedTarget.of(Mixture.of(labels).mix(perm, mixings(True)))
        for loss in (no_reduction, deaf):
            message = f"{loss.__name__}: labels mixed with a weight per example need a loss that"
            with pytest.raises(UnsupportedError, match=message):
                loss(logits, target)

    def test_every_known_loss_is_tested_here(self):
        tested = {F.cross_entropy, F.nll_loss, *(function for function, *_ in OTHER.values())}
        assert {f for f in known_losses() if f.__module__ == F.__name__} == tested


class TestComposition:
    def test_order_of_mixing_and_smoothing_does_not_matter(self):
        logits, labels, perm = draw()
        lam = torch.tensor(0.3)
        one = Mixture.of(labels).mix(perm, lam).smooth(0.1)
        other = Mixture.of(labels).smooth(0.1).mix(perm, lam)
        torch.testing.assert_close(one.dense(C), other.dense(C), rtol=0, atol=1e-7)
        a, b = (F.cross_entropy(logits, MixedTarget.of(m)) for m in (one, other))
        assert_same(a, b, logits)

    @pytest.mark.parametrize("first", [False, True], ids=["scalar", "per-example"])
    @pytest.mark.parametrize("second", [False, True], ids=["scalar", "per-example"])
    def test_two_mixes_in_a_row(self, first, second):
        logits, labels, perm = draw()
        again = torch.tensor([1, 2, 3, 4, 5, 0])
        lam, mu = mixings(first), mixings(second).flip(-1) if second else torch.tensor(0.4)
        mixture = Mixture.of(labels).mix(perm, lam).smooth(0.1).mix(again, mu).smooth(0.2)

        def column(w):
            return w.double().reshape(-1, 1) if w.dim() else w.double()

        once = (1 - column(lam)) * torch.eye(C).double()[labels]
        once = once + column(lam) * torch.eye(C).double()[labels[perm]]
        once = 0.9 * once + 0.1 / C
        twice = (1 - column(mu)) * once + column(mu) * once[again]
        twice = 0.8 * twice + 0.2 / C
        torch.testing.assert_close(mixture.dense(C).double(), twice, rtol=0, atol=1e-7)
        loss = F.cross_entropy(logits, MixedTarget.of(mixture))
        assert_same(loss, F.cross_entropy(logits, twice.float()), logits)

    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_weighted(self, shape):
        logits, labels, perm = draw(shape, ignored=(1,))
        weights = torch.tensor([0.0, 2.0, 1.0, 0.5, 4.0, 1.0])
        mixture = Mixture.of(labels).weighted(weights)
        each = F.cross_entropy(logits, labels, reduction="none")
        column = weights.reshape(-1, *(1 for _ in shape)).expand_as(labels)
        expected = (column * each).sum() / column[labels != -100].sum()
        assert_same(F.cross_entropy(logits, MixedTarget.of(mixture)), expected, logits)
        mixed = mixture.mix(perm, torch.tensor(0.3)).smooth(0.1)
        loss = F.cross_entropy(logits, MixedTarget.of(mixed), CLASS_WEIGHT)
        expected = cross_entropy_by_hand(logits, mixed, CLASS_WEIGHT)["mean"]
        assert_same(loss, expected, logits)

    def test_weights_go_with_their_examples_when_mixed(self):
        labels, weights = torch.tensor([0, 1]), torch.tensor([1.0, 3.0])
        mixture = Mixture.of(labels).weighted(weights).mix(torch.tensor([1, 0]), torch.tensor(0.25))
        expected = torch.tensor([[0.75, 0.75], [0.25, 2.25]])
        assert torch.equal(mixture.dense(2), expected)

    @pytest.mark.parametrize(
        "indices",
        [torch.tensor([4, 0, 2]), torch.tensor([True, False, True, False, True, True])],
        ids=["index", "mask"],
    )
    def test_select(self, indices):
        logits, labels, perm = draw()
        mixture = Mixture.of(labels).mix(perm, mixings(True)).mix(perm, torch.tensor(0.2))
        kept = mixture.select(indices)
        assert torch.equal(kept.dense(C), mixture.dense(C)[indices])
        loss = F.cross_entropy(logits[indices], MixedTarget.of(kept), reduction="none")
        whole = F.cross_entropy(logits, MixedTarget.of(mixture), reduction="none")
        assert_same(loss, whole[indices], logits)

    def test_map_takes_the_weights_along_and_keeps_their_precision(self):
        logits, labels, perm = draw((2, 2))
        mixture = Mixture.of(labels).mix(perm, mixings(True)).smooth(0.1)
        flat = mixture.map(lambda t: t.flatten()).map(lambda t: t.to(torch.int32)).map(Tensor.long)
        weight = flat.components[1][1]
        assert torch.equal(weight, mixings(True).repeat_interleave(4))
        rows = logits.movedim(1, -1).flatten(0, 2)
        loss = F.cross_entropy(rows, MixedTarget.of(flat))
        assert_same(loss, F.cross_entropy(logits, MixedTarget.of(mixture)), logits)

    def test_dense(self):
        logits, labels, perm = draw((2, 2))
        mixture = Mixture.of(labels).mix(perm, mixings(True)).smooth(0.1)
        dense = mixture.dense(C)
        assert dense.dtype == torch.float32
        torch.testing.assert_close(dense.double(), dense_by_hand(mixture, logits))
        one_hot = F.one_hot(labels, C).movedim(-1, 1).float()
        again = Mixture.of(one_hot).mix(perm, mixings(True)).smooth(0.1)
        assert torch.equal(again.dense(C), dense)

    def test_inputs_untouched_and_values_immutable(self):
        logits, labels, perm = draw()
        before = labels.clone()
        lam = mixings(True)
        mixture = Mixture.of(labels)
        mixture.mix(perm, lam).smooth(0.1).weighted(torch.ones(N)).select(torch.tensor([1]))
        assert mixture.trivial
        assert torch.equal(labels, before)
        assert torch.equal(lam, mixings(True))
        F.cross_entropy(logits, MixedTarget.of(mixture.mix(perm, lam)), CLASS_WEIGHT)
        assert torch.equal(labels, before)

    def test_one_smoothing_is_kept_to_the_bit(self):
        """Computed as 1 - (1 - 0) * (1 - 0.1), it would differ from 0.1."""
        plain = Mixture.of(torch.tensor([0]))
        assert plain.smooth(0.1).smoothing == plain.smooth(0.1).smooth(0.0).smoothing == 0.1
        assert plain.smooth(0.0).smooth(0.1).smoothing == 0.1
        assert plain.smooth(0.1).smooth(0.2).smoothing == pytest.approx(0.28, rel=1e-15)

    def test_trivial(self):
        _, labels, perm = draw()
        plain = Mixture.of(labels)
        assert plain.trivial
        assert plain.smooth(0.0).trivial
        assert not plain.smooth(0.1).trivial
        assert not plain.mix(perm, torch.tensor(0.0)).trivial
        assert not plain.weighted(torch.ones(N)).trivial

    def test_receipt_is_shared_by_all_descendants(self):
        logits, labels, perm = draw()
        mixture = Mixture.of(labels).mix(perm, torch.tensor(0.3))
        view = mixture.smooth(0.1).select(perm).map(Tensor.clone)
        assert not mixture.receipt.consumed
        evaluate(view, F.cross_entropy, logits)
        assert mixture.receipt.consumed
