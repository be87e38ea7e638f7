"""EMA against averages written out in float64, through evaluation, checkpoints and batch norm."""

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mosaic_core import Run
from mosaic_core.algorithms import EMA, MixUp, compute_ema

STEPS_PER_EPOCH = 4


def network(dtype=torch.float32) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        )
        return net.to(dtype)


def batch(step: int, dtype=torch.float32):
    g = torch.Generator().manual_seed(step)
    return torch.randn(8, 1, 6, 6, generator=g).to(dtype), torch.randint(3, (8,), generator=g)


def start(recipe, total_steps=20, dtype=torch.float32):
    model = network(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Run(
        recipe,
        model=model,
        optimizer=optimizer,
        total_steps=total_steps,
        steps_per_epoch=STEPS_PER_EPOCH,
    )


def train(run, steps, dtype=torch.float32):
    """Train, and return the parameters after each step in float64."""
    seen = []
    for _ in range(steps):
        x, y = run.on_batch(*batch(run.progress.step, dtype))
        F.cross_entropy(run.model(x).float(), y).backward()
        run.step()
        run.optimizers[0].zero_grad()
        seen.append([p.detach().double().clone() for p in run.model.parameters()])
        if run.progress.step % STEPS_PER_EPOCH == 0:
            run.end_epoch()
    return seen


def average_by_hand(seen, smoothing):
    """The first copied, then s * average + (1 - s) * weights."""
    averages = [w.clone() for w in seen[0]]
    for weights in seen[1:]:
        averages = [
            smoothing * a + (1 - smoothing) * w for a, w in zip(averages, weights, strict=True)
        ]
    return averages


def averages_of(run):
    with run.evaluation():
        return [p.detach().double().clone() for p in run.model.parameters()]


def assert_close(actual, expected, tol=1e-6):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tol, atol=tol)


class TestComputeEma:
    @pytest.mark.parametrize("smoothing", [0.0, 0.3, 0.99, 1.0])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_formula(self, dtype, smoothing):
        model, average = network(dtype), copy.deepcopy(network(dtype))
        expected = [p.detach().double().clone() for p in average.parameters()]
        g = torch.Generator().manual_seed(0)
        for _ in range(3):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn(p.shape, generator=g))
            before = [p.detach().clone() for p in model.parameters()]
            compute_ema(model, average, smoothing)
            expected = [
                smoothing * e + (1 - smoothing) * p.double()
                for e, p in zip(expected, before, strict=True)
            ]
            assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        tol = 8 * torch.finfo(dtype).eps
        assert_close([p.detach().double() for p in average.parameters()], expected, tol)

    def test_equals_the_plain_form(self):
        """One tensor at a time, as it is written in the paper."""
        model, average = network(), network()
        for p in model.parameters():
            nn.init.normal_(p, generator=torch.Generator().manual_seed(0))
        plain = [
            0.9 * a + 0.1 * p for a, p in zip(average.parameters(), model.parameters(), strict=True)
        ]
        compute_ema(model, average, 0.9)
        for a, e in zip(average.parameters(), plain, strict=True):
            torch.testing.assert_close(a, e)

    def test_buffers_are_copied(self):
        model, average = network(), network()
        model(batch(0)[0])
        model[1].running_mean.add_(1)
        compute_ema(model, average, 0.99)
        for a, b in zip(average.buffers(), model.buffers(), strict=True):
            assert torch.equal(a, b)
            assert a.data_ptr() != b.data_ptr()

    def test_half_precision_weights_and_a_precise_average(self):
        model, average = network(torch.bfloat16), network().float()
        before = [p.detach().double().clone() for p in average.parameters()]
        for p in model.parameters():
            nn.init.normal_(p, generator=torch.Generator().manual_seed(0))
        compute_ema(model, average, 0.99)
        expected = [
            0.99 * a + 0.01 * p.detach().double()
            for a, p in zip(before, model.parameters(), strict=True)
        ]
        assert_close([p.detach().double() for p in average.parameters()], expected)

    def test_keeps_no_graph(self):
        model, average = network(), network()
        compute_ema(model, average)
        assert all(p.grad_fn is None and p.requires_grad for p in average.parameters())

    @pytest.mark.parametrize("smoothing", [-0.1, 1.1, float("nan")])
    def test_smoothing_out_of_range(self, smoothing):
        with pytest.raises(ValueError, match=r"compute_ema: smoothing must be in \[0, 1\], got"):
            compute_ema(network(), network(), smoothing)

    def test_different_models(self):
        model, other = nn.Linear(2, 2), nn.ModuleDict({"0": nn.Linear(2, 2)})
        with pytest.raises(
            ValueError, match=r"differ in the parameters 0.bias, 0.weight, bias, we"
        ):
            compute_ema(model, other)


class TestHalfLife:
    @pytest.mark.parametrize(
        ("settings", "smoothing", "interval"),
        [
            ({"half_life": "4ba"}, 2 ** (-1 / 4), 1),
            ({"half_life": "1e1ba"}, 2 ** (-1 / 10), 1),
            ({"half_life": "4ba", "update_interval": "5ba"}, 2 ** (-5 / 4), 5),
            ({"half_life": "2ep"}, 2 ** (-1 / 2), STEPS_PER_EPOCH),
            ({"half_life": "2ep", "update_interval": "2ep"}, 2 ** (-2 / 2), 2 * STEPS_PER_EPOCH),
            ({"half_life": "2ep", "update_interval": "2ba"}, 2 ** (-2 / 8), 2),
            ({"half_life": "6ba", "update_interval": "1ep"}, 2 ** (-4 / 6), STEPS_PER_EPOCH),
            ({"half_life": "0.5dur"}, 2 ** (-1 / 10), 1),
            ({"half_life": "0.5dur", "update_interval": "2ba"}, 2 ** (-2 / 10), 2),
            ({"half_life": "0.5dur", "update_interval": "1ep"}, 2 ** (-4 / 10), STEPS_PER_EPOCH),
            ({"smoothing": 0.99}, 0.99, 1),
            ({"smoothing": 0.0}, 0.0, 1),
            ({"smoothing": 0.5, "update_interval": "3ba"}, 0.5, 3),
        ],
        ids=str,
    )
    def test_average_of_a_run(self, settings, smoothing, interval):
        run = start([EMA(**settings)])
        seen = train(run, 17)
        assert run.metrics["mosaic/EMA/smoothing"] == pytest.approx(smoothing, rel=1e-12)
        expected = average_by_hand(seen[interval - 1 :: interval], smoothing)
        assert_close(averages_of(run), expected)

    def test_a_weight_counts_half_after_the_half_life(self):
        run = start([EMA("4ba")])
        first = train(run, 1)[0]
        with torch.no_grad():
            for p in run.model.parameters():
                p.zero_()
        for _ in range(4):
            run.end_step()
        assert_close(averages_of(run), [w / 2 for w in first])

    @pytest.mark.parametrize(
        ("ema_start", "first"),
        [("0.0dur", 1), ("3ba", 3), ("0.25dur", 5), ("1ep", 5), ("0.5ep", 2)],
    )
    def test_ema_start(self, ema_start, first):
        """It begins as a copy after the first step at whose end the time has come."""
        run = start([EMA("4ba", ema_start=ema_start)])
        seen = train(run, first - 1)
        with run.evaluation():
            assert not run.in_evaluation  # no average yet: the training weights are evaluated
        seen += train(run, 1)
        assert_close(averages_of(run), seen[-1], tol=0)
        seen += train(run, 4)
        assert_close(averages_of(run), average_by_hand(seen[first - 1 :], 2 ** (-1 / 4)))

    def test_skipped_steps_do_not_count(self):
        run = start([EMA("1ba")])
        train(run, 3)
        before = averages_of(run)
        with torch.no_grad():
            for p in run.model.parameters():
                p.add_(1)
        run.end_step(applied=False)
        assert_close(averages_of(run), before, tol=0)


class TestPrecisionAndBuffers:
    def test_batch_norm_statistics_are_those_of_training(self):
        run = start([EMA("4ba")])
        train(run, 6)
        statistics = [b.clone() for b in run.model.buffers()]
        with run.evaluation():
            for a, b in zip(run.model.buffers(), statistics, strict=True):
                assert torch.equal(a, b)

    def test_bfloat16_weights_are_averaged_in_float32(self):
        """In bfloat16 the small steps of a slow average would round away."""
        run = start([EMA(smoothing=0.999)], dtype=torch.bfloat16)
        seen = train(run, 12, torch.bfloat16)
        expected = average_by_hand(seen, 0.999)
        held = run.state(run.recipe.algorithms[0]).averages
        assert {a.dtype for a in held.values()} == {torch.float32}
        assert_close([a.double() for a in held.values()], expected)
        assert_close(averages_of(run), [a.bfloat16().double() for a in held.values()], tol=0)
        assert all(p.dtype == torch.bfloat16 for p in run.model.parameters())

    def test_float64_stays(self):
        run = start([EMA(smoothing=0.9)], dtype=torch.float64)
        seen = train(run, 5, torch.float64)
        assert_close(averages_of(run), average_by_hand(seen, 0.9), tol=1e-14)

    def test_training_is_not_disturbed(self):
        one, other = start([EMA("4ba")]), start([])
        for run in (one, other):
            train(run, 3)
            with run.evaluation():
                run.model.eval()(batch(0)[0])
            run.model.train()
            train(run, 3)
        for a, b in zip(
            one.model.state_dict().values(), other.model.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b)


class TestEvaluation:
    def test_swaps_in_and_back(self):
        run = start([EMA("4ba")])
        train(run, 5)
        training = {k: v.clone() for k, v in run.model.state_dict().items()}
        parameters = list(run.model.parameters())
        with run.evaluation():
            assert run.in_evaluation
            inside = [p.detach().clone() for p in run.model.parameters()]
            with run.evaluation():
                assert run.in_evaluation
            assert run.in_evaluation
        assert not run.in_evaluation
        assert not torch.equal(inside[0], training["0.weight"])
        for name, value in run.model.state_dict().items():
            assert torch.equal(value, training[name])
        assert all(a is b for a, b in zip(run.model.parameters(), parameters, strict=True))

    def test_training_weights_come_back_after_an_error(self):
        run = start([EMA("4ba")])
        train(run, 5)
        weight = run.model[0].weight.detach().clone()
        with pytest.raises(ZeroDivisionError), run.evaluation():
            raise ZeroDivisionError
        assert torch.equal(run.model[0].weight, weight)

    def test_inside_inference_mode(self):
        """Trainers evaluate in it; what is parked there must come back outside."""
        run = start([EMA("4ba", recompute_batchnorm=2)])
        train(run, 5)
        expected = {k: v.clone() for k, v in run.model.state_dict().items()}
        with torch.inference_mode():
            run.enter_evaluation()
            run.model(batch(0)[0])
        run.leave_evaluation()
        for name, value in run.model.state_dict().items():
            if "running" not in name and "num_batches" not in name:
                assert torch.equal(value, expected[name])
        train(run, 2)


def batchnorm_by_hand(inputs):
    """Mean over batches of the batches' mean and unbiased variance."""
    means = [x.double().mean((0, 2, 3)) for x in inputs]
    variances = [x.double().transpose(0, 1).flatten(1).var(1, unbiased=True) for x in inputs]
    return torch.stack(means).mean(0), torch.stack(variances).mean(0)


class TestBatchNorm:
    @pytest.mark.parametrize("others", [(), (MixUp(),)], ids=["alone", "with MixUp"])
    def test_recompute_batchnorm_in_a_run(self, others):
        """The latest three batches, as they were trained on, through the averaged weights."""
        run = start([EMA("4ba", recompute_batchnorm=3), *others])
        seen, original = [], run.on_batch
        run.on_batch = lambda *args: seen.append(original(*args)) or seen[-1]
        train(run, 6)
        statistics = [b.clone() for b in run.model.buffers()]
        modes = [m.training for m in run.model.modules()]
        with run.evaluation():
            mean, variance = batchnorm_by_hand([run.model[0](x) for x, _ in seen[-3:]])
            norm = run.model[1]
            torch.testing.assert_close(
                norm.running_mean.double(), mean.detach(), rtol=1e-5, atol=1e-6
            )
            torch.testing.assert_close(
                norm.running_var.double(), variance.detach(), rtol=1e-5, atol=1e-6
            )
        assert all(torch.equal(a, b) for a, b in zip(run.model.buffers(), statistics, strict=True))
        assert [m.training for m in run.model.modules()] == modes

    def test_without_it_no_batch_is_kept(self):
        run = start([EMA("4ba")])
        train(run, 3)
        assert len(run.recent) == 0


def saved_and_loaded(run):
    """Model, optimizer and run through a file that holds tensors and plain values only."""
    file = io.BytesIO()
    torch.save(
        {
            "model": run.model.state_dict(),
            "optimizer": run.optimizers[0].state_dict(),
            "run": run.state_dict(),
        },
        file,
    )
    file.seek(0)
    return torch.load(file, weights_only=True)


class TestResume:
    @pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside evaluation"])
    @pytest.mark.parametrize("at", [2, 6])
    @pytest.mark.parametrize(
        "ema",
        [
            EMA("4ba", ema_start="4ba"),
            EMA("1ep"),
            EMA("0.3dur", update_interval="3ba"),
            EMA(smoothing=0.9, recompute_batchnorm=2),
        ],
        ids=["late", "epochs", "dur", "batch norm"],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_bit_equal(self, dtype, ema, at, inside):
        straight = start([ema], dtype=dtype)
        train(straight, 12, dtype)

        first = start([ema], dtype=dtype)
        train(first, at, dtype)
        if inside:
            with first.evaluation():
                file = saved_and_loaded(first)
        else:
            file = saved_and_loaded(first)
        second = start([ema], dtype=dtype)
        train(second, 1, dtype)  # whatever it held before must not matter
        second.model.load_state_dict(file["model"])
        second.optimizers[0].load_state_dict(file["optimizer"])
        second.load_state_dict(file["run"])
        assert second.progress.step == at
        assert_close(averages_of(second), averages_of(first), tol=0)
        train(second, 12 - at, dtype)

        for run in (first, second):
            if run is first:  # saving must not have changed the run that goes on
                train(run, 12 - at, dtype)
            for a, b in zip(
                run.model.state_dict().values(), straight.model.state_dict().values(), strict=True
            ):
                assert torch.equal(a, b)
            with run.evaluation(), straight.evaluation():
                for a, b in zip(
                    run.model.state_dict().values(),
                    straight.model.state_dict().values(),
                    strict=True,
                ):
                    assert torch.equal(a, b)

    def test_the_file_people_load_holds_the_average_once(self):
        """Saved inside evaluation, the model's file is the average, the run's file the rest."""
        run = start([EMA("4ba")])
        train(run, 5)
        with run.evaluation():
            file = saved_and_loaded(run)
        average = averages_of(run)
        assert_close(
            [file["model"][k].double() for k, _ in run.model.named_parameters()], average, 0
        )
        assert file["run"]["states"]["EMA"]["averages"] == {}
        assert file["run"]["training_weights"].keys() == dict(run.model.named_parameters()).keys()


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"half_life": "fast"}, r"EMA: half_life must be a number and a unit of dur"),
            ({"half_life": "0ba"}, r"EMA: half_life must be above 0 ba, ep or dur, got 0ba"),
            ({"half_life": "100sp"}, r"EMA: half_life must be above 0 ba, ep or dur, got 100sp"),
            ({"half_life": "2dur"}, r"EMA: half_life must be at most 1dur"),
            ({"smoothing": 1.0}, r"EMA: smoothing must be in \[0, 1\), got 1.0"),
            ({"smoothing": -0.1}, r"EMA: smoothing must be in \[0, 1\), got -0.1"),
            ({"smoothing": float("nan")}, r"EMA: smoothing must be in \[0, 1\), got nan"),
            ({"half_life": "5ba", "smoothing": 0.9}, r"EMA: half_life and smoothing say the same"),
            ({"ema_start": "later"}, r"EMA: ema_start must be a number and a unit"),
            ({"ema_start": "100sp"}, r"EMA: ema_start must be in ba, ep or dur, got 100sp"),
            ({"update_interval": "often"}, r"EMA: update_interval must be a number and a unit"),
            ({"update_interval": "0.5ep"}, r"update_interval must be a whole number of ba or ep"),
            ({"update_interval": "0ba"}, r"update_interval must be a whole number of ba or ep"),
            ({"update_interval": "1.5ba"}, r"update_interval must be a whole number of ba or ep"),
            ({"update_interval": "5sp"}, r"update_interval must be a whole number .* got '5sp'"),
            ({"recompute_batchnorm": -1}, r"EMA: recompute_batchnorm must be at least 0, got -1"),
        ],
        ids=str,
    )
    def test_errors(self, settings, message):
        with pytest.raises(ValueError, match=message):
            EMA(**settings)

    @pytest.mark.parametrize(
        "ema", [EMA("0.1dur"), EMA(ema_start="0.5dur"), EMA("1ep", update_interval="1ba")]
    )
    def test_a_length_that_is_needed_and_unknown_is_refused_before_the_first_step(self, ema):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=r"must be known for durations in dur or ep"):
            Run([ema], model=model, optimizer=optimizer)

    def test_defaults_need_no_length(self):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for ema in (EMA(), EMA("2ep"), EMA(smoothing=0.9)):
            Run([ema], model=model, optimizer=optimizer)


@pytest.mark.parametrize(
    ("algorithm", "warns"),
    [
        (EMA("11ba"), True),
        (EMA("10ba"), False),
        (EMA("3ep"), True),
        (EMA("2ep"), False),
        (EMA("1dur"), False),
        (EMA(smoothing=0.9999), False),  # said in so many words
    ],
    ids=repr,
)
def test_a_half_life_longer_than_the_run_is_warned_of(algorithm, warns):
    model = nn.Linear(2, 2)
    options = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    options |= {"total_steps": 10, "steps_per_epoch": 5}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        Run([algorithm], model=model, **options)
    assert len(seen) == warns
    assert all("is longer than the run of 10 steps" in str(w.message) for w in seen)
