"""Where the time of a step goes: on a clock that only work moves, every moment counts once."""

import dataclasses
import itertools
import random

import pytest
import timed
import torch
from timed import CLOCK, RECIPES, WORKLOAD, Net, SlowBackward, check_trainer, expected
from torch.optim import optimizer as hooks
from torch.utils.checkpoint import checkpoint

from mosaic_core import LossError, Recipe, Run
from mosaic_core.algorithms import SAM, MixUp
from mosaic_core.bench import phases
from mosaic_core.loop import train_steps
from mosaic_core.plain import train
from mosaic_core.second_pass import SecondPass

WARM_UP = phases.WARM_UP


def loop(body, of=timed.SGD, model=Net):
    """Return a function that trains with a loop: ``body(run, loader, loss)``."""

    def trained(workload, recipe, *, seed=0, epochs=None, data_dir=None, report=None):
        loader, _ = workload.loaders(workload.load(data_dir), seed)
        net = model()
        run = Run(recipe, model=net, seed=seed, optimizer=of(net.parameters(), lr=0.01))
        body(run, loader, lambda net, batch: workload.loss(net(batch[0]), batch[1]))

    return trained


def plain(run, loader, loss):
    for batch in loader:
        run.optimizers[0].zero_grad()
        batch = run.on_batch(batch)
        loss(run.model, batch).backward()
        run.step(lambda batch=batch: loss(run.model, batch).backward())


# What belongs to which phase.


def test_the_plain_loop():
    check_trainer(train)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_loop_that_steps_by_the_run(recipe):
    assert timed.measure(loop(plain), recipe) == pytest.approx(expected(recipe))


@pytest.mark.parametrize("recipe", RECIPES)
def test_micro_batches_add_up_in_their_step(recipe):
    def trained(workload, recipe, **options):
        workload = dataclasses.replace(workload, batch_size=workload.batch_size // 4)
        loop(lambda *args: train_steps(*args, accumulate=4))(workload, recipe, **options)

    found, want = timed.measure(trained, recipe), expected(recipe)
    want = {phase: time if phase == "optimizer" else 4 * time for phase, time in want.items()}
    once = timed.ON_GRADIENTS + timed.ON_STEP_END
    want["algorithm"] -= 3 * once * (recipe != "empty")
    assert found == pytest.approx(want)


def test_micro_batches_that_the_recipe_does_not_see():
    """As with an empty recipe, for which adapters may leave calls of the run out."""

    def body(run, loader, loss):
        for batch in loader:
            for half in ([t[:4] for t in batch], [t[4:] for t in batch]):
                CLOCK.work(5)
                loss(run.model, half).backward()
            run.optimizers[0].step()
            run.end_step()

    want = {**expected("empty"), "data": timed.DATA + 2 * 5}
    want |= {phase: 2 * want[phase] for phase in ("forward", "backward")}
    assert timed.measure(loop(body), "empty") == pytest.approx(want)


@pytest.mark.parametrize(
    "call", ["on_batch", "skip_batch", "check_loss", "on_gradients", "end_step", "end_epoch"]
)
def test_calls_of_the_run_are_time_of_the_algorithms(monkeypatch, call):
    method = getattr(Run, call)

    def slow(*args, **kwargs):
        CLOCK.work(7)
        return method(*args, **kwargs)

    def body(run, loader, loss):
        for batch in loader:
            run.skip_batch()
            plain(run, [batch], loss)
            run.end_epoch()

    monkeypatch.setattr(Run, call, slow)
    want = {**expected("busy"), "algorithm": timed.ALGORITHM["busy"] + 7}
    assert timed.measure(loop(body), "busy") == pytest.approx(want)


def test_a_closure_inside_the_optimizer_is_no_time_of_the_optimizer():
    def body(run, loader, loss):
        for batch in loader:

            def closure(batch=batch):
                loss(run.model, run.on_batch(batch)).backward()
                run.on_gradients()

            run.optimizers[0].step(closure)
            run.end_step()

    assert timed.measure(loop(body), "busy") == pytest.approx(expected("busy"))


def test_a_second_pass_by_the_trainers_own_loop():
    def body(run, loader, loss):
        for batch in loader:
            batch = run.on_batch(batch)
            loss(run.model, batch).backward()
            run.two_passes.begin()
            loss(run.model, batch).backward()
            run.check_loss()
            run.two_passes.end()
            run.on_gradients()
            run.optimizers[0].step()
            run.end_step()

    assert timed.measure(loop(body), "full") == pytest.approx(expected("full"))


def test_an_optimizer_inside_another_and_one_after_another():
    class Outer(timed.SGD):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.inner = timed.SGD(self.param_groups[0]["params"], **kwargs)

        def step(self, closure=None):
            self.inner.step(closure)
            CLOCK.work(timed.OPTIMIZER)

    def body(run, loader, loss):
        run.optimizers.append(timed.SGD(run.model.parameters(), lr=0.01))
        plain(run, loader, loss)

    want = {**expected("busy"), "optimizer": 3 * timed.OPTIMIZER}
    assert timed.measure(loop(body, of=Outer), "busy") == pytest.approx(want)


def test_a_backward_inside_backward_does_not_end_it():
    class Recomputed(Net):
        def forward(self, x):
            x = SlowBackward.apply(x.requires_grad_())
            return checkpoint(super().forward, x, use_reentrant=True)

    want = {**expected("busy"), "forward": 10, "backward": 2100 + 10}  # forward once more
    assert timed.measure(loop(plain, model=Recomputed), "busy") == pytest.approx(want)


def test_gradients_by_other_ways_than_backward():
    def body(run, loader, loss):
        for batch in loader:
            weights = list(run.model.parameters())
            grads = torch.autograd.grad(loss(run.model, run.on_batch(batch)), weights)
            for weight, grad in zip(weights, grads, strict=True):
                weight.grad = grad
            run.step()

    assert timed.measure(loop(body), "busy") == pytest.approx(expected("busy"))


@pytest.mark.parametrize("fires", [True, False])
def test_what_lies_between_optimizer_and_forward_is_data(fires):
    """Also where the update fires no hook of torch's, as that of no torch optimizer does."""

    def body(run, loader, loss):
        optimizer = run.optimizers[0]
        for batch in loader:
            CLOCK.work(2)  # before a call of the run that begins no micro-batch
            run.skip_batch()
            batch = run.on_batch(batch)
            CLOCK.work(3)
            loss(run.model, batch).backward()
            run.on_gradients()
            if fires:
                optimizer.step()
                CLOCK.work(4)  # as a schedule may
            else:
                CLOCK.work(timed.OPTIMIZER)
            run.end_step()

    want = {**expected("busy"), "data": timed.DATA + 2 + 3 + 4 * fires}
    assert timed.measure(loop(body), "busy") == pytest.approx(want)


def test_a_step_with_an_evaluation_before_it_is_left_out():
    def body(run, loader, loss):
        for n, batch in enumerate(loader):
            if n == WARM_UP + 1:  # before the second of two
                with torch.no_grad(), run.evaluation():
                    run.model.eval()(batch[0])
                    run.model.train()
            plain(run, [batch], loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phases, "perf_counter", CLOCK)
        found = phases.measure(loop(body), WORKLOAD, RECIPES["full"], steps=2)
    assert found == pytest.approx(expected("full"))


@pytest.mark.parametrize("recipe", [(), (timed.Busy(), SAM(), MixUp())], ids=["empty", "full"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_moment_is_counted_once(monkeypatch, recipe, accumulate):
    """Time passes at every look at the clock; nobody looks at it after the end of a step."""
    draw, now, ends = random.Random(0), 0.0, []

    def clock():
        nonlocal now
        now += draw.random()
        return now

    def body(run, loader, loss):
        for _ in range(WARM_UP + 1):
            batches = itertools.islice(itertools.cycle(loader), accumulate)
            train_steps(run, batches, loss, accumulate=accumulate, clip_norm=1.0)
            ends.append(now)

    monkeypatch.setattr(phases, "perf_counter", clock)
    found = phases.measure(loop(body), WORKLOAD, Recipe(recipe), steps=1)
    assert sum(found.values()) == pytest.approx(1e3 * (ends[-1] - ends[-2]))
    assert all(time > 0 for time in found.values())


# Around the training.


def test_only_as_many_steps_as_are_asked_for_are_counted_after_the_warm_up(monkeypatch):
    """All steps before the last two are slow."""

    def body(run, loader, loss):
        assert len(loader) == WARM_UP + 2
        for n, batch in enumerate(loader):
            CLOCK.work(10**9 * (n < WARM_UP))
            plain(run, [batch], loss)

    monkeypatch.setattr(phases, "perf_counter", CLOCK)
    found = phases.measure(loop(body), WORKLOAD, RECIPES["busy"], steps=2)
    assert found == pytest.approx(expected("busy"))


def test_the_training_is_that_of_the_arguments(tmp_path):
    seen = {}

    def load(data_dir):
        seen["data_dir"] = data_dir
        return timed.data()

    def trained(workload, recipe, **options):
        seen.update(options, recipe=recipe, name=workload.name)
        loop(plain)(workload, recipe)

    workload = dataclasses.replace(WORKLOAD, load=load)
    phases.measure(trained, workload, RECIPES["busy"], steps=1, data_dir=tmp_path, seed=3)
    assert seen["data_dir"] == tmp_path
    assert (seen["seed"], seen["epochs"], seen["recipe"]) == (3, 1, RECIPES["busy"])


def state():
    """Return what watching changes, beside the model."""
    return (
        {**vars(Run)},
        {**vars(SecondPass)},
        torch.autograd.backward,
        {**hooks._global_optimizer_pre_hooks},
        {**hooks._global_optimizer_post_hooks},
    )


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails):
    before, models = state(), []

    def body(run, loader, loss):
        assert state() != before
        models.append(run.model)
        assert run.model._forward_hooks
        assert run.model._forward_pre_hooks
        if not fails:
            plain(run, loader, loss)
        else:  # in the middle of a call
            plain(run, loader, lambda net, batch: net(batch[0]).sum())

    def measure():
        phases.measure(loop(body), WORKLOAD, Recipe([MixUp(), SAM()]), steps=1)

    if fails:
        with pytest.raises(LossError):
            measure()
    else:
        measure()
    assert state() == before
    assert not models[0]._forward_hooks
    assert not models[0]._forward_pre_hooks


def test_a_device_is_waited_for_at_every_look_at_the_clock(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("wait"))
    monkeypatch.setattr(phases, "perf_counter", lambda: seen.append("look") or 0.0)
    phases.measure(loop(plain), WORKLOAD, Recipe(), steps=1)
    assert len(seen) > 2 * WARM_UP * 10
    assert seen == ["wait", "look"] * (len(seen) // 2)


def test_what_can_not_be_measured_is_an_error():
    with pytest.raises(ValueError, match=r"^measure: steps must be at least 1, got 0$"):
        phases.measure(train, WORKLOAD, Recipe(), steps=0)
    with pytest.raises(RuntimeError, match=r"train must take 7 steps .* got 0 steps and 0 calls"):
        phases.measure(lambda *args, **options: None, WORKLOAD, Recipe(), steps=2)

    def body(run, loader, loss):  # calls a part of the model
        plain(run, loader, lambda net, batch: net.layer(batch[0]).sum())

    with pytest.raises(RuntimeError, match="got 7 steps and 0 calls of the model"):
        phases.measure(loop(body), WORKLOAD, Recipe(), steps=2)
