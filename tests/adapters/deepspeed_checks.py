"""What is particular to DeepSpeed, checked in processes of its own: ``deepspeed_checks.py ANSWER``.

DeepSpeed begins a process group that it never ends, so nothing of it runs inside pytest. Every
check here is a function; the process writes which of them failed, and how.
"""

import csv
import dataclasses
import itertools
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from deepspeed_common import DeepSpeedSession, Net, config, environment, gathered
from launched import main
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from mosaic_core import Algorithm, LossError, Place, Recipe, Run, UnsupportedError
from mosaic_core.agreement import distance
from mosaic_core.algorithms import (
    EMA,
    SAM,
    BlurPool,
    ChannelsLast,
    GradientClipping,
    LabelSmoothing,
    MixUp,
    StochasticDepth,
    WeightStandardization,
)
from mosaic_core.loop import train_steps
from mosaic_core.testing._jobs import Loss
from mosaic_core.testing._network import examples, network
from mosaic_core.testing.adapters import FULL

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))  # they lie in no package
from test_deepspeed_contract import TestDeepSpeed
from timed import check_trainer

RECIPE = (BlurPool(), MixUp(0.4), LabelSmoothing(), SAM(), EMA("4ba"))
PLAIN = tuple(a for a in RECIPE if not isinstance(a, BlurPool))  # changes no model
FLOAT = {}
BFLOAT = {"weights": "bf16"}
SUMS = {"weights": "bf16", "sums": "fp32"}
KINDS = (
    (0, FLOAT),
    (1, FLOAT),
    (2, FLOAT),
    (3, FLOAT),
    (0, BFLOAT),
    (1, SUMS),
    (2, SUMS),
    (3, SUMS),
)
ONE, TWO = {}, {}


def check(*checks):
    """Register a check for one process, for two, or for both."""

    def register(function):
        for where in checks or (ONE,):
            where[function.__name__] = function
        return function

    return register


def folder():
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return Path(tempfile.mkdtemp())
    found = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(found)
    return Path(found[0])


def model():
    return Net(network(), Loss())


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def engine_of(recipe=RECIPE, stage=0, net=None, settings=(), **kwargs):
    import mosaic_deepspeed

    net = model() if net is None else net
    options = {"optimizer": sgd, "config": config(stage, **dict(settings)), **kwargs}
    return mosaic_deepspeed.initialize(recipe, model=net, seed=3, total_steps=20, **options)[0]


def bare_engine(stage=0, net=None, settings=()):
    import deepspeed

    net = model() if net is None else net
    options = {"optimizer": sgd, "config": config(stage, **dict(settings))}
    return deepspeed.initialize(model=net, **options)[0]


def batches(first, count):
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return [examples(size * i + rank) for i in range(first, first + count)]


def train(engine, first, count):
    engine.train()
    dtype = next(engine.module.parameters()).dtype
    for x, y in engine.mosaic.loader(batches(first, count)):
        engine.backward(F.cross_entropy(engine(x.to(dtype)), y))
        engine.step()


def plain(recipe, first, count, net=None, **options):
    net = model() if net is None else net
    run = Run(recipe, model=net, seed=3)
    run.start([sgd(net.parameters())], total_steps=20)
    net.train()
    train_steps(run, batches(first, count), lambda m, b: F.cross_entropy(m(b[0]), b[1]), **options)
    return run


def same(engine, run):
    """Compare training and averaged weights with those of a plain run, to 1e-6."""
    ours, theirs = gathered(engine.module), dict(run.model.state_dict())
    assert distance(ours, theirs) <= 1e-6, distance(ours, theirs)
    with engine.mosaic.evaluation(), run.evaluation():
        ours, theirs = gathered(engine.module), dict(run.model.state_dict())
        assert distance(ours, theirs) <= 1e-6, distance(ours, theirs)


def exact(recipe, mode, contract=TestDeepSpeed, **options):
    """Compare with the plain loop as the contract does."""
    outcome = contract().compare(recipe, mode, folder(), **options)
    assert outcome.refused is None, outcome.refused
    assert max(outcome.weights, outcome.averaged) <= 1e-6, outcome
    assert outcome.effect > 1e-3, outcome


def mode(name):
    return TestDeepSpeed().mode(name)


@dataclasses.dataclass(frozen=True)
class Prune(Algorithm):
    """Drops every other element of each gradient and doubles the rest."""

    place = Place.GRADIENTS

    def on_gradients(self, run):
        view = run.parameters
        for f in view.fragments():
            grad = view.grad(f)
            assert grad.shape == f.master.shape
            assert grad.dtype == f.master.dtype == torch.float32
            kept = torch.arange(f.start, f.start + f.numel) % 2 * 2.0
            view.set_grad(f, grad * kept.view(grad.shape))


@dataclasses.dataclass(frozen=True)
class Widen(Algorithm):
    """Adds a parameter."""

    place = Place.SURGERY

    def prepare_model(self, model, run):
        model.net.head.gain = nn.Parameter(torch.full((5,), 0.5))
        model.net.head.register_forward_hook(lambda m, args, out: out * m.gain)


@dataclasses.dataclass(frozen=True)
class Regroup(Algorithm):
    """Acts on the optimizer."""

    place = Place.SURGERY

    def prepare_optimizer(self, optimizer, run):
        pass


# Batches.


@check(ONE, TWO)
def training_data_is_loaded_and_transformed():
    """In the order of DeepSpeed's own sampler; an end of the loader is the end of an epoch."""
    import mosaic_deepspeed

    data = [(x, y) for i in range(8) for x, y in zip(*examples(i), strict=True)]
    engine, optimizer, loader, scheduler = mosaic_deepspeed.initialize(
        [MixUp(0.4), EMA("1ep")],
        model=(net := model()),
        seed=3,
        config=config(1),
        optimizer=sgd,
        lr_scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        training_data=data,
    )
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    assert optimizer is engine.optimizer
    assert scheduler is engine.lr_scheduler
    assert len(loader) == 8 // size
    assert loader.batch_size == 8  # an attribute of DeepSpeed's loader
    assert engine.mosaic.run.progress.steps_per_epoch == 8 // size
    for _ in range(2):
        for x, y in loader:
            engine.backward(F.cross_entropy(engine(x), y))
            engine.step()
    assert engine.mosaic.run.progress.epoch == 2
    if size == 1:
        order = list(DistributedSampler(data, num_replicas=size, rank=rank))
        chosen = [[data[i] for i in order[8 * j : 8 * j + 8]] for j in range(8)]
        stacked = [tuple(map(torch.stack, zip(*items, strict=True))) for items in chosen]
        run = Run([MixUp(0.4), EMA("1ep")], model=(other := model()), seed=3)
        optimizer = sgd(other.parameters())
        run.start([optimizer], steps_per_epoch=8)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for _ in range(2):
            loss = lambda m, b: F.cross_entropy(m(b[0]), b[1])  # noqa: E731
            train_steps(run, stacked, loss, scheduler=schedule)
            run.end_epoch()
        same(engine, run)
    assert net is engine.module


@check()
def batch_by_hand_equals_the_loader():
    engine = engine_of(PLAIN[:2], 2)
    for x, y in batches(0, 4):
        x, y = engine.mosaic.batch(x, y)
        engine.backward(F.cross_entropy(engine(x), y))
        engine.step()
    same(engine, plain(PLAIN[:2], 0, 4))


@check()
def a_batch_the_recipe_has_not_seen_is_an_error():
    engine = engine_of([MixUp()])
    x, y = examples(0)
    with pytest.raises(UnsupportedError, match=r"engine\.backward: the recipe has not seen this"):
        engine.backward(F.cross_entropy(engine(x), y))
    x, y = engine.mosaic.batch((x, y))
    engine.backward(F.cross_entropy(engine(x), y))
    engine.step()
    with pytest.raises(UnsupportedError, match=r"iterate over the loader"):
        engine.backward(F.cross_entropy(engine(x), y))
    engine = engine_of([EMA("4ba")])  # reads no batch
    x, y = examples(0)
    engine.backward(F.cross_entropy(engine(x), y))
    engine.step()


@check()
def a_skipped_batch_is_forgotten():
    engine, seen = engine_of(PLAIN, 1), 0
    for x, y in engine.mosaic.loader(batches(0, 5)):
        seen += 1
        if seen == 3:  # the second batch, as every batch comes twice
            continue
        engine.backward(F.cross_entropy(engine(x), y))
        engine.step()
    assert (engine.global_steps, seen) == (4, 9)


@check()
def a_loss_that_ignores_the_mixture_raises():
    for stage, direct in ((2, False), (2, True)):  # ZeRO lets loss.backward() pass
        engine = engine_of([MixUp()], stage)
        (x, y), *_ = engine.mosaic.loader(batches(0, 1))
        loss = -(F.one_hot(y, 5) * engine(x).log_softmax(1)).sum(1).mean()
        before = gathered(engine.module)
        if direct:
            loss.backward()
        with pytest.raises(LossError):
            engine.step() if direct else engine.backward(loss)
        names = [name for name, _ in engine.module.named_parameters()]
        after = gathered(engine.module)
        assert distance({n: after[n] for n in names}, {n: before[n] for n in names}) == 0


# Two passes.


class ByClosure(DeepSpeedSession):
    """A loop without the loader."""

    def _fit(self, batches):
        job, engine, size = self.job, self.engine, self.job.mode.accumulate
        for _ in range(job.epochs):
            engine.train()
            for i in range(0, len(job.batches), size):
                window = []
                for j, batch in enumerate(job.batches[i : i + size]):
                    window.append(engine.mosaic.batch(batch))
                    engine.backward(job.loss(engine(window[-1][0]), window[-1][1]))
                    if j < size - 1:
                        engine.step()

                def again(window=window):
                    for x, y in window:
                        engine.backward(job.loss(engine(x), y))
                        engine.step()

                engine.mosaic.step(again)
            engine.mosaic.end_epoch()


class Closures(TestDeepSpeed):
    def session(self, job):
        return ByClosure(job)


@check()
def a_closure_may_run_the_window_again():
    for stage in (0, 1, 2, 3):
        exact(FULL, mode(f"ZeRO-{stage}, accumulation"), Closures)


@check()
def a_closure_must_run_the_whole_window():
    engine = engine_of([SAM()], 2, settings={"accumulate": 3})
    x, y = examples(0)

    def backward():
        engine.backward(F.cross_entropy(engine(x), y))
        engine.step()

    backward()
    backward()
    engine.backward(F.cross_entropy(engine(x), y))
    with pytest.raises(RuntimeError, match=r"must run every micro-batch of the window.* got 1 be"):
        engine.mosaic.step(backward)


@check()
def two_passes_without_loader_or_closure_are_refused():
    engine = engine_of([SAM()])
    x, y = examples(0)
    engine.backward(F.cross_entropy(engine(x), y))
    with pytest.raises(UnsupportedError, match=r"engine\.step: SAM runs each window .* twice"):
        engine.step()


@check()
def everything_counts_one_pass():
    import mosaic_deepspeed

    settings = config(2, accumulate=2)
    engine, _, _, scheduler = mosaic_deepspeed.initialize(
        [SAM()],
        model=model(),
        config=settings,
        optimizer=sgd,
        lr_scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    )
    loader = engine.mosaic.loader(batches(0, 7))
    applied, counts = [], []
    for x, y in loader:
        engine.backward(F.cross_entropy(engine(x), y))
        engine.step()
        applied.append(engine.was_step_applied())
        counts.append(engine.micro_steps)
    assert len(loader) == 7
    assert applied == [False, False, False, True] * 3 + [False]
    assert counts == [1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7]
    assert (engine.global_steps, engine.global_samples, scheduler.last_epoch) == (3, 48, 3)
    assert engine.module.net.norm1.num_batches_tracked == 7
    assert engine.mosaic.run.progress.step == 3
    engine, applied = engine_of([SAM()], 2), []
    for x, y in engine.mosaic.loader(batches(0, 3)):
        engine.backward(F.cross_entropy(engine(x), y))
        engine.step()
        applied.append(engine.was_step_applied())
    assert applied == [False, True] * 3


@check()
def an_interval_makes_the_other_steps_plain():
    exact([SAM(interval=2)], mode("ZeRO-2"))


@check()
def the_weights_are_not_read_between_two_passes():
    engine = engine_of([SAM(), EMA("4ba")], 3)
    before = gathered(engine.module)
    moved = {}

    def loop():
        for x, y in engine.mosaic.loader(batches(0, 2)):
            if moved:
                for what in (
                    lambda: engine.mosaic.evaluation(),
                    lambda: engine.save_checkpoint(folder()),
                    lambda: engine.load_checkpoint(folder()),
                    lambda: engine.save_16bit_model(folder()),
                    lambda: engine.mosaic.batch(examples(0)),
                ):
                    with pytest.raises(UnsupportedError, match=r"moved between the two passes"):
                        what()
                raise KeyboardInterrupt
            engine.backward(F.cross_entropy(engine(x), y))
            engine.step()
            moved.update(gathered(engine.module))

    with pytest.raises(KeyboardInterrupt), engine.mosaic:
        loop()
    after = gathered(engine.module)
    names = [name for name, _ in engine.module.named_parameters()]
    assert distance({n: moved[n] for n in names}, {n: before[n] for n in names}) > 1e-4
    assert all(torch.equal(after[n], before[n]) for n in names)


# Gradients and sharding.


@check()
def gradients_are_changed_before_clipping():
    for stage in (0, 1, 2, 3):
        exact([Prune()], mode(f"ZeRO-{stage}, accumulation"), clip_norm=0.1)
    exact([Prune(), SAM(), EMA("4ba")], mode("ZeRO-3"), clip_norm=0.1)


@check()
def norms_of_channels_last_weights_are_those_of_flat_ones():
    """ZeRO flattens them, and an ulp of a norm grows to 1.8e-6 of the weights in 20 steps."""
    for algorithm in (
        SAM(),
        SAM(1.0, adaptive=True),
        GradientClipping("norm", 0.3),
        GradientClipping.example(),
        WeightStandardization(),
        StochasticDepth.example(),
    ):
        for name in ("ZeRO-2", "ZeRO-2, accumulation of 2"):
            exact((ChannelsLast(), algorithm), mode(name))


@check()
def gradients_are_changed_with_bfloat16_weights():
    for stage in (0, 1, 2, 3):
        exact([Prune()], mode(f"ZeRO-{stage}, bf16"))


@check()
def bfloat16_weights_with_other_sums_of_gradients():
    for stage, sums in ((1, "bf16"), (2, "fp32"), (3, "fp32")):
        one = mode(f"ZeRO-{stage}, bf16")
        exact([Prune(), *RECIPE], dataclasses.replace(one, options={**one.options, "sums": sums}))


@check()
def parameters_that_divide_into_nothing():
    def odd():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.ReLU(), nn.Linear(7, 5))

    recipe = [Prune(), MixUp(0.4), SAM(), EMA("4ba")]
    for stage in (1, 2):
        engine = engine_of(recipe, stage, odd(), settings={"zero": {"parameter_alignment": True}})
        train(engine, 0, 4)
        same(engine, plain(recipe, 0, 4, odd()))


class OnceOfTwice(nn.Module):
    """Uses its second layer in every other forward, which is the first of two passes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(192, 5), nn.Linear(192, 5)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        out = self.first(x.flatten(1))
        return out + self.second(x.flatten(1)) if self.calls % 2 else out


@check()
def a_parameter_that_the_second_pass_does_not_use_has_no_gradient():
    found = []
    for stage in (1, 2, 3):
        net = OnceOfTwice()
        train(engine_of([SAM()], stage, net), 0, 3)
        found.append(gathered(net))
    first = OnceOfTwice().state_dict()
    assert all(torch.equal(weights["second.weight"], first["second.weight"]) for weights in found)
    assert all(distance(weights, found[0]) <= 1e-6 for weights in found)


@check(TWO)
def gradients_are_changed_on_two_ranks():
    for stage in (0, 1, 2, 3):
        exact([Prune()], mode(f"ZeRO-{stage}, two processes"), clip_norm=0.1)


@check(TWO)
def changed_gradients_reach_all_ranks_before_clipping():
    """BF16_Optimizer takes the norm of whole gradients, of which a rank changes its own part."""
    engine = engine_of([Prune()], 1, settings={**SUMS, "clip_norm": 0.1})
    (x, y), *_ = engine.mosaic.loader(batches(0, 1))
    engine.backward(F.cross_entropy(engine(x.bfloat16()), y))
    whole, seen = engine.optimizer.fp32_groups_gradients_flat[0], []
    expected = whole * (torch.arange(len(whole)) % 2 * 2)
    offset = 0
    for p in engine.optimizer.bf16_groups[0]:  # odd and even start anew in every parameter
        own = slice(offset, offset + p.numel())
        expected[own] = whole[own] * (torch.arange(p.numel()) % 2 * 2)
        offset += p.numel()
    step = engine.optimizer.step
    engine.optimizer.step = lambda: (seen.append(whole.clone()), step())
    engine.step()
    assert torch.equal(seen[0][:offset], expected[:offset])


@check()
def other_layouts_are_exact():
    layouts = {
        1: [{"round_robin_gradients": True}, {"contiguous_gradients": False}],
        2: [
            {"round_robin_gradients": True, "overlap_comm": True},
            {"contiguous_gradients": False, "reduce_bucket_size": 500},
        ],
        3: [
            {"sub_group_size": 600, "stage3_param_persistence_threshold": 0},
            {"contiguous_gradients": False, "stage3_param_persistence_threshold": 10**6},
        ],
    }
    for stage, options in layouts.items():
        for zero in options:
            one = mode(f"ZeRO-{stage}")
            other = dataclasses.replace(one, options={**one.options, "zero": zero})
            exact([Prune(), *RECIPE], other)


@check(TWO)
def other_layouts_are_exact_on_two_ranks():
    for stage, zero in (
        (2, {"round_robin_gradients": True}),
        (1, {"parameter_alignment": True}),
        (3, {"sub_group_size": 600, "stage3_param_persistence_threshold": 0}),
    ):
        one = mode(f"ZeRO-{stage}, two processes")
        other = dataclasses.replace(one, options={**one.options, "zero": zero})
        exact([Prune(), *RECIPE], other, clip_norm=0.5)


@check()
def parameters_of_several_groups_and_frozen_ones():
    for stage in (0, 1, 2, 3):

        def groups(net):
            net.net.head.bias.requires_grad_(False)
            decayed = [p for p in net.parameters() if p.dim() > 1]
            rest = [p for p in net.parameters() if p.dim() == 1 and p.requires_grad]
            return torch.optim.SGD(
                [{"params": rest}, {"params": decayed, "weight_decay": 0.1}], lr=0.05, momentum=0.9
            )

        net = model()
        engine = engine_of(RECIPE, stage, net, optimizer=groups(net))
        train(engine, 0, 4)
        run = Run(RECIPE, model=(other := model()), seed=3)
        run.start([groups(other)], total_steps=20)
        train_steps(run, batches(0, 4), lambda m, b: F.cross_entropy(m(b[0]), b[1]))
        same(engine, run)


@check()
def steps_that_the_loss_scaler_skips_are_not_averaged():
    for stage in (1, 2, 3):
        scaler = {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 24}}
        settings = {"weights": "fp16", **scaler}
        engine = engine_of([EMA("4ba")], stage, settings=settings)
        expected, applied = None, []
        for x, y in batches(0, 16):
            engine.backward(F.cross_entropy(engine(x.half()), y))
            engine.step()
            applied.append(engine.was_step_applied())
            if applied[-1]:
                masters = masters_of(engine)
                expected = expected or masters
                torch._foreach_lerp_(expected, masters, 1 - 2 ** (-1 / 4))
        assert 3 < sum(applied) < 16, applied
        assert engine.mosaic.run.progress.step == 16
        for ours, wanted in zip(averages_of(engine), expected, strict=True):
            assert (ours - wanted).norm() <= 1e-6 * wanted.norm()


@check()
def a_skipped_step_leaves_the_weights():
    engine = engine_of([SAM(), EMA("4ba")], 0, settings=BFLOAT)
    train(engine, 0, 2)
    before, masters = gathered(engine.module), masters_of(engine)
    averages = averages_of(engine)
    for i, (x, y) in enumerate(engine.mosaic.loader(batches(2, 1))):
        loss = F.cross_entropy(engine(x.bfloat16()), y)
        engine.backward(loss * float("inf") if i == 1 else loss)
        engine.step()
    assert not engine.was_step_applied()
    assert engine.mosaic.run.progress.step == 3
    after = gathered(engine.module)
    assert all(torch.equal(after[n], before[n]) for n, _ in engine.module.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(masters_of(engine), masters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(averages_of(engine), averages, strict=True))


def masters_of(engine):
    return [f.master.clone() for f in engine.mosaic.run.parameters.fragments()]


def averages_of(engine):
    with engine.mosaic.evaluation():
        return masters_of(engine)


# Evaluation and the engine's life.


@check(ONE, TWO)
def evaluation_computes_with_averaged_weights():
    for stage, settings in ((3, FLOAT), (2, FLOAT), (3, BFLOAT), (1, SUMS)):
        engine = engine_of(RECIPE, stage, settings=settings)
        train(engine, 0, 4)
        engine.eval()
        x, _ = examples(99)
        x = x.to(next(engine.module.parameters()).dtype)
        raw = gathered(engine.module)
        with torch.no_grad(), engine.mosaic.evaluation():
            ours, averaged = engine(x), gathered(engine.module)
        other = Run([BlurPool()], model=model()).model.to(x.dtype).eval()
        other.load_state_dict(averaged)
        with torch.no_grad():
            assert torch.equal(ours, other(x))
        assert distance(raw, averaged) > 1e-4
        back = gathered(engine.module)
        assert all(torch.equal(back[n], raw[n]) for n in raw)


@check()
def batch_norm_can_be_recomputed():
    for stage in (0, 3):
        engine = engine_of([EMA("4ba", recompute_batchnorm=2)], stage)
        train(engine, 0, 4)
        same(engine, plain([EMA("4ba", recompute_batchnorm=2)], 0, 4))
    engine = engine_of([EMA("4ba", recompute_batchnorm=2)], 2, settings=BFLOAT)
    train(engine, 0, 4)
    with engine.mosaic.evaluation():
        assert engine.module.net.norm1.running_mean.abs().sum() > 0


@check()
def a_recipe_can_be_attached():
    import mosaic_deepspeed

    for stage in (0, 2, 3):
        engine = bare_engine(stage)
        handle = mosaic_deepspeed.attach(engine, PLAIN, seed=3, total_steps=20)
        assert handle is engine.mosaic
        train(engine, 0, 4)
        run = plain(PLAIN, 0, 4)
        same(engine, run)
        handle.detach()
        with run.evaluation():
            assert distance(gathered(engine.module), run.model.state_dict()) <= 1e-6
        assert "mosaic" not in vars(engine)
        mosaic_deepspeed.attach(engine, run=handle.run, total_steps=20)  # goes on from its own
        same(engine, run)
    with pytest.raises(UnsupportedError, match=r"mosaic_deepspeed\.attach: the engine has a rec"):
        mosaic_deepspeed.attach(engine, [])
    with pytest.raises(UnsupportedError, match=r"BlurPool changes the model.*use mosaic_deepspe"):
        mosaic_deepspeed.attach(bare_engine(), RECIPE)


@check()
def a_loop_may_set_the_boundary_and_replay_by_itself():
    """As accelerate does, which calls engine.step only at the end of a window."""
    import mosaic_deepspeed

    for stage in (0, 1, 2, 3):
        net, window = model(), []
        run = Run(RECIPE, model=net, seed=3)
        engine = bare_engine(stage, net, {"accumulate": 2})

        def forward_backward(batch, last, engine=engine):
            engine.set_gradient_accumulation_boundary(last)
            loss = F.cross_entropy(engine(batch[0]), batch[1])
            engine.backward(loss / 2, scale_wrt_gas=False)

        def replay(window=window, forward_backward=forward_backward):
            for i, batch in enumerate(window):
                forward_backward(batch, i == 1)

        mosaic_deepspeed.attach(engine, run=run, total_steps=20, replay=replay)
        for i, batch in enumerate(batches(0, 6)):
            window.append(engine.mosaic.batch(batch))
            forward_backward(window[-1], i % 2 == 1)
            if i % 2 == 1:
                engine.step()
                window.clear()
        assert (engine.global_steps, engine.micro_steps) == (3, 3)
        same(engine, plain(RECIPE, 0, 6, accumulate=2))


@check()
def a_repeating_loader_repeats():
    from deepspeed.runtime.dataloader import RepeatingLoader

    engine = engine_of(PLAIN, 1)
    loader = RepeatingLoader(engine.mosaic.loader(batches(0, 3)))
    while engine.global_steps < 6:
        x, y = next(loader)
        engine.backward(F.cross_entropy(engine(x), y))
        engine.step()
    run = Run(PLAIN, model=model(), seed=3)
    run.start([sgd(run.model.parameters())], total_steps=20)
    for _ in range(2):
        train_steps(run, batches(0, 3), lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    same(engine, run)
    assert engine.mosaic.run.progress.epoch == 1  # the second ends when a batch more is asked for


@check()
def metrics_reach_the_monitor():
    where = folder()
    monitor = {"enabled": True, "output_path": str(where), "job_name": "job"}
    engine = engine_of([SAM()], 1, settings={"csv_monitor": monitor})
    train(engine, 0, 3)
    (file,) = where.rglob("*SAM*grad_norm*.csv")
    rows = list(csv.reader(file.open()))[1:]
    assert [int(row[0]) for row in rows] == [8, 16, 24]
    assert float(rows[-1][1]) == pytest.approx(
        float(engine.mosaic.run.metrics["mosaic/SAM/grad_norm"])
    )


@check()
def surgery_may_add_parameters():
    recipe = [Widen(), EMA("4ba")]
    engine = engine_of(recipe, 2)
    train(engine, 0, 4)
    assert not torch.equal(engine.module.net.head.gain, torch.full((5,), 0.5))
    same(engine, plain(recipe, 0, 4))
    for held in ({"optimizer": sgd}, {"optimizer": None}):
        net = model()
        kwargs = {"optimizer": sgd(net.parameters())}
        if held["optimizer"]:
            kwargs = {"optimizer": sgd, "model_parameters": list(net.parameters())}
        with pytest.raises(UnsupportedError, match=r"(optimizer|model_parameters) holds those of"):
            engine_of(recipe, 2, net, **kwargs)


# Checkpoints.


@check(ONE, TWO)
def a_run_goes_on_to_the_last_bit():
    import deepspeed

    for stage, settings in KINDS:
        where = folder()
        whole = engine_of(RECIPE, stage, settings=settings)
        train(whole, 0, 3)
        whole.save_checkpoint(where, client_state={"mine": 7})
        averaged = averages_of(whole)
        train(whole, 3, 3)
        ours = torch.load(
            where / f"global_step3/mosaic_rank_{torch.distributed.get_rank():05d}.pt",
            weights_only=True,
        )
        assert ours["run"]["progress"]["step"] == 3
        resumed = engine_of(RECIPE, stage, settings=settings)
        path, state = resumed.load_checkpoint(where)
        assert path is not None
        assert state["mine"] == 7
        assert resumed.mosaic.run.progress.step == 3
        train(resumed, 3, 3)
        for a, b in (
            (gathered(resumed.module), gathered(whole.module)),
            (dict(enumerate(masters_of(resumed))), dict(enumerate(masters_of(whole)))),
            (dict(enumerate(averages_of(resumed))), dict(enumerate(averages_of(whole)))),
        ):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[n], b[n]) for n in a), (stage, settings)
        # DeepSpeed's own files hold the averaged weights.
        fragments = list(whole.mosaic.run.parameters.fragments())
        if stage == 0 or (stage, settings) == (1, SUMS):  # which zero_to_fp32 can't read
            file = torch.load(where / "global_step3/mp_rank_00_model_states.pt", weights_only=False)
            kept = file["module"]
        else:
            kept = deepspeed.utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(
                str(where), "global_step3"
            )
        for f, average in zip(fragments, averaged, strict=True):
            own = kept[f.name].reshape(-1)[f.start : f.start + f.numel].view(average.shape)
            expected = average.to(own.dtype)
            assert torch.equal(own, expected), (stage, settings, f.name)


@check(ONE, TWO)
def a_checkpoint_that_would_not_be_exact_is_refused_before_it_is_loaded():
    where = folder()
    engine = engine_of(RECIPE, 2)
    train(engine, 0, 2)
    engine.save_checkpoint(where)
    other = engine_of([BlurPool(), EMA("4ba")], 2)
    before = gathered(other.module)
    with pytest.raises(UnsupportedError, match=r"engine\.load_checkpoint: Run: a run must go on"):
        other.load_checkpoint(where)
    assert all(torch.equal(gathered(other.module)[n], before[n]) for n in before)
    third = engine_of(RECIPE, 3)
    with pytest.raises(
        UnsupportedError, match=r"DeepSpeedZeroOptimizer, which splits .*_Stage3 of"
    ):
        third.load_checkpoint(where)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        (where / "global_step2/mosaic_rank_00007.pt").write_bytes(b"")
    torch.distributed.barrier()
    size = torch.distributed.get_world_size()
    again = engine_of(RECIPE, 2)
    with pytest.raises(UnsupportedError, match=rf"is of {size + 1} ranks and this run has {size}"):
        again.load_checkpoint(where)
    again.load_checkpoint(where, load_module_only=True)  # a new run, from the averaged weights
    assert again.mosaic.run.progress.step == again.global_steps
    assert distance(gathered(again.module), gathered(engine.module)) > 1e-4
    train(again, 0, 2)


@check(TWO)
def a_refusal_on_one_rank_is_one_on_all():
    where = folder()
    engine = engine_of(RECIPE, 2)
    train(engine, 0, 2)
    engine.save_checkpoint(where)
    if torch.distributed.get_rank() == 1:
        file = where / "global_step2/mosaic_rank_00001.pt"
        own = torch.load(file, weights_only=True)
        own["layout"]["fragments"][0][1] += 1
        torch.save(own, file)
    with pytest.raises(UnsupportedError, match=r"which splits the parameters in another way"):
        engine_of(RECIPE, 2).load_checkpoint(where)


@check()
def a_checkpoint_without_mosaic_begins_a_run():
    where = folder()
    engine = bare_engine(2)
    for x, y in batches(0, 3):
        engine.backward(F.cross_entropy(engine(x), y))
        engine.step()
    engine.save_checkpoint(where)
    other = engine_of(PLAIN, 2)
    train(other, 0, 1)
    other.load_checkpoint(where)
    assert other.mosaic.run.progress.step == 3
    assert distance(gathered(other.module), gathered(engine.module)) == 0
    assert other.load_checkpoint(folder()) == (None, None)
    train(other, 3, 2)


@check()
def a_changed_model_says_so_in_its_checkpoint():
    for stage in (0, 2, 3):
        where = folder()
        engine = engine_of(RECIPE, stage)
        train(engine, 0, 2)
        engine.save_checkpoint(where)
        with pytest.raises(RuntimeError, match=r"changed by BlurPool.*mosaic_deepspeed\.initiali"):
            bare_engine(stage).load_checkpoint(where)
    engine = engine_of(RECIPE, 2)
    train(engine, 0, 2)
    engine.save_16bit_model(where)
    exported = torch.load(where / "pytorch_model.bin", weights_only=True)
    with pytest.raises(RuntimeError, match=r"changed by BlurPool"):
        model().load_state_dict(exported)
    with engine.mosaic.evaluation():
        averaged = gathered(engine.module)
    assert all(torch.equal(exported[n], averaged[n]) for n in averaged)


# Refusals.


@check()
def models_that_cannot_be_changed_are_refused():
    import deepspeed
    from deepspeed.pipe import PipelineModule

    with deepspeed.zero.Init(config_dict_or_path=config(3)):
        net = model()
    with pytest.raises(UnsupportedError, match=r"inside deepspeed\.zero\.Init.*build it outside"):
        engine_of(RECIPE, 3, net)
    pipeline = PipelineModule([nn.Linear(2, 2)], num_stages=1)
    with pytest.raises(UnsupportedError, match=r"a pipeline schedules its micro-batches itself"):
        engine_of(RECIPE, 0, pipeline)
    with pytest.raises(UnsupportedError, match=r"Regroup needs optimizer, which the adapter for D"):
        engine_of([Regroup()])


@check()
def engines_that_are_not_proved_are_refused():
    from mosaic_deepspeed._refusals import refuse_engine
    from mosaic_deepspeed._views import view_of

    with pytest.raises(UnsupportedError, match=r"a SimpleNamespace is not supported; use a Deep"):
        refuse_engine(Recipe(), SimpleNamespace())
    nvme = SimpleNamespace(device="nvme")
    ways = {
        "basic_optimizer": (None, r"the engine has no optimizer; give one"),
        "has_moe_layers": (True, r"experts are sharded.*; use data parallelism"),
        "mp_world_size": (2, r"tensor parallelism splits"),
        "autotp_size": (lambda: 2, r"tensor parallelism splits"),
        "sequence_parallel_size": (2, r"sequence parallelism gives"),
        "zero_offload_optimizer": (lambda: nvme, r"offloaded.*; take offload_optimizer and"),
        "zero_offload_param": (lambda: nvme, r"offloaded.*; take offload_optimizer and"),
        "zero_hpz_partition_size": (lambda: 2, r"ZeRO\+\+ keeps second"),
        "zero_quantized_weights": (lambda: True, r"ZeRO\+\+ keeps second"),
        "zero_quantized_gradients": (lambda: True, r"quantized gradients are not exact; take"),
        "managed_gradient_accumulation": (lambda: False, r"only the loop knows.*; leave it on"),
        "random_ltd_enabled": (lambda: True, r"random layer-token dropping draws"),
        "is_deepcompile_enabled": (lambda: True, r"DeepCompile reduces gradients"),
        "load_universal_checkpoint": (lambda: True, r"a universal checkpoint is laid out"),
        "checkpoint_engine": (
            SimpleNamespace(is_decoupled=lambda: True),
            r"a decoupled checkpoint writer.*; use the default writer",
        ),
    }
    engine = bare_engine(2)
    refuse_engine(Recipe(), engine)
    for name, (value, message) in ways.items():
        own = vars(engine)
        before, had = own.get(name), name in own
        own[name] = value
        with pytest.raises(UnsupportedError, match=message):
            refuse_engine(Recipe(), engine)
        own.pop(name)
        if had:
            own[name] = before
    refuse_engine(Recipe(), engine)

    class Other(type(engine.optimizer)):
        pass

    engine.optimizer.__class__ = Other
    with pytest.raises(UnsupportedError, match=r"an engine with Other is not supported; .* ZeRO 0"):
        view_of(engine)


@check()
def offload_to_the_cpu_is_refused():
    settings = {
        "zero": {"offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
    }
    with pytest.raises(UnsupportedError, match=r"offloaded parameters and optimizer states"):
        engine_of(RECIPE, 2, settings=settings)


@check()
def gradients_in_float16_are_refused():
    for stage in (0, 3):
        with pytest.raises(
            UnsupportedError, match=r"SAM acts on gradients, which DeepSpeed scales"
        ):
            engine_of([MixUp(), SAM()], stage, settings={"weights": "fp16"})


@check()
def an_empty_recipe_is_refused_nowhere():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    engine = engine_of([], 0, net, settings={"weights": "fp16"})
    x, y = examples(0)
    engine.backward(F.cross_entropy(engine(x.half()).float(), y))
    engine.step()
    with engine.mosaic.evaluation():
        pass
    engine.mosaic.detach()
    import deepspeed

    import mosaic_deepspeed

    without = deepspeed.initialize(model=model(), config=config(0))[0]
    mosaic_deepspeed.attach(without).detach()
    with pytest.raises(UnsupportedError, match=r"the engine has no optimizer; give one in the co"):
        mosaic_deepspeed.attach(without, PLAIN)
    with deepspeed.zero.Init(config_dict_or_path=config(3)):
        net = model()
    train(engine_of([], 3, net), 0, 1)


@check()
def a_gradient_is_set_only_while_there_is_one():
    engine = engine_of([Prune()], 2)
    view = engine.mosaic.run.parameters
    fragment = next(iter(view.fragments()))
    assert view.grad(fragment) is None
    with pytest.raises(RuntimeError, match=r"has no gradient to replace; gradients exist between"):
        view.set_grad(fragment, fragment.master)


@check()
def batches_of_any_structure_are_moved():
    from collections import namedtuple

    from mosaic_deepspeed._loader import to_device

    pair = namedtuple("pair", "x y")  # what torch's collate makes of one
    meta = torch.device("meta")
    moved = to_device({"a": [torch.ones(1), "text"], "b": pair(torch.ones(1), 3)}, meta)
    assert moved["a"][0].device == moved["b"].x.device == meta
    assert (moved["a"][1], moved["b"].y) == ("text", 3)
    loader = DataLoader([examples(0)], batch_size=None)
    assert len(list(itertools.islice(engine_of([]).mosaic.loader(loader), 1))) == 1


@check()
def time_is_told_apart_by_phases():
    from mosaic_deepspeed._workload import train

    check_trainer(train)


if __name__ == "__main__":
    environment()
    main(ONE, TWO, sys.argv[1], sys.argv[2:])
