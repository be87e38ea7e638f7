"""LAWA against means of the latest weights written out in float64, through files and offloading."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import swa_utils

from mosaic_core import ConflictError, Need, Recipe, Run
from mosaic_core.algorithms import EMA, LAWA, lawa_average
from mosaic_core.loop import train_steps
from mosaic_core.parameters import Fragment

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


def start(recipe, dtype=torch.float32, parameters=None, model=None):
    model = network(dtype) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = Run(recipe, model=model, parameters=parameters and parameters(model))
    run.start([optimizer])
    return run


def train(run, steps, dtype=torch.float32):
    """Train, and return the parameters after each step in float64."""
    seen = []
    for _ in range(steps):
        train_steps(run, [batch(run.progress.step, dtype)], loss)
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
    chosen = [seen[s - 1] for s in steps]
    return [torch.stack(weights).mean(0) for weights in zip(*chosen, strict=True)]


def assert_close(actual, expected, tol=1e-6):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tol, atol=tol)


def random_sets(count, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 2), "b": (), "c": (0,)}
    return [
        {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
        for _ in range(count)
    ]


class TestLawaAverage:
    @pytest.mark.parametrize("count", [1, 2, 5, 17])
    @pytest.mark.parametrize(
        "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
    )
    def test_formula(self, dtype, count):
        snapshots = random_sets(count, dtype)
        before = [{n: w.clone() for n, w in s.items()} for s in snapshots]
        found = lawa_average(snapshots)
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        for name in ("a", "b", "c"):
            expected = torch.stack([s[name].double() for s in snapshots]).mean(0)
            assert found[name].dtype == precise
            assert found[name].shape == expected.shape
            tol = 4 * count * torch.finfo(precise).eps
            torch.testing.assert_close(found[name].double(), expected, rtol=tol, atol=tol)
        for snapshot, old in zip(snapshots, before, strict=True):
            assert all(torch.equal(snapshot[n], old[n]) for n in old)

    def test_one_set_is_copied(self):
        (snapshot,) = random_sets(1)
        found = lawa_average([snapshot])
        assert torch.equal(found["a"], snapshot["a"])
        assert found["a"].data_ptr() != snapshot["a"].data_ptr()

    def test_names_are_matched_whatever_their_order(self):
        one, other = random_sets(2)
        mixed = dict(reversed(other.items()))
        assert torch.equal(lawa_average([one, mixed])["a"], lawa_average([one, other])["a"])

    def test_memory_format_stays(self):
        weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
        found = lawa_average([{"w": weight}, {"w": weight.contiguous()}])
        assert found["w"].is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found["w"], weight)

    def test_no_weights(self):
        assert lawa_average([{}, {}]) == {}

    def test_device(self):
        assert lawa_average(random_sets(2), "meta")["a"].device.type == "meta"

    def test_keeps_no_graph(self):
        model = nn.Linear(2, 2)
        sets = [dict(model.named_parameters())] * 2
        assert not lawa_average(sets)["weight"].requires_grad

    def test_errors(self):
        with pytest.raises(ValueError, match=r"snapshots must hold at least one set .*, got none"):
            lawa_average([])
        with pytest.raises(ValueError, match=r"lawa_average: snapshots must have the .*, got a, b"):
            lawa_average([{"a": torch.ones(1)}, {"b": torch.ones(1)}])
        with pytest.raises(
            TypeError, match=r"must be floating-point, got torch.int64 for 'num_batches_tracked'"
        ):
            lawa_average([nn.BatchNorm1d(1).state_dict()])


class TestWindow:
    @pytest.mark.parametrize(
        ("settings", "steps"),
        [
            ({}, [4, 8, 12, 16, 20]),
            ({"window": 2}, [16, 20]),
            ({"window": 1}, [20]),
            ({"window": 7}, [4, 8, 12, 16, 20]),
            ({"window": 3, "update_interval": "1ba"}, [18, 19, 20]),
            ({"window": 3, "update_interval": "3ba"}, [12, 15, 18]),
            ({"window": 2, "update_interval": "2ep"}, [8, 16]),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("offload", [False, True])
    def test_mean_of_a_run(self, settings, steps, offload):
        run = start([LAWA(**settings, offload=offload)])
        seen = train(run, 20)
        assert_close(averages_of(run), mean(seen, steps))

    def test_it_begins_with_the_first_copy(self):
        run = start([LAWA(update_interval="2ba")])
        seen = train(run, 1)
        with run.evaluation():
            assert not run.in_evaluation
        seen += train(run, 2)
        assert_close(averages_of(run), mean(seen, [2]), tol=0)
        seen += train(run, 1)
        assert_close(averages_of(run), mean(seen, [2, 4]))

    def test_no_rounding_adds_up(self):
        """The mean of a thousand steps is as close as that of the first few."""
        run = start([LAWA(window=3, update_interval="1ba")])
        train(run, 3)
        for i in range(1000):
            with torch.no_grad():
                for p in run.model.parameters():
                    p.fill_(1e6 if i % 2 else 0.1)
            run.end_step()
        seen = train(run, 3)
        assert_close(averages_of(run), mean(seen, [1, 2, 3]), tol=1e-6)

    @pytest.mark.parametrize("offload", [False, True])
    def test_memory_is_used_again(self, offload):
        """Once the window is full, a copy goes to where the oldest was."""
        run = start([LAWA(window=2, update_interval="1ba", offload=offload)])
        train(run, 2)
        held = run.state(run.recipe.algorithms[0]).snapshots
        before = {t.data_ptr() for s in held for t in s.values()}
        train(run, 3)
        assert {t.data_ptr() for s in held for t in s.values()} == before
        assert len(held) == 2
        assert {t.device.type for s in held for t in s.values()} == {"cpu"}

    def test_bfloat16_copies_are_exact_and_their_mean_precise(self):
        run = start([LAWA(window=3, update_interval="1ba")], dtype=torch.bfloat16)
        seen = train(run, 9, torch.bfloat16)
        lawa = run.recipe.algorithms[0]
        held = run.state(lawa).snapshots
        assert {t.dtype for s in held for t in s.values()} == {torch.bfloat16}
        found = lawa.evaluation_weights(run)
        assert {t.dtype for t in found.values()} == {torch.float32}
        assert_close([t.double() for t in found.values()], mean(seen, [7, 8, 9]))

    def test_training_is_not_disturbed(self):
        one, other = start([LAWA(window=2, update_interval="1ba")]), start([])
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


class Halved:
    """A view as of one rank of two: it owns the first half of each parameter."""

    def __init__(self, model):
        self.model = model

    def start(self):
        self.found = [
            Fragment(n, p, tuple(p.shape), 0, p.numel() // 2, p.data.view(-1)[: p.numel() // 2])
            for n, p in self.model.named_parameters()
        ]

    def fragments(self):
        return self.found

    def all_reduce(self, value):
        return value

    def publish(self):
        pass


class Nothing(Halved):
    """A view as of a rank that owns nothing."""

    def start(self):
        self.found = []


class TestSharded:
    def test_copies_are_of_what_a_rank_owns(self):
        run = start([LAWA(window=2, update_interval="1ba")], parameters=Halved)
        train(run, 4)
        state = run.state_dict()["states"]["LAWA"]["snapshots"]
        sizes = {n: p.numel() // 2 for n, p in run.model.named_parameters()}
        assert [{n: t.numel() for n, t in s.items()} for s in state] == [sizes, sizes]
        before = run.model[4].weight.detach().view(-1).clone()
        with run.evaluation():
            inside = run.model[4].weight.detach().view(-1)
            assert torch.equal(inside[96:], before[96:])
            assert not torch.equal(inside[:96], before[:96])

    @pytest.mark.parametrize("offload", [False, True])
    def test_a_rank_that_owns_nothing(self, offload):
        run = start([LAWA(2, "1ba", offload=offload)], parameters=Nothing)
        train(run, 4)
        with run.evaluation():
            assert run.in_evaluation


class TestBatchNorm:
    def test_recomputed_on_the_latest_batches(self):
        run = start([LAWA(window=3, update_interval="1ba", recompute_batchnorm=4)])
        train(run, 20)
        theirs = network()
        with run.evaluation():
            theirs.load_state_dict(run.model.state_dict())
            swa_utils.update_bn([batch(step)[0] for step in range(16, 20)], theirs)
            for a, b in zip(run.model.buffers(), theirs.buffers(), strict=True):
                assert torch.equal(a, b)


class TestResume:
    @pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside evaluation"])
    @pytest.mark.parametrize("at", [1, 3, 12])
    @pytest.mark.parametrize(
        "lawa", [LAWA(3, "2ba"), LAWA(3, "2ba", offload=True), LAWA(2)], ids=repr
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_bit_equal(self, dtype, lawa, at, inside):
        straight = start([lawa], dtype)
        train(straight, 16, dtype)
        first = start([lawa], dtype)
        train(first, at, dtype)
        file = io.BytesIO()
        if inside:
            first.enter_evaluation()
        state = [first.model.state_dict(), first.optimizers[0].state_dict(), first.state_dict()]
        torch.save(state, file)
        first.leave_evaluation()
        file.seek(0)
        model, optimizer, state = torch.load(file, weights_only=True)
        second = start([lawa], dtype)
        train(second, 5, dtype)  # whatever it held before must not matter
        second.model.load_state_dict(model)
        second.optimizers[0].load_state_dict(optimizer)
        second.load_state_dict(state)
        assert_close(averages_of(second), averages_of(first), tol=0)
        for run in (second, first):
            train(run, 16 - at, dtype)
            for a, b in zip(
                run.model.state_dict().values(), straight.model.state_dict().values(), strict=True
            ):
                assert torch.equal(a, b)
            assert_close(averages_of(run), averages_of(straight), tol=0)

    def test_offloading_changes_nothing(self):
        runs = [start([LAWA(3, "2ba", offload=offload)]) for offload in (False, True)]
        for run in runs:
            train(run, 9)
        assert_close(averages_of(runs[0]), averages_of(runs[1]), tol=0)


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"window": 0}, r"LAWA: window must be at least 1, got 0"),
            ({"update_interval": "0ba"}, r"LAWA: update_interval must be a whole number of ba or"),
            ({"update_interval": "1.5ep"}, r"LAWA: update_interval must be a whole number of ba"),
            ({"update_interval": "0.1dur"}, r"LAWA: update_interval must be a whole .* '0.1dur'"),
            ({"update_interval": "often"}, r"LAWA: update_interval must be a number and a unit of"),
            ({"recompute_batchnorm": -1}, r"LAWA: recompute_batchnorm must be at least 0, got -1"),
        ],
        ids=str,
    )
    def test_errors(self, settings, message):
        with pytest.raises(ValueError, match=message):
            LAWA(**settings)

    def test_excludes_other_averaging(self):
        with pytest.raises(ConflictError, match=r"can't be combined"):
            Recipe([LAWA(), EMA()])
        with pytest.raises(ConflictError, match=r"a callback: both would act on the same thing"):
            Recipe([LAWA()]).check({"trainer weight averaging": "a callback"})

    def test_needs_weights_alone(self):
        assert LAWA.needs() == {Need.WEIGHTS}
