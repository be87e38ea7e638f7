"""The two carriers: what a user's code sees of a mixed target, and what a loss sees of it."""

import copy
import functools
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MultilabelAccuracy

from mosaic_core import LossError, Run, UnsupportedError, register_loss
from mosaic_core.algorithm import Algorithm, Place
from mosaic_core.algorithms import LabelSmoothing, MixUp
from mosaic_core.mixture import Mixture
from mosaic_core.target import LossProxy, MixedTarget, unconsumed

C = 5


def mixed(label: Tensor, mixing: float = 0.3, smoothing: float = 0.0) -> MixedTarget:
    """A target whose partner is the next example."""
    perm = torch.arange(len(label)).roll(-1)
    return MixedTarget.of(Mixture.of(label).mix(perm, torch.tensor(mixing)).smooth(smoothing))


def per_example(label: Tensor) -> MixedTarget:
    """A target with a mixing weight for each example."""
    perm = torch.arange(len(label)).roll(-1)
    return MixedTarget.of(Mixture.of(label).mix(perm, torch.linspace(0, 1, len(label))))


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 3, 1, 4, 4, 2])


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(6, C, generator=torch.Generator().manual_seed(0)).requires_grad_()


class TestPlainLabelForTheUser:
    def test_it_is_the_label(self, labels):
        target = mixed(labels)
        assert isinstance(target, Tensor)
        assert target.data_ptr() == labels.data_ptr()
        assert (target.shape, target.dtype, target.device) == (
            labels.shape,
            labels.dtype,
            labels.device,
        )
        assert len(target) == 6
        assert target.tolist() == labels.tolist()
        assert target[1].item() == 3
        assert repr(target) == repr(labels)
        assert target.size(0) == 6

    def test_accuracy_by_hand_and_by_torchmetrics(self, labels, logits):
        target = mixed(labels, smoothing=0.1)
        accuracy = (logits.argmax(1) == target).float().mean()
        assert type(accuracy) is Tensor
        assert accuracy == (logits.argmax(1) == labels).float().mean()
        metric, plain = (MulticlassAccuracy(C, average="micro") for _ in range(2))
        metric.update(logits, target)
        plain.update(logits, labels)
        assert metric.compute() == plain.compute()
        assert type(metric.compute()) is Tensor
        F.cross_entropy(logits, target)
        assert target.mixture.receipt.consumed

    def test_torchmetrics_that_change_their_copy_of_the_target(self):
        """With ignore_index torchmetrics clones the target and writes into the clone."""
        labels = torch.tensor([[1, 0, -1], [0, 1, 1], [1, 1, 0]])
        scores = torch.tensor([[0.9, 0.2, 0.3], [0.1, 0.4, 0.8], [0.7, 0.6, 0.1]])
        target = mixed(labels)
        metric = MultilabelAccuracy(3, ignore_index=-1)
        assert metric(scores, target) == metric(scores, labels)
        assert torch.equal(target.mixture.label, labels)
        F.binary_cross_entropy(scores, target.float().clamp(0, 1))  # plain: of a computed label
        assert not target.mixture.receipt.consumed
        F.mse_loss(scores, target.float())
        assert target.mixture.receipt.consumed

    @pytest.mark.parametrize(
        "operation",
        [
            lambda t: t == 1,
            lambda t: t != t,
            lambda t: t + 1,
            lambda t: 1 - t,
            lambda t: t.sum(),
            lambda t: t.float().mean(),
            lambda t: t.ne(3),
            lambda t: F.one_hot(t, C),
            lambda t: torch.bincount(t),
            lambda t: torch.stack([t, t]),
            lambda t: torch.cat((t, t)),
            lambda t: torch.where(t > 1, t, -100),
            lambda t: t.masked_fill(t > 1, -100),
            lambda t: torch.zeros(6, C).scatter(1, t.clone().detach()[:, None] * 1, 1.0),
        ],
    )
    def test_computations_return_plain_tensors(self, labels, operation):
        result, expected = operation(mixed(labels)), operation(labels)
        assert type(result) is Tensor
        assert torch.equal(result, expected)

    def test_indexing_others_with_it(self, labels, logits):
        rows = logits[torch.arange(6), mixed(labels)]
        assert type(rows) is Tensor
        assert torch.equal(rows, logits[torch.arange(6), labels])
        gathered = logits.gather(1, mixed(labels)[:, None])
        assert type(gathered) is Tensor
        assert torch.equal(gathered, logits.gather(1, labels[:, None]))

    def test_results_in_place_do_not_touch_the_mixture(self, labels):
        target = mixed(labels)
        before = target.mixture.dense(C)
        result = target + 0
        result += 7
        result[0] = -1
        hits = target == labels
        hits.fill_(False)
        assert torch.equal(target.mixture.dense(C), before)

    def test_copies_and_files_hold_the_plain_label(self, labels):
        target = mixed(labels)
        file = io.BytesIO()
        torch.save({"y": target}, file)
        file.seek(0)
        copies = [
            copy.deepcopy(target),
            pickle.loads(pickle.dumps(target)),
            torch.load(file, weights_only=True)["y"],
        ]
        for plain in copies:
            assert type(plain) is Tensor
            assert torch.equal(plain, labels)
            assert plain.data_ptr() != labels.data_ptr()

    def test_numpy(self, labels):
        assert mixed(labels).numpy().tolist() == labels.tolist()


CARRIED = {
    "view": lambda t: t.view(3, 2),
    "view(-1)": lambda t: t.view(3, 2).view(-1),
    "reshape": lambda t: t.reshape(-1, 2),
    "flatten": lambda t: t.reshape(2, 3).flatten(),
    "ravel": lambda t: t.reshape(2, 3).ravel(),
    "unsqueeze": lambda t: t.unsqueeze(1),
    "squeeze": lambda t: t[:, None].squeeze(-1),
    "None index": lambda t: t[None],
    "transpose": lambda t: t.view(2, 3).transpose(0, 1),
    "permute": lambda t: torch.permute(t.view(2, 3), (1, 0)),
    "movedim": lambda t: t.view(2, 3).movedim(0, 1),
    "expand": lambda t: t[:, None].expand(6, 2),
    "expand_as": lambda t: t[:, None].expand_as(torch.zeros(6, 2)),
    "view_as": lambda t: t.view_as(torch.zeros(3, 2)),
    "reshape_as": lambda t: t.reshape_as(torch.zeros(3, 2)),
    "contiguous": lambda t: t.view(2, 3).transpose(0, 1).contiguous(),
    "clone": lambda t: t.clone(),
    "detach": lambda t: t.detach(),
    "to device": lambda t: t.to("cpu"),
    "to device, copied": lambda t: t.to("cpu", non_blocking=True, copy=True),
    "to dtype": lambda t: t.to(torch.int32).to(torch.int64),
    "cpu": lambda t: t.cpu(),
    "long": lambda t: t.long(),
    "int and type": lambda t: t.int().type(torch.long),
    "type_as": lambda t: t.int().type_as(torch.zeros(1, dtype=torch.long)),
    "slice": lambda t: t[1:5],
    "step": lambda t: t[::2],
    "select": lambda t: t.view(2, 3).select(0, 1),
    "mask": lambda t: t[torch.tensor([True, False, True, True, False, True])],
    "own mask": lambda t: t[t != 4],
    "indices": lambda t: t[torch.tensor([5, 0, 0])],
    "mixed indices": lambda t: t[mixed(torch.tensor([5, 0, 1]))],
    "two indices": lambda t: t.view(2, 3)[:, [0, 2]],
    "ellipsis": lambda t: t.view(2, 3)[..., 1:],
    "index_select": lambda t: t.index_select(0, torch.tensor([2, 1])),
    "masked_select": lambda t: t.masked_select(t != 4),
    "narrow": lambda t: t.narrow(0, 1, 3),
    "pad": lambda t: F.pad(t.view(2, 3), (0, 1), value=-100),
    "causal shift": lambda t: t.view(2, 3)[..., 1:].contiguous().view(-1),
    "Hugging Face shift": lambda t: (
        F.pad(t.view(2, 3), (0, 1), value=-100)[..., 1:].contiguous().view(-1).to("cpu")
    ),
}


class TestCarriedThroughViews:
    @pytest.mark.parametrize("make", [mixed, per_example])
    @pytest.mark.parametrize("operation", CARRIED.values(), ids=CARRIED)
    def test_the_mixture_goes_along(self, labels, operation, make):
        """The loss of the changed target is the changed loss of the target, element by element."""
        target = make(labels)
        result = operation(target)
        assert isinstance(result, MixedTarget)
        plain = operation(labels)
        assert torch.equal(result.mixture.label, plain)
        assert result.mixture.label.dtype == plain.dtype

        # The logits of each label, found by doing the same to the position in the batch.
        position = operation(torch.arange(6))
        inside = position >= 0
        position = position.where(inside, 0)
        table = torch.randn(6, C, generator=torch.Generator().manual_seed(0))
        expected = F.cross_entropy(table, target, reduction="none")[position].where(inside, 0.0)
        logits = table[position]
        logits = logits if logits.dim() == 2 else logits.movedim(-1, 1)
        result.mixture.receipt.consumed = False
        if operation is CARRIED["own mask"] or operation is CARRIED["masked_select"]:
            keep = labels != 4  # here the position is not the label that was asked for
            logits, expected = table[keep], F.cross_entropy(table, target, reduction="none")[keep]
        loss = F.cross_entropy(logits, result, reduction="none")
        torch.testing.assert_close(loss, expected)
        assert target.mixture.receipt.consumed

    @pytest.mark.parametrize("make", [mixed, per_example])
    @pytest.mark.parametrize(
        "split",
        [
            lambda t: t.chunk(3),
            lambda t: torch.chunk(t, 3),
            lambda t: t.split(2),
            lambda t: torch.split(t, [2, 4]),
            lambda t: t.view(2, 3).unbind(),
            lambda t: torch.unbind(t.view(3, 2), 0),
        ],
    )
    def test_parts(self, labels, split, make):
        target = make(labels)
        parts, table = split(target), torch.randn(6, C)
        whole = F.cross_entropy(table, target, reduction="none")
        losses, start = [], 0
        for part, plain in zip(parts, split(labels), strict=True):
            assert torch.equal(part.mixture.label, plain)
            rows = table[start : start + len(part)]
            losses.append(F.cross_entropy(rows, part, reduction="none"))
            start += len(part)
        torch.testing.assert_close(torch.cat(losses), whole)

    def test_type_without_argument_names_the_type(self, labels):
        assert mixed(labels).type() == "torch.LongTensor"

    def test_padding_is_not_counted_in_a_mean(self, labels):
        """Padding gives the weight of a padded place a nonsense value, which must not matter."""
        table = torch.randn(2, C, 4)
        target = F.pad(per_example(labels).view(2, 3), (0, 1), value=-100)
        whole = F.cross_entropy(table, target)
        inside = F.cross_entropy(table[:, :, :3].movedim(1, -1).reshape(6, C), per_example(labels))
        torch.testing.assert_close(whole, inside)

    def test_moves_take_labels_and_weights_along(self, labels):
        target = per_example(labels).to("meta")
        assert target.device.type == "meta"
        for label, weight in target.mixture.components:
            assert label.device.type == "meta"
            assert weight.device.type == "meta"
        assert {label.device.type for label, _ in per_example(labels).mixture.components} == {"cpu"}


class TestChangedInPlace:
    """Writing into the label cannot be right for the labels mixed with it."""

    @pytest.mark.parametrize(
        "change",
        [
            lambda t: t.__setitem__(t == 4, -100),
            lambda t: t.masked_fill_(t == 4, -100),
            lambda t: t.sub_(1).clamp_(0),
            lambda t: t.copy_(torch.zeros(6, dtype=torch.long)),
            lambda t: t.fill_(2),
        ],
    )
    def test_is_plain_from_then_on_and_the_step_is_refused(self, labels, logits, change):
        run, target = mixed_step(labels)
        changed = labels.clone()
        change(changed)
        change(target)
        assert torch.equal(target, changed)
        loss = F.cross_entropy(logits, target)
        assert torch.equal(loss, F.cross_entropy(logits, changed))
        with pytest.raises(LossError, match="Labels changed after the batch was mixed"):
            run.check_loss()

    def test_augmented_assignment(self, labels, logits):
        run, target = mixed_step(labels)
        same = target
        target -= 0
        for label in (same, target):
            F.cross_entropy(logits, label)
        with pytest.raises(LossError):
            run.check_loss()

    def test_a_copy_may_be_changed(self, labels, logits):
        run, target = mixed_step(labels)
        mine = target.clone()
        mine[mine == 4] = 0
        assert torch.equal(target, labels)
        F.cross_entropy(logits, target)
        run.check_loss()


MIX_UP = MixUp()


def mixed_step(labels: Tensor, recipe: tuple[Algorithm, ...] = (MIX_UP,), carrier="target"):
    """A started run and the target of its first batch."""
    model = nn.Linear(3, C)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = Run(recipe, model=model, optimizer=optimizer, carrier=carrier)
    _, target = run.on_batch(torch.randn(len(labels), 3), labels.clone())
    return run, target


class TestLossesThatIgnoreTheMixture:
    def test_hand_written_loss_raises_and_names_the_known_ones(self, labels, logits):
        run, target = mixed_step(labels)
        loss = -(F.one_hot(target, C) * F.log_softmax(logits, 1)).sum(1).mean()
        assert type(loss) is Tensor
        with pytest.raises(LossError, match="ignored the mixed labels of the batch") as caught:
            run.check_loss()
        message = str(caught.value)
        for name in (
            *("binary_cross_entropy", "binary_cross_entropy_with_logits", "cross_entropy"),
            *("huber_loss", "kl_div", "l1_loss", "mse_loss", "nll_loss", "smooth_l1_loss"),
        ):
            assert name in message
        assert "@mosaic_core.register_loss" in message

    def test_step_raises_before_the_weights_move(self, labels, logits):
        run, _ = mixed_step(labels)
        before = run.model.weight.detach().clone()
        run.model.weight.grad = torch.ones_like(run.model.weight)
        with pytest.raises(LossError):
            run.step()
        assert torch.equal(run.model.weight, before)
        assert run.progress.step == 0

    def test_known_loss_passes(self, labels, logits):
        run, target = mixed_step(labels)
        F.cross_entropy(logits, target)
        run.check_loss()

    def test_each_micro_batch_counts(self, labels, logits):
        run, _ = mixed_step(labels)
        _, second = run.on_batch(torch.randn(6, 3), labels)
        F.cross_entropy(logits, second)
        with pytest.raises(LossError):
            run.check_loss()
        run.check_loss()  # the error was told once

    def test_recipes_that_leave_labels_plain_ask_nothing(self, labels):
        run, target = mixed_step(labels, recipe=())
        assert type(target) is Tensor
        run.check_loss()

    def test_unconsumed_is_an_error_to_raise(self):
        assert isinstance(unconsumed(Mixture.of(torch.tensor([0]))), LossError)


class TestRegisterLoss:
    def test_decorated_function(self, labels, logits):
        @register_loss
        def hinge(input, target, margin=1.0):
            """Doc."""
            return F.multi_margin_loss(input, target, margin=margin)

        assert hinge.__name__ == "hinge"
        assert hinge.__doc__ == "Doc."
        run, target = mixed_step(labels)
        lam = target.mixture.components[1][1]
        own, other = (label for label, _ in target.mixture.components)
        loss = hinge(logits, target, margin=0.5)
        expected = (1 - lam) * F.multi_margin_loss(logits, own, margin=0.5)
        expected = expected + lam * F.multi_margin_loss(logits, other, margin=0.5)
        torch.testing.assert_close(loss, expected)
        run.check_loss()
        assert torch.equal(
            hinge(logits, labels, 0.5), F.multi_margin_loss(logits, labels, margin=0.5)
        )
        assert "hinge" in str(unconsumed(Mixture.of(torch.tensor([0]))))

    def test_module(self, labels, logits):
        class Focal(nn.Module):
            def forward(self, input, target):
                log_p = input.log_softmax(1).gather(1, target[:, None])[:, 0]
                return -((1 - log_p.exp()) ** 2 * log_p).mean()

        focal = Focal()
        loss = register_loss(focal)
        run, target = mixed_step(labels)
        (own, keep), (other, lam) = target.mixture.components
        expected = keep * focal(logits, own) + lam * focal(logits, other)
        torch.testing.assert_close(loss(logits, target), expected)
        run.check_loss()
        assert "Focal" in str(unconsumed(Mixture.of(torch.tensor([0]))))

    def test_without_registration_a_custom_module_is_refused(self, labels, logits):
        run, target = mixed_step(labels)
        log_p = logits.log_softmax(1).gather(1, target[:, None])
        assert torch.isfinite(log_p).all()
        with pytest.raises(LossError):
            run.check_loss()

    def test_per_example_weights_with_a_reduction(self, labels, logits):
        @register_loss
        def margin(input, target, reduction="mean"):
            return F.multi_margin_loss(input, target, reduction=reduction)

        target = per_example(labels)
        (own, keep), (other, lam) = target.mixture.components
        each = [F.multi_margin_loss(logits, label, reduction="none") for label in (own, other)]
        expected = keep * each[0] + lam * each[1]
        torch.testing.assert_close(margin(logits, target), expected.mean())
        torch.testing.assert_close(margin(logits, target, reduction="sum"), expected.sum())
        torch.testing.assert_close(margin(logits, target, reduction="none"), expected)

    def test_smoothing_of_a_custom_loss_is_refused(self, labels, logits):
        @register_loss
        def own_margin(input, target):
            return F.multi_margin_loss(input, target)

        with pytest.raises(UnsupportedError, match="own_margin: label smoothing is defined for"):
            own_margin(logits, mixed(labels, smoothing=0.1))

    def test_registering_a_known_loss_changes_nothing(self, labels, logits):
        target = mixed(labels, smoothing=0.1)
        before = F.cross_entropy(logits, target)
        register_loss(F.cross_entropy)
        assert torch.equal(F.cross_entropy(logits, target), before)


def count_graphs(function):
    """Compile without graph breaks and count the compilations."""
    graphs = []

    def backend(module, example_inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True), graphs


class TestCompile:
    @pytest.mark.parametrize("weight", [None, torch.rand(C) + 0.1], ids=["plain", "weighted"])
    @pytest.mark.parametrize("make", [mixed, per_example])
    def test_loss_is_one_graph_for_all_mixing_weights(self, make, weight):
        def loss_of(logits, target):
            return F.cross_entropy(logits, target, weight)

        compiled, graphs = count_graphs(loss_of)
        for step in range(10):
            g = torch.Generator().manual_seed(step)
            logits = torch.randn(6, C, generator=g).requires_grad_()
            labels = torch.randint(C, (6,), generator=g)
            lam = torch.rand((6,) if make is per_example else (), generator=g)
            mixture = Mixture.of(labels).mix(torch.randperm(6, generator=g), lam).smooth(0.1)
            loss = compiled(logits, MixedTarget.of(mixture))
            assert mixture.receipt.consumed
            expected = loss_of(logits, MixedTarget.of(mixture))
            for a, b in (
                (loss, expected),
                *zip(
                    torch.autograd.grad(loss, logits),
                    torch.autograd.grad(expected, logits),
                    strict=True,
                ),
            ):
                torch.testing.assert_close(a, b)
        assert len(graphs) == 1

    @pytest.mark.skipif(
        tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8),
        reason="torch before 2.8 can't trace methods of tensor subclasses",
    )
    def test_whole_step_is_one_graph(self):
        """Model, loss, views and accuracy together, fed by a real run."""
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        model.append(nn.Linear(4 * 36, C))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = Run([MixUp(alpha=1.0), LabelSmoothing(0.1)], model=model, optimizer=optimizer)

        def step(x, y):
            logits = model(x)
            y = y.view(-1).to(logits.device).long()
            loss = F.cross_entropy(logits, y)
            keep = y != 3
            accuracy = (logits.argmax(1) == y).float().mean()
            return loss, accuracy, (keep * accuracy).sum(), logits

        compiled, graphs = count_graphs(step)
        mixings = set()
        for seed in range(10):
            g = torch.Generator().manual_seed(seed)
            y = torch.randint(C, (8,), generator=g)
            x, target = run.on_batch(torch.randn(8, 3, 8, 8, generator=g), y)
            loss, accuracy, _, logits = compiled(x, target)
            expected = F.cross_entropy(logits.detach(), target.mixture.dense(C))
            torch.testing.assert_close(loss.detach(), expected)
            assert accuracy == (logits.argmax(1) == y).float().mean()
            loss.backward()
            run.step()
            optimizer.zero_grad()
            mixings.add(run.metrics["mosaic/MixUp/mixing"])
        assert len(mixings) == 10
        assert len(graphs) == 1

    def test_an_ignored_mixture_is_noticed_in_compiled_code(self):
        run, target = mixed_step(torch.tensor([0, 1, 2]))

        def step(logits, y):
            return -(F.one_hot(y, C) * logits.log_softmax(1)).sum()

        compiled, _ = count_graphs(step)
        compiled(torch.randn(3, C), target)
        with pytest.raises(LossError):
            run.check_loss()


class Selection(Algorithm):
    """Mixes with a weight for each example, as per-example CutMix would."""

    place = Place.MIXING
    changes_labels = True
    settings = {}  # noqa: RUF012  # a test's stand-in for a dataclass without fields

    def on_batch(self, batch, run):
        lam = torch.linspace(0, 1, len(batch.input))
        return batch.replace(labels=batch.labels.mix(torch.arange(len(lam)).roll(1), lam))


class Focal(nn.Module):
    """A loss with state and no smoothing."""

    def __init__(self, gamma=2.0, reduction="mean"):
        super().__init__()
        self.gamma, self.reduction = gamma, reduction

    def forward(self, input, target):
        log_p = input.log_softmax(1).gather(1, target[:, None])[:, 0]
        loss = -((1 - log_p.exp()) ** self.gamma * log_p)
        return loss if self.reduction == "none" else loss.mean()


def proxy_step(labels, loss, recipe):
    """A run that leaves labels plain, its target, and the proxy for the loss."""
    run, target = mixed_step(labels, recipe, carrier="proxy")
    return run, target, LossProxy(loss, lambda: run.mixture)


CROSS_ENTROPIES = {
    "function": F.cross_entropy,
    "module": nn.CrossEntropyLoss(),
    "class weights": nn.CrossEntropyLoss(torch.rand(C) + 0.1),
    "own smoothing": nn.CrossEntropyLoss(label_smoothing=0.2),
    "summed": nn.CrossEntropyLoss(reduction="sum"),
    "each": nn.CrossEntropyLoss(reduction="none"),
}


class TestLossProxy:
    @pytest.mark.parametrize(
        "recipe",
        [(MixUp(1.0),), (LabelSmoothing(0.1),), (MixUp(1.0), LabelSmoothing(0.1))],
        ids=["mixed", "smoothed", "both"],
    )
    @pytest.mark.parametrize("ignored", [False, True], ids=["all", "ignored"])
    @pytest.mark.parametrize("loss", CROSS_ENTROPIES.values(), ids=CROSS_ENTROPIES)
    def test_equals_the_mixed_target(self, labels, logits, loss, ignored, recipe):
        if ignored:
            labels[2] = -100
        run, target, proxy = proxy_step(labels, loss, recipe)
        assert type(target) is Tensor
        assert torch.equal(target, labels)
        actual = proxy(logits, target)
        run.check_loss()
        expected = loss(logits, MixedTarget.of(run.mixture))
        torch.testing.assert_close(actual, expected)
        grads = (torch.autograd.grad(value.sum(), logits)[0] for value in (actual, expected))
        torch.testing.assert_close(*grads)

    def test_options_of_the_call(self, labels, logits):
        run, target, proxy = proxy_step(labels, F.cross_entropy, (MixUp(), LabelSmoothing(0.1)))
        weight = torch.rand(C)
        options = {"weight": weight, "label_smoothing": 0.2, "reduction": "sum"}
        actual = proxy(logits, target, **options)
        torch.testing.assert_close(
            actual, F.cross_entropy(logits, MixedTarget.of(run.mixture), **options)
        )

    def test_own_smoothing_of_a_module_is_put_back(self, labels, logits):
        loss = nn.CrossEntropyLoss(label_smoothing=0.2)
        _, target, proxy = proxy_step(labels, loss, (LabelSmoothing(0.1),))
        proxy(logits, target)
        assert loss.label_smoothing == 0.2
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            proxy(torch.randn(2, C), target)
        assert loss.label_smoothing == 0.2

    def test_wrapper_that_keeps_the_module_it_calls(self, labels, logits):
        """The way fastai's CrossEntropyLossFlat holds torch's."""

        class Flat:
            def __init__(self):
                self.func = nn.CrossEntropyLoss()

            def __call__(self, input, target):
                return self.func(input.reshape(-1, C), target.reshape(-1))

        run, target, proxy = proxy_step(labels, Flat(), (MixUp(), LabelSmoothing(0.1)))
        expected = F.cross_entropy(logits, MixedTarget.of(run.mixture))
        torch.testing.assert_close(proxy(logits, target), expected)

    def test_any_loss_is_interpolated(self, labels, logits):
        focal = Focal()
        run, target, proxy = proxy_step(labels, focal, (MixUp(1.0),))
        (own, keep), (other, lam) = run.mixture.components
        expected = keep * focal(logits, own) + lam * focal(logits, other)
        torch.testing.assert_close(proxy(logits, target), expected)
        run.check_loss()

    def test_smoothing_of_another_loss_is_refused(self, labels, logits):
        _, target, proxy = proxy_step(labels, Focal(), (LabelSmoothing(0.1),))
        with pytest.raises(
            UnsupportedError, match=r"defined for a cross entropy, and the loss is Focal"
        ):
            proxy(logits, target)

    def test_a_loss_that_returns_a_known_one_is_called_once(self, labels, logits):
        calls = []

        def loss(input, target):
            calls.append(type(target))
            return F.cross_entropy(input, target)

        run, target, proxy = proxy_step(labels, loss, (MixUp(1.0), LabelSmoothing(0.1)))
        expected = F.cross_entropy(logits, MixedTarget.of(run.mixture))
        assert torch.equal(proxy(logits, target), expected)  # to the last bit
        assert calls == [MixedTarget]

    def test_a_loss_that_computes_more_is_interpolated(self, labels, logits):
        """What it adds may have used the plain label."""

        def loss(input, target):
            return F.cross_entropy(input, target) + 0.5 * Focal()(input, target)

        run, target, proxy = proxy_step(labels, loss, (MixUp(1.0),))
        (own, keep), (other, lam) = run.mixture.components
        expected = keep * loss(logits, own) + lam * loss(logits, other)
        torch.testing.assert_close(proxy(logits, target), expected)
        run.check_loss()

    def test_smoothing_of_a_cross_entropy_inside_a_loss(self, labels, logits):
        run, target, proxy = proxy_step(
            labels, lambda x, y: 0.5 * F.cross_entropy(x, y), (MixUp(1.0), LabelSmoothing(0.1))
        )
        expected = 0.5 * F.cross_entropy(logits, MixedTarget.of(run.mixture))
        torch.testing.assert_close(proxy(logits, target), expected)

    def test_a_loss_that_computes_more_now_and_then(self, labels, logits):
        factors, calls = [1.0, 3.0, 3.0, 3.0, 1.0], []

        def loss(input, target):
            calls.append(type(target))
            value, factor = F.cross_entropy(input, target), factors[len(calls) - 1]
            return value if factor == 1 else factor * value

        run, target, proxy = proxy_step(labels, loss, (MixUp(1.0),))
        plain = F.cross_entropy(logits, MixedTarget.of(run.mixture))
        assert torch.equal(proxy(logits, target), plain)
        torch.testing.assert_close(proxy(logits, target), 3 * plain)
        assert torch.equal(proxy(logits, target), plain)
        assert calls == [MixedTarget, MixedTarget, Tensor, Tensor, MixedTarget]

    def test_weights_per_example(self, labels, logits):
        focal = Focal(reduction="none")
        run, target, proxy = proxy_step(labels, focal, (Selection(),))
        (own, keep), (other, lam) = run.mixture.components
        expected = keep * focal(logits, own) + lam * focal(logits, other)
        torch.testing.assert_close(proxy(logits, target), expected)
        proxy.reduction = "mean"
        message = r"need a loss of shape \(N, ...\), as with reduction=\"none\", got \(\)"
        with pytest.raises(UnsupportedError, match=message):
            proxy(logits, target)

    @pytest.mark.parametrize("trivial", [False, True], ids=["none", "trivial"])
    def test_plain_batches_pass_through(self, labels, logits, trivial):
        calls = []

        def loss(*args, **kwargs):
            calls.append((args, kwargs))
            return F.cross_entropy(*args, **kwargs)

        mixture = Mixture.of(labels) if trivial else None
        result = LossProxy(loss, lambda: mixture)(logits, labels, reduction="sum")
        assert torch.equal(result, F.cross_entropy(logits, labels, reduction="sum"))
        assert calls == [((logits, labels), {"reduction": "sum"})]

    def test_labels_keep_the_trainers_tensor_type(self, labels, logits):
        class Category(Tensor):
            pass

        seen = []

        def loss(input, target):
            seen.append(type(target))
            return F.cross_entropy(input, target.as_subclass(Tensor))

        _, target, proxy = proxy_step(labels, loss, (MixUp(),))
        for _ in range(2):
            proxy(logits, target.as_subclass(Category))
        assert seen == [MixedTarget, *[Category] * 4]  # what it does with a mixture is tried once

    def test_attributes_are_those_of_the_loss(self):
        focal = Focal()
        proxy = LossProxy(focal, lambda: None)
        assert proxy.gamma == 2.0
        proxy.gamma = 3.0
        assert focal.gamma == 3.0
        assert proxy.state_dict() == {}
        with pytest.raises(AttributeError, match="no_such"):
            _ = proxy.no_such

    @pytest.mark.parametrize(
        "duplicate",
        [copy.copy, copy.deepcopy, lambda proxy: pickle.loads(pickle.dumps(proxy))],
        ids=["copy", "deepcopy", "pickle"],
    )
    def test_copies_do_not_recurse(self, labels, logits, duplicate):
        mixture = mixed(labels).mixture
        proxy = LossProxy(nn.CrossEntropyLoss(), functools.partial(_return, mixture))
        again = duplicate(proxy)
        assert type(again) is LossProxy
        torch.testing.assert_close(again(logits, labels), proxy(logits, labels))
        assert again.reduction == "mean"


def _return(value):
    return value
