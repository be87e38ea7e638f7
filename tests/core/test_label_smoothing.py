"""Label smoothing: the dense function against its formula, and the fused way inside a run."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mosaic_core import Run
from mosaic_core.algorithms import LabelSmoothing, smooth_labels
from mosaic_core.target import MixedTarget

N, C = 6, 5


def logits_of(shape=(), dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return torch.randn(N, C, *shape, generator=g).to(dtype)


def labels_of(shape=()):
    return torch.randint(C, (N, *shape), generator=torch.Generator().manual_seed(1))


def smoothed_in_a_run(labels, smoothing=0.1):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = Run([LabelSmoothing(smoothing)], model=model, optimizer=optimizer)
    return run.on_batch(torch.zeros(len(labels), 1), labels)[1]


class TestFunction:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 1.0])
    @pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_formula_for_class_indices(self, dtype, shape, smoothing):
        logits, labels = logits_of(shape, dtype), labels_of(shape)
        dense = smooth_labels(logits, labels, smoothing)
        assert (dense.shape, dense.dtype) == (logits.shape, dtype)
        expected = torch.full(logits.shape, smoothing / C, dtype=torch.float64)
        for at in torch.cartesian_prod(*(torch.arange(n) for n in labels.shape)).reshape(
            -1, labels.dim()
        ):
            n, *rest = at.tolist()
            expected[(n, int(labels[(n, *rest)]), *rest)] += 1 - smoothing
        tol = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(dense.double(), expected, rtol=tol, atol=tol)

    @pytest.mark.parametrize("shape", [(), (2, 3)])
    def test_formula_for_dense_targets(self, shape):
        logits = logits_of(shape)
        target = torch.rand(logits.shape).double()
        before = target.clone()
        dense = smooth_labels(logits, target, 0.2)
        assert dense.dtype == torch.float32
        torch.testing.assert_close(dense.double(), 0.8 * target + 0.2 / C, rtol=1e-6, atol=1e-6)
        assert torch.equal(target, before)
        again = smooth_labels(logits, target.float(), 0.0)
        assert again.data_ptr() != target.data_ptr()

    @pytest.mark.parametrize("shape", [(), (2, 3)])
    def test_its_loss_is_torchs(self, shape):
        logits, labels = logits_of(shape), labels_of(shape)
        loss = F.cross_entropy(logits, smooth_labels(logits, labels, 0.1))
        torch.testing.assert_close(loss, F.cross_entropy(logits, labels, label_smoothing=0.1))

    def test_other_integer_dtypes(self):
        dense = smooth_labels(logits_of(), labels_of().to(torch.uint8))
        assert torch.equal(dense, smooth_labels(logits_of(), labels_of()))

    def test_class_indices_as_long_as_there_are_classes(self):
        """N == C must not be mistaken for anything else."""
        dense = smooth_labels(torch.zeros(5, 5), torch.arange(5), 0.0)
        assert torch.equal(dense, torch.eye(5))

    def test_empty_batch(self):
        assert smooth_labels(torch.zeros(0, C), torch.zeros(0, dtype=torch.long)).shape == (0, C)


class TestErrors:
    @pytest.mark.parametrize("smoothing", [-0.1, 1.1, float("nan")])
    def test_smoothing(self, smoothing):
        with pytest.raises(ValueError, match=r"smooth_labels: smoothing must be in \[0, 1\], got"):
            smooth_labels(logits_of(), labels_of(), smoothing)
        with pytest.raises(ValueError, match=r"LabelSmoothing: smoothing must be in \[0, 1\], got"):
            LabelSmoothing(smoothing)

    @pytest.mark.parametrize("label", [-100, -1, C])
    def test_labels_that_are_no_class(self, label):
        labels = labels_of()
        labels[2] = label
        with pytest.raises(ValueError, match=r"classes in \[0, 5\), got \[.*ignores such labels"):
            smooth_labels(logits_of(), labels)

    @pytest.mark.parametrize(
        "target", [torch.zeros(N + 1, dtype=torch.long), torch.zeros(N), torch.zeros(N, C + 1)]
    )
    def test_shapes(self, target):
        with pytest.raises(
            ValueError, match=r"smooth_labels: target must be class indices of shape"
        ):
            smooth_labels(logits_of(), target)


class Operations(TorchDispatchMode):
    """Records what is computed, with the size of every result."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen.append((str(func), tuple(result.shape) if hasattr(result, "shape") else None))
        return result


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_dense_targets_are_written_once(shape):
    """No one-hot tensor of int64 is made on the way, of twice the size of the logits."""
    logits = logits_of(shape)
    with Operations() as ours:
        smooth_labels(logits, labels_of(shape))
    large = [name for name, shape in ours.seen if shape == tuple(logits.shape)]
    assert large == ["aten.full_like.default", "aten.scatter_.value"]


class TestInARun:
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("weight", [None, torch.tensor([0.2, 1.0, 3.0, 0.7, 1.5])])
    @pytest.mark.parametrize("ignore_index", [-100, 3])
    @pytest.mark.parametrize("shape", [(), (2, 3)])
    def test_ignored_labels_and_class_weights_keep_torchs_meaning(
        self, shape, ignore_index, weight, reduction
    ):
        logits, labels = logits_of(shape).requires_grad_(), labels_of(shape)
        labels[1] = ignore_index
        options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction}
        loss = F.cross_entropy(logits, smoothed_in_a_run(labels), **options)
        expected = F.cross_entropy(logits, labels, label_smoothing=0.1, **options)
        assert torch.equal(loss, expected)
        grads = (torch.autograd.grad(value.sum(), logits)[0] for value in (loss, expected))
        assert torch.equal(*grads)

    def test_is_the_fused_loss_and_nothing_more(self):
        """The same operations as F.cross_entropy(label_smoothing): no dense target is made."""
        logits, labels = logits_of((2, 3)), labels_of((2, 3))
        target = smoothed_in_a_run(labels)
        with Operations() as ours:
            F.cross_entropy(logits, target)
        with Operations() as torchs:
            F.cross_entropy(logits, labels, label_smoothing=0.1)
        assert ours.seen == torchs.seen
        assert len(ours.seen) > 1

    def test_no_one_hot(self, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("a one-hot tensor was made")

        monkeypatch.setattr(F, "one_hot", refuse)
        target = smoothed_in_a_run(labels_of())
        F.cross_entropy(logits_of(), target)
        F.nll_loss(logits_of().log_softmax(1), target)

    def test_label_is_shared_not_copied(self):
        labels = labels_of()
        target = smoothed_in_a_run(labels)
        assert isinstance(target, MixedTarget)
        assert target.data_ptr() == labels.data_ptr()

    def test_input_stays_the_users_tensor(self):
        model = nn.Linear(1, 1)
        run = Run([LabelSmoothing()], model=model)
        x = torch.zeros(N, 1)
        assert run.on_batch(x, labels_of())[0] is x

    def test_dense_targets(self):
        dense = torch.rand(N, C)
        loss = F.cross_entropy(logits_of(), smoothed_in_a_run(dense))
        torch.testing.assert_close(loss, F.cross_entropy(logits_of(), dense, label_smoothing=0.1))
