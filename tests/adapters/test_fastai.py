"""fastai against a loop by hand and the bare Learner: what the contract does not know of."""

import copy
import functools
import pickle
import warnings

import cloudpickle
import pytest
import torch
import torch.nn.functional as F
from fastai_common import (
    CPUMixedPrecision,
    batches,
    cross_entropy,
    difference,
    learner,
    state,
    typed_dataloaders,
    wrapped,
)

with warnings.catch_warnings():
    # Of fastai itself, which scripts functions when it is imported.
    warnings.simplefilter("ignore")
    from fastai.callback.core import (
        Callback,
        CancelBackwardException,
        CancelBatchException,
        CancelFitException,
        CancelStepException,
        FetchPredsCallback,
    )
    from fastai.callback.fp16 import NonNativeMixedPrecision
    from fastai.callback.mixup import CutMix
    from fastai.callback.mixup import MixUp as FastaiMixUp
    from fastai.callback.progress import CSVLogger
    from fastai.callback.schedule import combined_cos
    from fastai.callback.tracker import SaveModelCallback
    from fastai.callback.training import GradientAccumulation
    from fastai.distributed import ParallelTrainer
    from fastai.learner import Metric, load_learner
    from fastai.losses import (
        BCEWithLogitsLossFlat,
        CrossEntropyLossFlat,
        DiceLoss,
        FocalLoss,
        FocalLossFlat,
        L1LossFlat,
        LabelSmoothingCrossEntropy,
        LabelSmoothingCrossEntropyFlat,
        MSELossFlat,
    )
    from fastai.optimizer import SGD, Adam, OptimWrapper, ranger
    from fastai.torch_core import TensorCategory, TensorMask
    from fastai.vision.learner import vision_learner
from timed import check_trainer
from torch import nn

from mosaic_core import Need, Run
from mosaic_core.algorithm import Algorithm, Place
from mosaic_core.algorithms import (
    EMA,
    SAM,
    BlurPool,
    Factorize,
    LabelSmoothing,
    MixUp,
    SelectiveBackprop,
)
from mosaic_core.mixture import Mixture
from mosaic_core.target import MixedTarget
from mosaic_core.testing._network import network
from mosaic_fastai import MosaicCallback
from mosaic_fastai._workload import train

# Of fastai's load_model, which names a module of NumPy by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning")
SHADOWED = {"fit", "save", "load"}


def type_of(item):
    return type(item).__name__


def recipe():
    return [BlurPool(), MixUp(0.4), LabelSmoothing(), EMA("2ba")]


def mosaic(algorithms=None):
    return MosaicCallback(recipe() if algorithms is None else algorithms, seed=3)


def by_hand(algorithms, make, *, steps=20, schedule=None, extra=None):
    """Train with fastai's optimizer and a loop of one's own, and return the run."""
    run = Run(algorithms, model=network(), seed=3)
    model, opt = run.model.train(), make(list(run.model.parameters()), lr=0.05)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    biases = [model.conv2.bias, model.head.bias]
    for parameter in [*(p for norm in norms for p in norm.parameters()), *biases]:
        opt.state[parameter]["do_wd"] = False
    run.start([opt], total_steps=steps, steps_per_epoch=10)

    def backward(batch):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        (loss if extra is None else loss + extra(model)).backward()

    for step in range(steps):
        for name, function in (schedule or {}).items():
            opt.set_hyper(name, function(step / steps))
        batch = run.on_batch(batches()[step % 10])
        backward(batch)
        run.second_pass(functools.partial(backward, batch))
        run.on_gradients()
        opt.step()
        opt.zero_grad()
        run.end_step()
        if step % 10 == 9:
            run.end_epoch()
    return run


def both(run):
    """The training weights of a run, and those to evaluate."""
    run.leave_evaluation()
    weights = state(run.model)
    with run.evaluation():
        return weights, state(run.model)


def assert_same(ours, expected, tolerance=1e-6):
    for a, b in zip(both(ours), both(expected), strict=True):
        assert difference(a, b) <= tolerance


# Optimizers and schedules.


@pytest.mark.parametrize("make", [SGD, Adam, ranger], ids=["SGD", "Adam", "ranger"])
def test_fastais_own_optimizers(tmp_path, make):
    learn = learner(tmp_path, mosaic(), opt_func=make, loss_func=cross_entropy)
    learn.fit(2)
    assert_same(learn.mosaic.run, by_hand(recipe(), make))


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("make", [Adam, wrapped()], ids=["Adam", "wrapped"])
def test_fit_one_cycle(tmp_path, make, late):
    callback = mosaic()
    learn = learner(tmp_path, None if late else callback, opt_func=make, loss_func=cross_entropy)
    learn.fit_one_cycle(2, 0.05, cbs=callback if late else None)
    schedule = {
        "lr": combined_cos(0.25, 0.05 / 25, 0.05, 0.05 / 1e5),
        "mom": combined_cos(0.25, 0.95, 0.85, 0.95),
    }
    assert_same(callback.run, by_hand(recipe(), make, schedule=schedule))
    assert hasattr(learn, "mosaic") is not late
    assert {"fit", "save", "load"} & vars(learn).keys() == (
        set() if late else {"fit", "save", "load"}
    )


class Gain(Algorithm):
    """Surgery that makes a parameter: the output of a layer is scaled."""

    place = Place.SURGERY
    settings = {}  # noqa: RUF012  # a test's stand-in for a dataclass without fields

    def prepare_model(self, model, run):
        model.head.register_parameter("gain", nn.Parameter(torch.ones(())))
        model.head.register_forward_hook(lambda module, args, output: output * module.gain)


@pytest.mark.parametrize("make", [Adam, wrapped()], ids=["Adam", "wrapped"])
def test_new_parameters_join_an_optimizer_that_exists(tmp_path, make):
    def split(model):
        return [list(model[:4].parameters()), list(model[4:].parameters())]

    trained = []
    for late in (False, True):
        callback = mosaic([Gain(), MixUp()])
        learn = learner(tmp_path, None if late else callback, opt_func=make, splitter=split)
        learn.fit_one_cycle(1, slice(0.01, 0.1), cbs=callback if late else None)
        assert len(learn.opt.param_lists) == 2
        trained.append(state(learn.model))
    assert trained[0]["head.gain"] != 1
    assert difference(trained[1], trained[0]) == 0


def test_what_surgery_makes_of_frozen_layers_is_unfrozen_with_the_rest(tmp_path):
    def split(model):
        return [list(model[:5].parameters()), list(model[5:].parameters())]

    learn = learner(tmp_path, splitter=split)
    learn.freeze()
    learn.add_cb(mosaic([Factorize(min_channels=4, latent_channels=1, factorize_linears=False)]))
    learn.fit(1)
    assert not learn.model.conv2.weight_in.requires_grad
    before = state(learn.model)
    learn.unfreeze()
    learn.fit(1)
    for name in ("conv2.weight_in", "conv2.weight_out"):
        assert not torch.equal(state(learn.model)[name], before[name])


def test_an_optimizer_that_was_made_before_the_learner(tmp_path):
    model = network()
    optimizer = OptimWrapper(opt=torch.optim.SGD(model.parameters(), lr=0.1))
    learn = learner(tmp_path, mosaic([Gain()]), model=model, opt_func=optimizer)
    learn.fit(1)
    assert learn.model.head.gain != 1
    model = network()
    some = OptimWrapper(opt=torch.optim.SGD(model.head.parameters(), lr=0.1))
    learn = learner(tmp_path, mosaic([BlurPool()]), model=model, opt_func=some)
    before = state(model)
    learn.fit(1)  # surgery made no parameters, so the user's choice stands
    changed = {
        name for name, _ in model.named_parameters() if (before[name] != state(model)[name]).any()
    }
    assert changed == {"head.weight", "head.bias"}


def test_an_optimizer_with_other_groups_than_the_splitter_is_refused(tmp_path):
    model = network()
    groups = [{"params": [p]} for p in model.parameters()]
    optimizer = OptimWrapper(opt=torch.optim.SGD(groups, lr=0.1))
    learn = learner(tmp_path, mosaic([Gain()]), model=model, opt_func=optimizer)
    with pytest.raises(RuntimeError, match=r"the splitter groups them not as.*opt_func"):
        learn.fit(1)


def tiny(pretrained=False):
    """An architecture for vision_learner: a body that ends in a pooling layer, and a head."""
    body = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2),
    )
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def fine_tuned(path, callback):
    torch.manual_seed(0)
    learn = vision_learner(
        typed_dataloaders(),
        tiny,
        n_out=5,
        pretrained=False,
        normalize=False,
        cut=-3,
        splitter=lambda model: [list(model[0].parameters()), list(model[1].parameters())],
        loss_func=CrossEntropyLossFlat(),
        cbs=callback,
        path=path,
    )
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    seen = []

    class Watch(Callback):
        def after_train(self):
            seen.append(state(self.model))

    learn.fine_tune(2, cbs=Watch())
    return learn, seen


def test_fine_tune(tmp_path):
    _, bare = fine_tuned(tmp_path, None)
    learn, averaging = fine_tuned(tmp_path, mosaic([EMA("2ba")]))
    for ours, expected in zip(averaging, bare, strict=True):  # averaging does not touch training
        assert difference(ours, expected) == 0
    assert learn.mosaic.run.progress.step == 9
    assert learn.mosaic.run.in_evaluation
    learn, seen = fine_tuned(tmp_path, mosaic([*recipe(), SAM()]))
    assert torch.equal(seen[0]["0.0.weight"], state(tiny())["0.weight"]) is False
    assert torch.equal(seen[0]["0.3.weight"], fine_tuned(tmp_path, mosaic([]))[1][0]["0.3.weight"])
    assert not torch.equal(seen[0]["0.3.weight"], seen[1]["0.3.weight"])  # frozen, then not
    assert learn.mosaic.run.progress.step == 9


@pytest.mark.parametrize("fits", [0, 1], ids=["fresh", "after a fit"])
def test_lr_find_leaves_no_trace(tmp_path, fits):
    runs = []
    for find in (False, True):
        learn = learner(tmp_path, mosaic([*recipe(), SAM()]), opt_func=Adam)
        for _ in range(fits):
            learn.fit(1)
        if find:
            before, step = state(learn.model), learn.mosaic.run.progress.step
            learn.lr_find(num_it=12, show_plot=False)
            assert difference(state(learn.model), before) == 0
            assert learn.mosaic.run.started is False
            assert fits or step == 0
        learn.fit(1)
        runs.append(learn.mosaic.run)
    assert runs[1].progress.step == 10 * (fits + 1)
    assert_same(runs[1], runs[0], 0)


# The loss.


class Compare(Callback):
    """Compares the loss of each step with the interpolated one."""

    order = 20

    def __init__(self, loss):
        self.own, self.compared = loss, 0

    def after_loss(self):
        if not self.training:
            return
        parts = [
            (1 if weight is None else weight) * self.own(self.pred, label)
            for label, weight in self.learn.mosaic.run.mixture.components
        ]
        assert len(parts) == 2
        expected = sum(parts).as_subclass(torch.Tensor)
        actual = self.learn.loss.as_subclass(torch.Tensor)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
        self.compared += 1


def indices(index, shape=()):
    g = torch.Generator().manual_seed(index)
    return torch.randint(3, (8, *shape), generator=g)


LOSSES = {
    "CrossEntropyLossFlat": (CrossEntropyLossFlat(), TensorCategory),
    "class weights": (
        CrossEntropyLossFlat(weight=torch.tensor([1.0, 2, 3])),
        TensorCategory,
    ),
    "LabelSmoothingCrossEntropyFlat": (LabelSmoothingCrossEntropyFlat(), TensorCategory),
    "LabelSmoothingCrossEntropy": (LabelSmoothingCrossEntropy(), TensorCategory),
    "FocalLossFlat": (FocalLossFlat(), TensorCategory),
    "FocalLoss": (FocalLoss(), TensorCategory),
    "F.cross_entropy": (F.cross_entropy, TensorCategory),
    "CrossEntropyLoss": (nn.CrossEntropyLoss(), TensorCategory),
    "DiceLoss": (DiceLoss(), TensorMask),
    "CrossEntropyLossFlat of masks": (CrossEntropyLossFlat(axis=1), TensorMask),
    "MSELossFlat": (MSELossFlat(), None),
    "L1LossFlat": (L1LossFlat(), None),
    "BCEWithLogitsLossFlat": (BCEWithLogitsLossFlat(), None),
}


@pytest.mark.parametrize("cast", [True, False], ids=["plain tensors", "fastai's types"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_interpolated(tmp_path, name, cast):
    loss, kind = LOSSES[name]
    data = []
    for i in range(4):
        x = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(i))
        if kind is None:
            y = torch.rand(8, 3, generator=torch.Generator().manual_seed(i))
        else:
            y = kind(indices(i, (4, 4) if kind is TensorMask else ()))
        data.append((x, y))
    model = nn.Sequential(nn.Conv2d(2, 3, 1))
    if kind is not TensorMask:
        model.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    compare = Compare(loss)
    learn = learner(
        tmp_path,
        [mosaic([MixUp(1.0)]), compare],
        model=model,
        loss_func=loss,
        dls=lists(data),
    )
    if not cast:
        learn.remove_cb(learn.cast_to_tensor)
    learn.fit(1)
    assert compare.compared == 4
    assert learn.loss_func is loss


def lists(data, evaluation=()):
    """Loaders that are lists of batches."""
    from fastai.data.core import DataLoaders

    return DataLoaders(data, list(evaluation), device=torch.device("cpu"))


@pytest.mark.parametrize("own", [0.0, 0.2])
def test_smoothing_of_crossentropylossflat(tmp_path, own):
    loss = CrossEntropyLossFlat(label_smoothing=own)
    learn = learner(tmp_path, mosaic([LabelSmoothing(0.1)]), loss_func=loss)
    learn.fit(2)
    smoothing = 1 - (1 - own) * 0.9
    expected = learner(tmp_path, loss_func=nn.CrossEntropyLoss(label_smoothing=smoothing))
    expected.fit(2)
    assert difference(state(learn.model), state(expected.model)) <= 1e-6
    assert loss.func.label_smoothing == own


def test_smoothing_of_a_cross_entropy_inside_a_loss(tmp_path):
    def half(pred, target):
        return 0.5 * F.cross_entropy(pred, target)

    learn = learner(tmp_path, mosaic([LabelSmoothing(0.1)]), loss_func=half)
    learn.fit(1)
    expected = learner(
        tmp_path, loss_func=lambda p, y: 0.5 * F.cross_entropy(p, y, label_smoothing=0.1)
    )
    expected.fit(1)
    assert difference(state(learn.model), state(expected.model)) <= 1e-6


def test_fastai_leaves_the_carrier_alone():
    """It replaces Tensor.as_subclass by one that shares the attributes of its result."""
    label = torch.tensor([0, 1])
    target = MixedTarget.of(Mixture.of(label).smooth(0.1))
    assert not vars(label)
    assert type(pickle.loads(pickle.dumps(target))) is torch.Tensor


# Metrics, the recorder and values.


class Targets(Metric):
    """Collects the targets it sees."""

    def reset(self):
        self.seen = []

    def accumulate(self, learn):
        self.seen.append(learn.y)

    @property
    def value(self):
        return len(self.seen)


def test_metrics_see_plain_labels_once(tmp_path):
    metric = Targets()
    learn = learner(tmp_path, mosaic([*recipe(), SAM()]), metrics=metric)
    learn.recorder.train_metrics = True
    seen = []

    class Watch(Callback):
        def after_train(self):
            seen.extend(metric.seen)

    losses = []

    class First(Callback):
        def after_loss(self):
            if self.training:
                losses.append(self.learn.loss.detach().clone())

    learn.fit(1, cbs=[Watch(), First()])
    assert len(seen) == 10
    for ours, (_, own) in zip(seen, batches(), strict=True):
        assert type(ours) is torch.Tensor
        assert torch.equal(ours, own)
    assert len(losses) == 20
    smooth, beta = 0.0, 0.98
    for i, loss in enumerate(losses[::2], start=1):  # those of the first passes are recorded
        smooth = beta * smooth + (1 - beta) * float(loss)
        recorded = float(learn.recorder.losses[i - 1])
        assert recorded == pytest.approx(smooth / (1 - beta**i), rel=1e-5)
    assert len(learn.recorder.losses) == 10


def test_values_are_in_the_run(tmp_path):
    learn = learner(tmp_path, mosaic())
    learn.fit(1, cbs=CSVLogger())
    assert {"mosaic/MixUp/mixing", "mosaic/EMA/smoothing"} <= learn.mosaic.run.metrics.keys()
    assert learn.mosaic.run.report.notes == ["batch: input at 0, target at -1"]


# Two passes, accumulation.


def penalty(model):
    return model.head.weight.square().sum()


class Penalty(Callback):
    """Adds to the loss as fastai's RNNRegularizer does."""

    def after_loss(self):
        if self.training:
            self.learn.loss_grad = (
                self.learn.loss_grad + self.learn.model.head.weight.square().sum()
            )


def test_the_second_pass_computes_what_callbacks_add_to_the_loss(tmp_path):
    algorithms = [MixUp(), SAM(rho=0.5)]
    learn = learner(
        tmp_path, [mosaic(algorithms), Penalty()], opt_func=SGD, loss_func=cross_entropy
    )
    learn.fit(2)
    expected = by_hand(algorithms, SGD, extra=penalty)
    assert_same(learn.mosaic.run, expected)
    assert learn.model.norm1.num_batches_tracked == 20


def test_windows_go_on_over_the_end_of_an_epoch(tmp_path):
    cbs = [mosaic([*recipe(), SAM()]), GradientAccumulation(8 * 3)]
    learn = learner(tmp_path, cbs)
    learn.fit(2)
    run = learn.mosaic.run
    assert (run.progress.step, run.progress.total_steps, run.progress.epoch) == (6, 6, 2)


# torch's, where there is no GPU for fastai's own mixed precision.
@pytest.mark.filterwarnings("ignore:.*(CUDA is not available|cuda.is_available).*:UserWarning")
@pytest.mark.parametrize("switch", ["to_fp16", "to_bf16"])
def test_mixed_precision_that_is_off(tmp_path, switch):
    if torch.cuda.is_available():
        pytest.skip("it is on")
    runs = []
    for name in (None, switch):
        learn = learner(tmp_path, mosaic([*recipe(), SAM()]))
        if name is not None:
            getattr(learn, name)()
        learn.fit(1)
        runs.append(learn.mosaic.run)
    assert_same(runs[1], runs[0], 0)


def test_cancelled_steps_are_not_applied(tmp_path):
    updates = []

    class Counted(EMA):
        def on_step_end(self, run):
            updates.append(run.progress.step)
            super().on_step_end(run)

    callback = mosaic([Counted("4ba")])
    precision = CPUMixedPrecision("fp16", init_scale=2.0**22)
    learn = learner(tmp_path, [callback, precision])
    learn.fit(2)
    assert callback.run.progress.step == 20
    assert updates[0] > 1  # the first ones overflowed
    assert updates[-1] == 20


class Cancel(Callback):
    """Skips the fourth micro-batch in an event."""

    order = 20

    def __init__(self, where, error):
        self.where, self.error = where, error

    def __call__(self, event_name):
        if event_name == self.where and self.training and self.train_iter == 3 and self.error:
            error, self.error = self.error, None  # a second pass has the same events
            raise error


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("before_batch", CancelBatchException),
        ("before_backward", CancelBackwardException),
        ("before_step", CancelStepException),
    ],
)
def test_what_is_cancelled_leaves_the_run_alone(tmp_path, where, error):
    applied = []

    class Counted(EMA):
        def on_step_end(self, run):
            applied.append(run.progress.step)
            super().on_step_end(run)

    cbs = [mosaic([MixUp(), Counted("4ba"), SAM()]), Cancel(where, error), GradientAccumulation(16)]
    learn = learner(tmp_path, cbs, loss_func=cross_entropy)
    learn.fit(1)
    steps = 4 if where == "before_batch" else 5
    assert learn.mosaic.run.progress.step == steps
    assert len(applied) == steps - (where == "before_step")


# Evaluation.


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.filterwarnings("ignore:.*more than one.*")
def test_evaluation_is_that_of_a_bare_learner(tmp_path, trained):
    learn = learner(tmp_path, mosaic([MixUp(), EMA("2ba"), SAM()]), dls=typed_dataloaders())
    bare = learner(tmp_path, dls=typed_dataloaders())
    if trained:
        learn.fit(1)
        assert learn.mosaic.run.in_evaluation
        bare.model.load_state_dict(learn.model.state_dict())
    before = state(learn.model)
    for call in (
        lambda it: it.validate(),
        lambda it: it.get_preds(with_loss=True),
        lambda it: it.get_preds(ds_idx=0),
        lambda it: it.predict(3),
        lambda it: it.tta(n=2),
    ):
        ours, expected = call(learn), call(bare)
        assert len(ours) == len(expected) > 0
        for a, b in zip(ours, expected, strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    assert difference(state(learn.model), before) == 0
    assert learn.mosaic.run.started is trained
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)


class Nested(Callback):
    order = 70

    def __init__(self, what):
        self.what = what

    def after_epoch(self):
        if self.learn.mosaic._depth == 1:
            self.what(self.learn)


@pytest.mark.parametrize(
    "what",
    [
        lambda learn: learn.validate(),
        lambda learn: learn.get_preds(),
        lambda learn: learn.tta(n=1),
    ],
    ids=["validate", "get_preds", "tta"],
)
def test_evaluating_in_the_middle_of_a_fit(tmp_path, what):
    runs = []
    for cbs in ([], [Nested(what)]):
        learn = learner(tmp_path, mosaic(), dls=typed_dataloaders())
        learn.recorder.run = True
        learn.fit(2, cbs=cbs)
        assert learn.mosaic.run.in_evaluation
        runs.append(learn.mosaic.run)
    assert_same(runs[1], runs[0], 0)


class Midway(Callback):
    """Evaluates after the second batch of each epoch, and lets training go on."""

    order = 70

    def __init__(self, evaluate):
        self.evaluate, self.seen, self.expected = evaluate, [], []

    def after_batch(self):
        if not self.training or self.learn.iter != 1:
            return
        learn, mosaic = self.learn, self.learn.mosaic
        training = state(learn.model)
        learn.model.eval()
        with mosaic.run.evaluation(), torch.no_grad():
            averaged = state(learn.model)
            ((x, y),) = batches(1, 1000)  # which the Learner validates on
            self.expected.append(F.cross_entropy(learn.model(x), y).item())
        assert difference(training, averaged) > 0
        self.seen.append(self.evaluate(learn))
        assert difference(state(learn.model), training) == 0
        learn.model.train()
        learn.training = True


def validated(learn):
    return learn.validate()[0]


def validated_inside(learn):
    with learn.validation_context(inner=True):
        learn._do_epoch_validate()
    return learn.recorder.log[-1]


def predicted(learn):
    return learn.get_preds(with_loss=True)[2].mean().item()


@pytest.mark.parametrize("evaluate", [validated, validated_inside, predicted])
@pytest.mark.parametrize("loss", [CrossEntropyLossFlat(), cross_entropy], ids=["flat", "plain"])
def test_evaluating_in_the_middle_of_an_epoch(tmp_path, evaluate, loss):
    if evaluate is predicted and loss is cross_entropy:
        loss = nn.CrossEntropyLoss()  # get_preds asks the loss for single values
    runs, midway = [], Midway(evaluate)
    for cbs in ([], [midway]):
        learn = learner(tmp_path, mosaic(), loss_func=loss)
        learn.fit(2, cbs=cbs)
        runs.append(learn.mosaic.run)
    assert_same(runs[1], runs[0], 0)
    assert len(midway.seen) == 2
    assert midway.seen == pytest.approx(midway.expected, rel=1e-6)


def test_the_callback_may_be_removed_for_a_moment(tmp_path):
    runs = []
    for fetch in (False, True):
        callback = mosaic()
        learn = learner(tmp_path, callback, dls=typed_dataloaders())
        learn.fit(2, cbs=FetchPredsCallback(cbs=callback) if fetch else None)
        assert callback.run.in_evaluation
        runs.append(callback.run)
    assert_same(runs[1], runs[0], 0)


def test_recomputed_batchnorm(tmp_path):
    algorithms = [MixUp(), EMA("4ba", recompute_batchnorm=3)]
    learn = learner(tmp_path, mosaic(algorithms), opt_func=SGD, loss_func=cross_entropy)
    learn.fit(2)
    assert_same(learn.mosaic.run, by_hand(algorithms, SGD))


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_a_second_fit_goes_on_from_the_training_weights(tmp_path, late):
    callback = mosaic([EMA("2ba"), MixUp()])
    learn = learner(tmp_path, None if late else callback, opt_func=SGD, loss_func=cross_entropy)
    for _ in range(2):
        learn.fit(1, cbs=callback if late else None)
    assert_same(callback.run, by_hand([EMA("2ba"), MixUp()], SGD))


# Files.


@pytest.mark.parametrize("make", [Adam, wrapped()], ids=["Adam", "wrapped"])
def test_save_and_load_go_on_to_the_last_bit(tmp_path, make):
    whole = learner(tmp_path, mosaic([*recipe(), SAM()]), opt_func=make)
    whole.fit(1)
    whole.save("middle")
    averaged = state(whole.model)
    whole.fit(1)

    parts = learner(tmp_path, mosaic([*recipe(), SAM()]), opt_func=make)
    assert parts.load("middle") is parts
    assert difference(state(parts.model), averaged) == 0
    parts.save("again")  # before it goes on
    parts.load("again")
    parts.fit(1)
    assert parts.mosaic.run.progress.step == 20
    assert_same(parts.mosaic.run, whole.mosaic.run, 0)


def test_a_file_without_the_optimizer_begins_a_new_run(tmp_path):
    first = learner(tmp_path, mosaic())
    first.fit(1)
    first.save("weights", with_opt=False)
    assert set(torch.load(tmp_path / "models/weights.pth")) >= set(state(first.model))
    second = learner(tmp_path, mosaic())
    second.load("weights", with_opt=False)
    assert difference(state(second.model), state(first.model)) == 0
    second.fit(1)
    assert second.mosaic.run.progress.step == 10


def test_weights_of_a_file_win_over_the_ones_of_the_last_fit(tmp_path):
    learn = learner(tmp_path, mosaic([EMA("2ba")]))
    learn.save("begin", with_opt=False)
    learn.fit(1)
    expected = both(learn.mosaic.run)
    learn.load("begin", with_opt=False)
    learn.create_opt()
    learn.fit(1)
    assert difference(both(learn.mosaic.run)[0], expected[0]) == 0


def test_a_bare_learner_loads_the_averaged_weights(tmp_path):
    learn = learner(tmp_path, mosaic([EMA("2ba"), MixUp()]), opt_func=Adam)
    learn.fit(1)
    learn.save("averaged")
    bare = learner(tmp_path, opt_func=Adam)
    bare.load("averaged")
    assert difference(state(bare.model), state(learn.model)) == 0
    bare.fit(1)


def test_weights_of_a_changed_model_say_so(tmp_path):
    learn = learner(tmp_path, mosaic())
    learn.fit(1)
    learn.save("changed")
    with pytest.raises(RuntimeError, match=r"changed by BlurPool.*cbs=MosaicCallback\(recipe\)"):
        learner(tmp_path).load("changed")
    assert "state_dict" not in vars(learn.model)
    assert "state_dict" not in vars(learn.opt)


def test_the_best_model_of_savemodelcallback(tmp_path, capsys):
    learn = learner(tmp_path, mosaic())
    seen = []

    class Watch(Callback):
        order = 65

        def after_epoch(self):
            seen.append(state(self.model))

    learn.fit(2, cbs=[SaveModelCallback(with_opt=True), Watch()])
    values = [value[1] for value in learn.recorder.values]
    best = seen[values.index(min(values))]
    assert difference(state(learn.model), best) == 0
    learn.fit(1)
    step = learn.mosaic.run.progress.step
    assert step == 10 * (values.index(min(values)) + 2)  # it went on from the best


def test_a_run_goes_on_only_with_its_own_recipe(tmp_path):
    first = learner(tmp_path, mosaic())
    first.fit(1)
    first.save("first")
    other = learner(tmp_path, mosaic([BlurPool(), MixUp(0.3)]))
    other.load("first")
    with pytest.raises(RuntimeError, match="must go on with the recipe and seed it began with"):
        other.fit(1)


def test_a_file_saved_without_mosaic_can_be_gone_on_from(tmp_path):
    first = learner(tmp_path)
    first.fit(1)
    first.save("bare")
    learn = learner(tmp_path, mosaic())
    learn.load("bare")
    learn.fit(2, start_epoch=1)
    progress = learn.mosaic.run.progress
    assert (progress.step, progress.epoch, progress.total_steps) == (20, 2, 20)


def test_loading_in_the_middle_of_a_fit(tmp_path):
    class Back(Callback):
        order = 70

        def after_epoch(self):
            if self.epoch == 1:
                self.learn.load("first")

    first = learner(tmp_path, mosaic(), opt_func=Adam)
    first.fit(1)
    first.save("first")
    ours = learner(tmp_path, [mosaic(), Back()], opt_func=Adam)
    ours.fit(3)
    expected = learner(tmp_path, mosaic(), opt_func=Adam)
    expected.load("first")
    expected.fit(3, start_epoch=2)
    assert_same(ours.mosaic.run, expected.mosaic.run, 0)
    assert ours.mosaic.run.progress == expected.mosaic.run.progress


@pytest.mark.parametrize("module", [cloudpickle, pickle])
@pytest.mark.filterwarnings("ignore:.*insecure pickle module.*")
def test_export_and_load_learner(tmp_path, module):
    learn = learner(tmp_path, mosaic([*recipe(), SAM()]), dls=typed_dataloaders())
    learn.fit(1)
    expected = learn.get_preds()[0]
    learn.export("export.pkl", pickle_module=module)
    loaded = load_learner(tmp_path / "export.pkl")
    assert loaded.mosaic.run is None
    assert loaded.mosaic.recipe == learn.mosaic.recipe
    images = typed_dataloaders()[1]
    assert torch.equal(loaded.get_preds(dl=images)[0], expected)
    loaded.dls = typed_dataloaders()
    loaded.save("again")
    loaded.fit(1)
    assert loaded.mosaic.run.progress.step == 3
    loaded.remove_cb(loaded.mosaic)
    assert not (SHADOWED | {"mosaic"}) & vars(loaded).keys()
    learn.fit(1)  # the exported one goes on, too
    assert learn.mosaic.run.progress.step == 6


# What is refused.


def refused(path, match, *, cbs=None, fit=None, **options):
    learn = learner(path, mosaic() if cbs is None else cbs, **options)
    model, loss = learn.model, learn.loss_func
    before = state(model)
    with pytest.raises((RuntimeError, ValueError), match=match):
        learn.fit(1, cbs=fit)
    assert difference(state(model), before) == 0
    assert learn.loss_func is loss
    return learn


@pytest.mark.parametrize("own", [FastaiMixUp, CutMix])
def test_fastais_mixing_is_refused(tmp_path, own):
    refused(tmp_path, f"MixUp can't be combined with fastai's callback {own.__name__}", fit=own())
    match = rf"LabelSmoothing changes labels.*{own.__name__} replaces the loss"
    refused(tmp_path, match, cbs=mosaic([LabelSmoothing()]), fit=own())
    learn = learner(tmp_path, mosaic([EMA("2ba")]))
    learn.fit(1, cbs=FastaiMixUp())  # where we leave labels alone
    assert learn.mosaic.run.progress.step == 10


def test_two_callbacks_are_refused(tmp_path):
    match = "takes one MosaicCallback.*one recipe"
    refused(tmp_path, match, cbs=[mosaic([MixUp()]), mosaic([EMA()])])
    learn = refused(tmp_path, match, cbs=mosaic([MixUp()]), fit=mosaic([EMA()]))
    assert len(learn._grab_cbs(MosaicCallback)) == 1


@pytest.mark.parametrize("loss", [LabelSmoothingCrossEntropyFlat(), LabelSmoothingCrossEntropy()])
def test_smoothing_twice_is_refused(tmp_path, loss):
    match = rf"LabelSmoothing can't be combined with the loss {type(loss).__name__}"
    refused(tmp_path, match, loss_func=loss)


@pytest.mark.parametrize("loss", [FocalLossFlat(), FocalLoss()])
def test_smoothing_of_the_focal_loss_is_refused(tmp_path, loss):
    refused(tmp_path, rf"{type(loss).__name__}, which is no cross entropy", loss_func=loss)


def test_copies_of_the_weights_are_refused(tmp_path):
    class Own(NonNativeMixedPrecision):  # fastai's asks for CUDA
        def before_fit(self):
            pass

        before_batch = after_pred = before_backward = before_step = after_fit = before_fit

    refused(tmp_path, r"Own trains copies of the weights.*to_fp16\(\)", fit=Own())


def test_dataparallel_is_refused(tmp_path):
    refused(
        tmp_path,
        r"inside DataParallel is not supported.*to_distributed\(\)",
        fit=ParallelTrainer(None),
    )


class Decay(Algorithm):
    """Changes the optimizer."""

    place = Place.SURGERY
    settings = {}  # noqa: RUF012  # a test's stand-in for a dataclass without fields

    def prepare_optimizer(self, optimizer, run):
        optimizer.param_groups[0]["weight_decay"] = 0.1


def test_changing_the_optimizer(tmp_path):
    assert Decay.needs() == {Need.OPTIMIZER}
    match = "Decay changes the optimizer.*OptimWrapper"
    refused(tmp_path, match, cbs=mosaic([Decay()]), opt_func=Adam)
    learn = learner(tmp_path, mosaic([Decay()]))
    learn.fit(1)
    expected = learner(tmp_path)
    expected.fit(1, wd=0.1)
    assert difference(state(learn.model), state(expected.model)) == 0


def test_two_targets_are_refused(tmp_path):
    data = [(x, y, y) for x, y in batches()]

    def loss(pred, first, second):
        return F.cross_entropy(pred, first) + F.cross_entropy(pred, second)

    loaders = lists(data)
    loaders.n_inp = 1
    match = "needs one target that the loss compares, and the batch has 2"
    refused(tmp_path, match, dls=loaders, loss_func=loss)
    learn = learner(tmp_path, mosaic([SAM(), EMA("2ba")]), dls=loaders, loss_func=loss)
    learn.fit(1)
    assert learn.mosaic.run.progress.step == 10


# What is left behind.


class Raise(Callback):
    """Raises in an event of the second epoch."""

    order = 70

    def __init__(self, where, error):
        self.where, self.error = where, error

    def __call__(self, event_name):
        super().__call__(event_name)
        if event_name == self.where and self.epoch == 1:
            raise self.error


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize(
    "where",
    ["before_train", "after_loss", "before_step", "after_batch", "after_validate", "after_epoch"],
)
def test_nothing_remains_of_a_fit_that_raised(tmp_path, where, late):
    callback = mosaic([*recipe(), SAM()])
    learn = learner(tmp_path, None if late else callback, loss_func=cross_entropy)
    raw = []

    class Watch(Callback):
        order = 65

        def after_step(self):
            raw.append(dict(state(self.model)))

    cbs = [*([callback] if late else []), Watch(), Raise(where, KeyboardInterrupt())]
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2, cbs=cbs)
    live = state(learn.model)
    names = dict(learn.model.named_parameters())
    assert difference({n: live[n] for n in names}, {n: raw[-1][n] for n in names}) == 0
    assert learn.loss_func is cross_entropy
    assert SHADOWED & vars(learn).keys() == (set() if late else SHADOWED)
    if late:
        learn.add_cb(callback)
    learn.fit(1)  # it goes on
    assert callback.run.in_evaluation
    learn.remove_cb(callback)
    assert not (SHADOWED | {"mosaic"}) & vars(learn).keys()


def test_a_fit_that_is_cancelled_ends_with_the_averaged_weights(tmp_path):
    class Stop(Callback):
        def after_batch(self):
            if self.training and self.epoch == 1:
                raise CancelFitException

    loss = CrossEntropyLossFlat()
    learn = learner(tmp_path, mosaic(), loss_func=loss)
    learn.fit(2, cbs=Stop())
    assert learn.mosaic.run.in_evaluation
    assert learn.loss_func is loss
    assert learn.mosaic.run.progress.step == 11


def test_attributes_of_the_model_do_not_matter(tmp_path):
    model = network()
    model.recipe, model.seed, model._window, model._active = "mine", "mine", "mine", True
    learn = learner(tmp_path, mosaic(), model=model)
    learn.fit(1)
    assert learn.mosaic.run.progress.step == 10
    assert (model.recipe, model.seed, model._window, model._active) == (*["mine"] * 3, True)


def test_switching_it_off(tmp_path):
    learn = learner(tmp_path, mosaic())
    with pytest.raises(TypeError, match=r"run must be the run.*got False.*removed_cbs"):
        learn.mosaic.run = False
    callback = learn.mosaic
    with learn.removed_cbs(callback):
        learn.fit(1)
    assert not callback.run.started
    learn.fit(1)
    assert callback.run.progress.step == 10


def test_a_copy_of_a_learner_trains_itself(tmp_path):
    learn = learner(tmp_path, mosaic())
    learn.fit(1)
    before, again = state(learn.model), copy.deepcopy(learn)
    again.fit(1)
    assert difference(state(learn.model), before) == 0
    assert again.mosaic.run.model is again.model
    learn.fit(1)
    assert learn.mosaic.run.progress.step == 20


def test_a_file_saved_in_the_middle_of_an_epoch_holds_the_averaged_weights(tmp_path):
    class InTheMiddle(Callback):
        def after_batch(self):
            if self.training and self.train_iter == 7:
                raw.append(state(self.model))
                self.learn.save("middle")
                assert difference(state(self.model), raw[0]) == 0

    raw = []
    learn = learner(tmp_path, mosaic([EMA("2ba")]))
    learn.fit(1, cbs=InTheMiddle())
    saved = torch.load(tmp_path / "models/middle.pth")
    weights = saved["opt"]["mosaic"]["training_weights"]
    assert difference(weights, {name: raw[0][name] for name in weights}) == 0
    assert not torch.equal(saved["model"]["conv1.weight"], weights["conv1.weight"])


def test_weights_put_into_the_model_begin_a_new_run(tmp_path):
    learn = learner(tmp_path, mosaic([EMA("2ba")]))
    learn.fit(1)
    learn.model.load_state_dict(network().state_dict())
    learn.fit(1)
    progress = learn.mosaic.run.progress
    assert (progress.step, progress.total_steps) == (10, 10)


class Bias(Algorithm):
    """Surgery that makes a bias in front of a norm, where it has no gradient."""

    place = Place.SURGERY
    settings = {}  # noqa: RUF012  # a test's stand-in for a dataclass without fields

    def prepare_model(self, model, run):
        if model.conv1.bias is None:
            model.conv1.bias = nn.Parameter(torch.ones(16))


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_new_biases_do_not_decay(tmp_path, late):
    callback = mosaic([Bias()])
    learn = learner(tmp_path, None if late else callback, opt_func=SGD)
    if late:
        learn.create_opt()
        learn.add_cb(callback)
    learn.fit(1, wd=0.5)
    assert learn.opt.state[learn.model.conv1.bias]["do_wd"] is False
    assert (learn.model.conv1.bias - 1).abs().max() < 1e-4


def test_batches_are_transformed_outside_autocast(tmp_path):
    class Probe(Algorithm):
        place = Place.AUGMENTATION
        settings = {}  # noqa: RUF012  # a test's stand-in for a dataclass without fields

        def on_batch(self, batch, run):
            seen.append(torch.is_autocast_enabled("cpu"))
            return batch

    class Watch(Callback):
        order = 20

        def before_batch(self):
            outside.append(torch.is_autocast_enabled("cpu"))

    seen, outside = [], []
    learn = learner(tmp_path, [mosaic([Probe()]), CPUMixedPrecision("bf16"), Watch()])
    learn.fit(1)
    assert seen == [False] * 10
    assert all(outside)


def test_removed_for_good_in_the_middle_of_an_epoch(tmp_path):
    class Remove(Callback):
        order = 20

        def after_batch(self):
            if self.training and self.train_iter == 5:
                self.learn.remove_cb(callback)

    loss, callback = CrossEntropyLossFlat(), mosaic()
    learn = learner(tmp_path, callback, loss_func=loss)
    learn.fit(1, cbs=Remove())
    assert learn.loss_func is loss
    assert callback.run.progress.step == 5
    assert not callback.run.in_evaluation


@pytest.mark.parametrize("loss", [CrossEntropyLossFlat(), nn.CrossEntropyLoss()], ids=type_of)
def test_examples_are_chosen_by_the_learners_own_loss(tmp_path, loss):
    """A Flat loss takes its label alone, others the label that carries the mixture."""
    algorithms = [SelectiveBackprop(0.0, 1.0, interrupt=3), MixUp(), EMA("2ba")]
    callback = mosaic(algorithms)
    learn = learner(tmp_path, callback, loss_func=loss, opt_func=SGD)
    learn.fit(2)
    assert_same(callback.run, by_hand(algorithms, SGD))


def test_windows_that_count_examples_are_refused_beside_selection(tmp_path):
    cbs = [mosaic([SelectiveBackprop()]), GradientAccumulation(16)]
    refused(
        tmp_path, "SelectiveBackprop drops examples, and fastai's GradientAccumulation", cbs=cbs
    )


def test_time_is_told_apart_by_phases():
    check_trainer(train)
