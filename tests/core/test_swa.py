"""SWA against means written out in float64 and against torch.optim.swa_utils."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import swa_utils

from mosaic_core import ConflictError, Need, Recipe, Run, UnsupportedError
from mosaic_core.algorithms import EMA, LAWA, SWA, average_weights, update_batchnorm
from mosaic_core.loop import train_steps

STEPS_PER_EPOCH = 4


def network(dtype=torch.float32) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        )
        return net.to(dtype)


def batch(step, dtype=torch.float32):
    g = torch.Generator().manual_seed(step)
    return torch.randn(8, 1, 6, 6, generator=g).to(dtype), torch.randint(3, (8,), generator=g)


class RecordingSGD(torch.optim.SGD):
    """Notes the learning rates with which it steps."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rates = []

    def step(self, closure=None):
        self.rates.append([float(group["lr"]) for group in self.param_groups])
        return super().step(closure)


def start(recipe, total_steps=20, dtype=torch.float32, lr=0.1, groups=False, model=None):
    model = network(dtype) if model is None else model
    parameters = model.parameters()
    if groups:
        parameters = [
            {"params": model[0].parameters()},
            {"params": [*model[1].parameters(), *model[4].parameters()], "lr": 0.02},
        ]
    return Run(
        recipe,
        model=model,
        optimizer=RecordingSGD(parameters, lr=lr, momentum=0.9),
        total_steps=total_steps,
        steps_per_epoch=STEPS_PER_EPOCH,
    )


def train(run, steps, dtype=torch.float32, scheduler=None):
    """Train, and return the parameters after each step in float64."""
    seen = []
    for _ in range(steps):
        data = [batch(run.progress.step, dtype)]
        train_steps(run, data, loss, scheduler=scheduler)
        seen.append([p.detach().double().clone() for p in run.model.parameters()])
        if run.progress.step % STEPS_PER_EPOCH == 0:
            run.end_epoch()
    return seen


def loss(model, batch):
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def averages_of(run):
    with run.evaluation():
        return [p.detach().double().clone() for p in run.model.parameters()]


def mean(seen, steps):
    """The mean of the weights after the given steps."""
    return [torch.stack(weights).mean(0) for weights in zip(*(seen[s - 1] for s in steps))]  # noqa: B905


def assert_close(actual, expected, tol=1e-6):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tol, atol=tol)


def randomized(model, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return model


class TestAverageWeights:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_formula(self, dtype):
        average = network(dtype)
        models = [randomized(network(dtype), seed) for seed in range(5)]
        before = copy.deepcopy(models[0].state_dict())
        for n, model in enumerate(models):
            average_weights(model, average, n)
        assert all(torch.equal(v, before[k]) for k, v in models[0].state_dict().items())
        expected = [
            torch.stack([p.detach().double() for p in weights]).mean(0)
            for weights in zip(*(m.parameters() for m in models), strict=True)
        ]
        tol = 16 * torch.finfo(dtype).eps
        assert_close([p.detach().double() for p in average.parameters()], expected, tol)

    def test_equals_torch(self):
        ours, theirs = network(), swa_utils.AveragedModel(network())
        for n in range(4):
            model = randomized(network(), n)
            average_weights(model, ours, n)
            theirs.update_parameters(model)
        for a, b in zip(ours.parameters(), theirs.module.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)

    def test_the_first_is_a_copy(self):
        model, average = randomized(network(), 1), network()
        average_weights(model, average, 0)
        assert all(
            torch.equal(a, p) for a, p in zip(average.parameters(), model.parameters(), strict=True)
        )

    def test_half_precision_weights_and_a_precise_average(self):
        average, models = network(), [randomized(network(torch.bfloat16), s) for s in range(3)]
        for n, model in enumerate(models):
            average_weights(model, average, n)
        expected = torch.stack([m[0].weight.detach().double() for m in models]).mean(0)
        torch.testing.assert_close(
            average[0].weight.detach().double(), expected, rtol=1e-6, atol=1e-6
        )

    def test_buffers_are_copied(self):
        model, average = network(), network()
        model(batch(0)[0])
        average_weights(model, average, 3)
        for a, b in zip(average.buffers(), model.buffers(), strict=True):
            assert torch.equal(a, b)
            assert a.data_ptr() != b.data_ptr()

    def test_errors(self):
        with pytest.raises(
            ValueError, match=r"average_weights: n_averaged must be at least 0, got -1"
        ):
            average_weights(network(), network(), -1)
        with pytest.raises(ValueError, match=r"average_weights: the models differ in the param"):
            average_weights(nn.Linear(1, 1), nn.Linear(1, 1, bias=False), 1)
        with pytest.raises(ValueError, match=r"average_weights: the models differ in their buff"):
            average_weights(nn.BatchNorm1d(1), nn.BatchNorm1d(1, track_running_stats=False), 1)


def batchnorm_by_hand(inputs):
    """Mean over batches of the batches' mean and unbiased variance."""
    means = [x.double().mean((0, 2, 3)) for x in inputs]
    variances = [x.double().transpose(0, 1).flatten(1).var(1, unbiased=True) for x in inputs]
    return torch.stack(means).mean(0), torch.stack(variances).mean(0)


class TestUpdateBatchnorm:
    def test_update_batchnorm(self):
        model = network()
        model[1].momentum = 0.3
        model[2].training = False
        model(batch(99)[0])  # statistics that must be forgotten
        batches = [batch(i)[0] for i in range(3)]
        update_batchnorm(model, batches)
        mean, variance = batchnorm_by_hand([model[0](x) for x in batches])
        torch.testing.assert_close(
            model[1].running_mean.double(), mean.detach(), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(
            model[1].running_var.double(), variance.detach(), rtol=1e-5, atol=1e-6
        )
        assert model[1].num_batches_tracked == 3
        assert model[1].momentum == 0.3
        assert [m.training for m in model] == [True, True, False, True, True]
        assert all(p.grad is None for p in model.parameters())

    def test_update_batchnorm_with_a_forward_of_its_own(self):
        model = network()
        batches = [{"x": batch(i)[0]} for i in range(2)]
        other = network()
        update_batchnorm(model, batches, lambda b: model(b["x"]))
        update_batchnorm(other, [b["x"] for b in batches])
        assert torch.equal(model[1].running_var, other[1].running_var)

    def test_update_batchnorm_draws_nothing(self):
        model = network().append(nn.Dropout(0.5))
        state = torch.get_rng_state()
        update_batchnorm(model, [batch(0)[0]])
        assert torch.equal(torch.get_rng_state(), state)

    def test_nothing_to_do(self):
        model = network()
        before = [b.clone() for b in model.buffers()]
        update_batchnorm(model, [])
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))
        calls = []
        update_batchnorm(nn.Linear(1, 1), [1], calls.append)
        frozen = nn.BatchNorm1d(2, track_running_stats=False)
        update_batchnorm(frozen, [1], calls.append)
        assert calls == []

    def test_modes_and_momenta_come_back_after_an_error(self):
        model = network()
        model[0].eval()
        with pytest.raises(ZeroDivisionError):
            update_batchnorm(model, [1], lambda b: 1 / 0)
        assert [m.training for m in model] == [False, True, True, True, True]
        assert model[1].momentum == 0.1

    def test_equals_torch(self):
        ours, theirs = network(), network()
        batches = [batch(i)[0] for i in range(3)]
        update_batchnorm(ours, batches)
        swa_utils.update_bn(batches, theirs)
        for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
            assert torch.equal(a, b)

    def test_one_example(self):
        """A batch of one has no variance over the batch, but one over the positions."""
        model = network()
        x = batch(0)[0][:1]
        update_batchnorm(model, [x])
        _, variance = batchnorm_by_hand([model[0](x).detach()])
        torch.testing.assert_close(model[1].running_var.double(), variance, rtol=1e-5, atol=1e-6)


class TestWindow:
    @pytest.mark.parametrize(
        ("settings", "steps"),
        [
            ((), [16]),
            (("0.5dur", "1dur"), [12, 16, 20]),
            (("0.2dur", "0.9dur", "1ba"), range(4, 19)),
            (("5ba", "11ba", "3ba"), [6, 9]),
            (("6ba", "9ba", "3ba"), [6, 9]),
            (("0ba", "1dur", "5ba"), [5, 10, 15, 20]),
            (("1ep", "3ep"), [4, 8, 12]),
            (("1ep", "3ep", "1ba"), range(5, 13)),
            (("0ba", "3ep", "2ep"), [8]),
            (("2ep", "0.9dur", "2ba"), [10, 12, 14, 16, 18]),
            (("0.5ep", "2.5ep", "1ep"), [4, 8]),
        ],
        ids=str,
    )
    def test_mean_of_a_run(self, settings, steps):
        run = start([SWA(*settings)])
        seen = train(run, steps[0] - 1)
        with run.evaluation():
            assert not run.in_evaluation  # no average yet
        seen += train(run, 20 - len(seen))
        assert run.state(run.recipe.algorithms[0]).count == len(steps)
        assert_close(averages_of(run), mean(seen, steps))

    def test_equals_torch_in_a_run(self):
        run, theirs = start([SWA("0.5dur", "1dur", "1ba")]), None
        for step in range(1, 21):
            train(run, 1)
            if step >= 10:
                theirs = theirs or swa_utils.AveragedModel(run.model)
                theirs.update_parameters(run.model)
        with run.evaluation():
            for a, b in zip(run.model.parameters(), theirs.module.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)

    def test_bfloat16_weights_are_averaged_in_float32(self):
        run = start([SWA("0.2dur", "1dur", "1ba")], dtype=torch.bfloat16)
        seen = train(run, 20, torch.bfloat16)
        held = run.state(run.recipe.algorithms[0]).averages
        assert {a.dtype for a in held.values()} == {torch.float32}
        assert_close([a.double() for a in held.values()], mean(seen, range(4, 21)))

    def test_training_is_not_disturbed(self):
        one, other = start([SWA("0.2dur", "0.9dur", "1ba")]), start([])
        for run in (one, other):
            train(run, 10)
            with run.evaluation():
                run.model.eval()(batch(0)[0])
            run.model.train()
            train(run, 10)
        for a, b in zip(
            one.model.state_dict().values(), other.model.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b)

    @pytest.mark.parametrize(
        ("settings", "steps"),
        [((), 8), (("0.1dur", "0.15dur"), 20), (("5ba", "7ba", "4ba"), 20)],
    )
    def test_a_run_in_which_no_update_comes_is_refused(self, settings, steps):
        """Two epochs end at half and at the end of the run, of which the default takes neither."""
        with pytest.raises(ValueError, match=r"SWA: an update must lie between .* got update_int"):
            start([SWA(*settings)], total_steps=steps)

    @pytest.mark.parametrize("swa", [SWA(), SWA("1ba", "9ba"), SWA("1ba", "0.5ep", "1ba")])
    def test_a_length_that_is_unknown(self, swa):
        """What a run of unknown length can't tell is refused; what it can tell is not."""
        optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
        if swa == SWA("1ba", "9ba"):
            Run([swa], model=network(), optimizer=optimizer)
            return
        with pytest.raises(ValueError, match=r"must be known for durations in dur or ep"):
            Run([swa], model=network(), optimizer=optimizer)


class TestLearningRate:
    SWA = SWA("0.2dur", "1dur", "1ba", True, anneal_steps=5, swa_lr=0.03)

    @pytest.mark.filterwarnings("ignore:Detected call of")  # SWALR is made in the middle of it
    @pytest.mark.parametrize("strategy", ["linear", "cos"])
    @pytest.mark.parametrize(("interval", "every"), [("1ba", 1), ("3ba", 3), ("1ep", 4)])
    def test_equals_torch(self, strategy, interval, every):
        """From the first update on as SWALR, stepped with each, has it."""
        swa = SWA("0.2dur", "1dur", interval, True, strategy, anneal_steps=3, swa_lr=0.03)
        run = start([swa], groups=True)
        train(run, 20)
        other = start([], groups=True).optimizers[0]
        scheduler, expected = None, []
        for step in range(1, 21):
            expected.append([group["lr"] for group in other.param_groups])
            other.step()
            if step >= 4 and step % every == 0:
                scheduler = scheduler or swa_utils.SWALR(
                    other, swa_lr=0.03, anneal_epochs=3, anneal_strategy=strategy
                )
                scheduler.step()
        torch.testing.assert_close(
            torch.tensor(run.optimizers[0].rates, dtype=torch.float64),
            torch.tensor(expected, dtype=torch.float64),
            rtol=1e-12,
            atol=0,
        )
        assert run.optimizers[0].rates[-1] == pytest.approx([0.03, 0.03])
        assert run.metrics["mosaic/SWA/lr"] == pytest.approx(0.03)

    @pytest.mark.parametrize(
        "schedule",
        [
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
            lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
            lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        ],
        ids=["cosine", "exponential", "lambda"],
    )
    def test_schedulers_see_their_own(self, schedule):
        """Also those that compute a learning rate from the last one."""
        lrs = []
        for recipe in ([self.SWA], []):
            run = start(recipe, groups=True)
            scheduler, seen = schedule(run.optimizers[0]), []
            for _ in range(20):
                train(run, 1, scheduler=scheduler)
                seen.append([g["lr"] for g in run.optimizers[0].param_groups])
            lrs.append(seen)
            if recipe:
                begun = seen[3]  # what the scheduler has set for the step after the first update
                assert all(rates == [0.03, 0.03] for rates in run.optimizers[0].rates[9:])
                assert run.optimizers[0].rates[4] == pytest.approx(
                    [0.8 * lr + 0.2 * 0.03 for lr in begun]
                )
        assert lrs[0] == lrs[1]

    def test_a_skipped_step_leaves_the_optimizer_as_it_was(self):
        run = start([self.SWA])
        train(run, 10)
        run.on_gradients()
        run.end_step(applied=False)
        assert run.optimizers[0].param_groups[0]["lr"] == 0.1
        run.optimizers[0].step()  # of somebody else
        assert run.optimizers[0].rates[-1] == [0.1]
        train(run, 1)
        assert run.optimizers[0].rates[-1] == pytest.approx([0.03])
        assert run.optimizers[0].param_groups[0]["lr"] == 0.1

    def test_a_gradient_scaler_that_skips(self):
        run, scaler = start([self.SWA]), torch.amp.GradScaler("cpu")
        for step in range(8):
            factor = math.inf if step == 5 else 1.0
            train_steps(run, [batch(step)], lambda m, b, f=factor: f * loss(m, b), scaler=scaler)
            assert run.optimizers[0].param_groups[0]["lr"] == 0.1
        assert len(run.optimizers[0].rates) == 7

    def test_a_step_that_raises(self, monkeypatch):
        run = start([self.SWA])
        train(run, 10)
        run.on_gradients()
        with monkeypatch.context() as patched:
            patched.setattr(run.optimizers[0], "rates", None)
            with pytest.raises(AttributeError):
                run.optimizers[0].step()
        train(run, 1)
        assert run.optimizers[0].rates[-1] == pytest.approx([0.03])
        assert run.optimizers[0].param_groups[0]["lr"] == 0.1

    def test_gradients_that_are_computed_inside_the_step(self):
        """As some trainers do, which give the step a closure."""
        runs = [start([self.SWA]), start([self.SWA])]
        train(runs[0], 20)
        run = runs[1]
        scheduler = torch.optim.lr_scheduler.ExponentialLR(run.optimizers[0], 1.0)

        def closure():
            run.model.zero_grad()
            loss(run.model, run.on_batch(batch(run.progress.step))).backward()
            run.on_gradients()

        for _ in range(20):
            run.optimizers[0].step(closure)
            scheduler.step()
            run.end_step()
            assert run.optimizers[0].param_groups[0]["lr"] == 0.1
        for a, b in zip(runs[0].model.parameters(), run.model.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_the_optimizer_has_its_own_rate_afterwards(self):
        run = start([self.SWA])
        train(run, 20)
        run.optimizers[0].step()
        assert run.optimizers[0].rates[-2:] == [pytest.approx([0.03]), [0.1]]

    def test_another_optimizer_for_training_that_goes_on(self):
        run = start([self.SWA])
        train(run, 10)
        other = RecordingSGD(run.model.parameters(), lr=0.1)
        run.start([other], total_steps=20, steps_per_epoch=STEPS_PER_EPOCH)
        train(run, 3)
        assert other.rates == [pytest.approx([0.03])] * 3

    def test_a_learning_rate_in_a_tensor(self):
        run = start([self.SWA], lr=torch.tensor(0.1, dtype=torch.float64))
        lr = run.optimizers[0].param_groups[0]["lr"]
        train(run, 20)
        plain = start([self.SWA])
        train(plain, 20)
        assert run.optimizers[0].rates == plain.optimizers[0].rates
        assert run.optimizers[0].param_groups[0]["lr"] is lr
        assert lr == 0.1

    def test_an_optimizer_that_steps_in_parts(self):
        """As sharded engines do, with some of the groups at a time."""
        run = start([self.SWA], groups=True)
        train(run, 10)
        optimizer = run.optimizers[0]
        run.on_gradients()
        groups = optimizer.param_groups
        for group in groups:
            optimizer.param_groups = [group]
            optimizer.step()
        optimizer.param_groups = groups
        run.end_step()
        assert optimizer.rates[-2:] == [pytest.approx([0.03])] * 2
        assert [g["lr"] for g in groups] == [0.1, 0.02]

    def test_groups_that_changed_anneal_from_their_own(self):
        run = start([self.SWA])
        train(run, 10)
        run.optimizers[0].add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.5})
        train(run, 1)
        assert run.state(run.recipe.algorithms[0]).rates == [0.1, 0.5]

    def test_optimizers_that_have_no_learning_rate_are_refused(self):
        class Own:
            param_groups = ({"params": [], "lr": 0.1},)

        class Relative(torch.optim.SGD):
            def __init__(self, params):
                super().__init__(params, lr=0.1)
                self.param_groups[0]["lr"] = None

        model = network()
        for optimizer in (Own(), Relative(model.parameters())):
            message = rf"SWA: schedule_swa_lr needs a torch opt.*, got {type(optimizer).__name__};"
            with pytest.raises(UnsupportedError, match=message):
                Run([self.SWA], model=model).start([optimizer], total_steps=20, steps_per_epoch=4)
            Run([SWA("1ba", "9ba")], model=model).start([optimizer])

    def test_needs_weights_alone(self):
        assert SWA.needs() == {Need.WEIGHTS}


class TestBatchNorm:
    @pytest.mark.parametrize("kept", [3, 10])
    def test_recomputed_on_the_latest_batches(self, kept):
        run = start([SWA("0.2dur", "1dur", "1ba", recompute_batchnorm=kept)])
        train(run, 20)
        training = [b.clone() for b in run.model.buffers()]
        theirs = network()
        with run.evaluation():
            theirs.load_state_dict(run.model.state_dict())
            swa_utils.update_bn([batch(step)[0] for step in range(20 - kept, 20)], theirs)
            for a, b in zip(run.model.buffers(), theirs.buffers(), strict=True):
                assert torch.equal(a, b)
            assert not torch.allclose(run.model[1].running_mean, training[0])
        assert all(torch.equal(a, b) for a, b in zip(run.model.buffers(), training, strict=True))

    def test_it_matters(self):
        """Statistics of the training weights are not those of the averaged ones."""
        x = torch.cat([batch(step)[0] for step in range(10, 20)])
        errors = []
        for kept in (0, 10):
            run = start([SWA("0.2dur", "1dur", "1ba", recompute_batchnorm=kept)], lr=0.5)
            train(run, 20)
            with run.evaluation():
                run.model.eval()
                inside = run.model[0](x)
                errors.append((run.model[1].running_mean - inside.mean((0, 2, 3))).norm())
        assert errors[1] < 1e-5 < 1e-2 < errors[0]

    def test_a_model_without_batch_norm_keeps_no_batch(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.LayerNorm(3))
        run = start([SWA("0.2dur", "1dur", "1ba")], model=model)
        train(run, 20)
        assert len(run.recent) == 0
        assert run.recent.maxlen == 0
        with run.evaluation():
            assert run.in_evaluation


def saved_and_loaded(run):
    file = io.BytesIO()
    state = [run.model.state_dict(), run.optimizers[0].state_dict(), run.state_dict()]
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class TestResume:
    @pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside evaluation"])
    @pytest.mark.parametrize("at", [2, 8, 19])
    @pytest.mark.parametrize(
        "swa",
        [
            SWA("0.2dur", "0.9dur", "2ba", recompute_batchnorm=1),
            SWA("0.2dur", "1dur", "1ba", True, "cos", anneal_steps=6, swa_lr=0.3),
            SWA(),
        ],
        ids=["plain", "learning rate", "default"],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_bit_equal(self, dtype, swa, at, inside):
        straight = start([swa], dtype=dtype)
        train(straight, 20, dtype)
        first = start([swa], dtype=dtype)
        train(first, at, dtype)
        if inside:
            with first.evaluation():
                model, optimizer, state = saved_and_loaded(first)
        else:
            model, optimizer, state = saved_and_loaded(first)
        second = start([swa], dtype=dtype)
        train(second, 1, dtype)  # whatever it held before must not matter
        second.model.load_state_dict(model)
        second.optimizers[0].load_state_dict(optimizer)
        second.load_state_dict(state)
        assert_close(averages_of(second), averages_of(first), tol=0)
        for run in (second, first):
            train(run, 20 - at, dtype)
            for a, b in zip(
                run.model.state_dict().values(), straight.model.state_dict().values(), strict=True
            ):
                assert torch.equal(a, b)
            assert_close(averages_of(run), averages_of(straight), tol=0)
        rates = [first.optimizers[0].rates, [*second.optimizers[0].rates[1:]]]
        assert rates[0][at:] == rates[1]


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"swa_start": "soon"}, r"SWA: swa_start must be a number and a unit of dur"),
            ({"swa_start": "100sp"}, r"SWA: swa_start must be in ba, ep or dur, got 100sp"),
            ({"swa_end": "9tok"}, r"SWA: swa_end must be in ba, ep or dur, got 9tok"),
            ({"swa_end": "0.7dur"}, r"SWA: swa_end must be later than swa_start, got 0.7dur to 0"),
            ({"update_interval": "0.5ep"}, r"SWA: update_interval must be a whole number of ba or"),
            ({"update_interval": "0.1dur"}, r"SWA: update_interval must be a whole number of ba"),
            ({"anneal_strategy": "step"}, r"SWA: anneal_strategy must be one of linear, cos, got"),
            ({"anneal_steps": 0}, r"SWA: anneal_steps must be at least 1, got 0"),
            ({"schedule_swa_lr": True}, r"SWA: swa_lr must be given with schedule_swa_lr=True,"),
            ({"swa_lr": 0.1}, r"SWA: swa_lr must be given with schedule_swa_lr=True, and only th"),
            ({"schedule_swa_lr": True, "swa_lr": -0.1}, r"SWA: swa_lr must be at least 0, got -0"),
            ({"schedule_swa_lr": True, "swa_lr": math.nan}, r"SWA: swa_lr must be at least 0, go"),
            ({"recompute_batchnorm": -1}, r"SWA: recompute_batchnorm must be at least 0, got -1"),
        ],
        ids=str,
    )
    def test_errors(self, settings, message):
        with pytest.raises(ValueError, match=message):
            SWA(**settings)

    @pytest.mark.parametrize("other", [EMA(), LAWA()], ids=["EMA", "LAWA"])
    def test_excludes_other_averaging(self, other):
        with pytest.raises(ConflictError, match=r"can't be combined"):
            Recipe([SWA(), other])
