"""LayerFreezing: what it freezes, that this stays where it is, and that backward is saved."""

import copy
import io
import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mosaic_core import Need, NoEffectWarning, Run, UnsupportedError
from mosaic_core.algorithms import EMA, SAM, GradientClipping, LayerFreezing, freeze_layers
from mosaic_core.loop import train_steps

STEPS = 8


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.Flatten(),
            nn.Linear(16, 8),
            nn.Linear(8, 3),
        )


LAYERS = ["0", "1", "3", "5", "6"]


def batch(index, rank=0):
    g = torch.Generator().manual_seed(10 * index + rank)
    return torch.randn(8, 1, 6, 6, generator=g), torch.randint(3, (8,), generator=g)


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)


OPTIMIZERS = pytest.mark.parametrize("optimizer", [sgd, adamw], ids=lambda f: f.__name__)


def start(recipe, model=None, optimizer=sgd, **options):
    model = network() if model is None else model
    options = {"total_steps": STEPS, **options}
    return Run(recipe, model=model, optimizer=optimizer(model.parameters()), **options)


def train(run, steps=STEPS, loss=cross_entropy, **options):
    accumulate = options.get("accumulate", 1)
    for step in range(run.progress.step, min(run.progress.step + steps, STEPS)):
        batches = [batch(step * accumulate + i) for i in range(accumulate)]
        train_steps(run, batches, loss, **options)
    return run


def by_hand(optimizer=sgd, freeze_start=0.0, freeze_level=1.0):
    """Train without the first layers, as many as are frozen; they are never in a step."""
    model = network()
    layers = [model.get_submodule(name) for name in LAYERS]
    update = optimizer(model.parameters())
    for step in range(STEPS):
        share = max(0.0, (step / STEPS - freeze_start) / (1 - freeze_start)) * freeze_level
        frozen = [p for layer in layers[: int(share * 4)] for p in layer.parameters()]
        update.zero_grad()
        cross_entropy(model, batch(step)).backward()
        kept = [p.detach().clone() for p in frozen]
        states = [copy.deepcopy(update.state[p]) for p in frozen]
        update.step()
        with torch.no_grad():
            for p, value, state in zip(frozen, kept, states, strict=True):
                p.copy_(value)
                update.state[p] = state
    return model, update


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def trained_now(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


class TestFunction:
    @pytest.mark.parametrize(
        ("duration", "settings", "expected"),
        [
            (0.0, {}, (0, 0.0)),
            (0.5, {}, (0, 0.0)),
            (0.6, {}, (0, 0.2)),
            (0.625, {}, (1, 0.25)),
            (0.75, {}, (2, 0.5)),
            (1.0, {}, (4, 1.0)),
            (1.0, {"freeze_level": 0.5}, (2, 0.5)),
            (0.5, {"freeze_start": 0.0}, (2, 0.5)),
            (0.5, {"freeze_start": 0.25, "freeze_level": 0.75}, (1, 0.25)),
            (1.0, {"freeze_level": 0.0}, (0, 0.0)),
        ],
    )
    def test_schedule(self, duration, settings, expected):
        model = network()
        depth, share = freeze_layers(model, sgd(model.parameters()), duration, **settings)
        assert (depth, pytest.approx(share)) == expected
        expected_names = [n for n, _ in model.named_parameters() if n[0] in LAYERS[depth:]]
        assert trained_now(model) == expected_names

    def test_the_last_layer_stays_and_gradients_go(self):
        model = network()
        cross_entropy(model, batch(0)).backward()
        optimizer = sgd(model.parameters())
        assert freeze_layers(model, [optimizer], 1.0) == (4, 1.0)
        assert [n for n, p in model.named_parameters() if p.grad is not None] == [
            "6.weight",
            "6.bias",
        ]
        assert len(optimizer.param_groups[0]["params"]) == 9  # it keeps them

    def test_modules_with_parameters_of_their_own_are_layers(self):
        """Also those that have children, which would else keep backward going below."""

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.token = nn.Parameter(torch.zeros(4))
                self.attention = nn.MultiheadAttention(4, 1)
                self.head = nn.Linear(4, 2)

            def forward(self, x):
                x = x + self.token
                return self.head(self.attention(x, x, x)[0])

        model = Net()
        assert freeze_layers(model, [], 0.5, 0.0) == (1, 0.5)  # of 4: the net, 2 x attention, head
        assert not model.token.requires_grad
        assert model.attention.in_proj_weight.requires_grad
        freeze_layers(model, [], 1.0)
        assert trained_now(model) == ["head.weight", "head.bias"]
        model(torch.randn(3, 2, 4)).sum().backward()
        assert all((p.grad is None) == (not p.requires_grad) for p in model.parameters())

    def test_a_shared_parameter_is_frozen_with_the_last_layer_that_has_it(self):
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 5))
        model[3].weight = model[0].weight
        model[2].weight = model[1].weight
        assert freeze_layers(model, [], 0.7, 0.0)[0] == 2
        assert trained_now(model) == ["0.weight", "1.weight", "2.bias", "3.bias"]
        assert freeze_layers(model, [], 1.0)[0] == 3
        assert trained_now(model) == ["0.weight", "3.bias"]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"freeze_start": 1.0}, r"freeze_start must be in \[0, 1\), got 1.0"),
            ({"freeze_start": -0.1}, r"freeze_start must be in \[0, 1\), got -0.1"),
            ({"freeze_level": 1.1}, r"freeze_level must be in \[0, 1\], got 1.1"),
            ({"freeze_level": math.nan}, r"freeze_level must be in \[0, 1\], got nan"),
        ],
    )
    def test_errors(self, arguments, words):
        with pytest.raises(ValueError, match=f"^freeze_layers: {words}"):
            freeze_layers(network(), [], 0.5, **arguments)
        with pytest.raises(ValueError, match=f"^LayerFreezing: {words}"):
            LayerFreezing(**arguments)

    @pytest.mark.parametrize("duration", [-0.1, 1.5, math.nan])
    def test_duration_out_of_range(self, duration):
        with pytest.raises(ValueError, match="current_duration must be in"):
            freeze_layers(network(), [], duration)


class TestOptimizers:
    def test_those_that_move_what_has_no_gradient_are_refused(self):
        model = network()
        optimizer = torch.optim.LBFGS(model.parameters())
        for refused in (
            lambda: freeze_layers(model, optimizer, 0.5),
            lambda: Run([LayerFreezing()], model=model, optimizer=optimizer, total_steps=4),
        ):
            with pytest.raises(UnsupportedError, match=r"LBFGS moves parameters .* such as SGD"):
                refused()

    @pytest.mark.parametrize(
        "name",
        [
            name
            for name, kind in vars(torch.optim).items()
            if isinstance(kind, type)
            and issubclass(kind, torch.optim.Optimizer)
            and name not in ("Optimizer", "SparseAdam")
        ],
    )
    def test_exactly_those(self, name):
        a, b = (nn.Parameter(torch.full((2, 2), value)) for value in (0.3, 0.7))
        settings = {"momentum": 0.9} if name in ("SGD", "RMSprop", "Muon") else {}
        optimizer = getattr(torch.optim, name)([a, b], lr=0.01, **settings)

        def closure():
            optimizer.zero_grad()
            loss = (a**4).sum() + ((b + 1) ** 4).sum() + (a * b).sum()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        b.requires_grad_(False)
        b.grad, kept = None, b.detach().clone()
        for _ in range(2):
            optimizer.step(closure)
        assert torch.equal(b, kept) == (name != "LBFGS")


class TestInARun:
    @OPTIMIZERS
    @pytest.mark.parametrize("settings", [(0.0, 1.0), (0.3, 1.0), (0.0, 0.6)], ids=str)
    def test_equals_steps_without_the_frozen_layers(self, optimizer, settings):
        run = train(start([LayerFreezing(*settings)], optimizer=optimizer))
        model, update = by_hand(optimizer, *settings)
        assert_equal(run.model.state_dict(), model.state_dict())
        for ours, theirs in zip(run.model.parameters(), model.parameters(), strict=True):
            states = run.optimizers[0].state[ours], update.state[theirs]
            assert_equal(*({k: torch.as_tensor(v) for k, v in s.items()} for s in states))

    def test_differs_from_plain_training(self):
        run, plain = train(start([LayerFreezing(0.0)])), train(start([]))
        assert not torch.equal(run.model[0].weight, plain.model[0].weight)

    def test_what_it_needs(self):
        assert LayerFreezing.needs() == {Need.BATCH, Need.GRADIENTS, Need.OPTIMIZER}

    def test_backward_ends_where_the_frozen_layers_begin(self):
        model, seen = network(), []
        run = start([LayerFreezing(0.0)], model)
        for i in (0, 1, 3, 5, 6):
            model[i].register_full_backward_hook(lambda m, *_, i=i: seen.append((len(reached), i)))
        reached = []

        def loss(model, batch):
            reached.append(0)
            return cross_entropy(model, batch)

        with warnings.catch_warnings():  # of the hooks: no input requires a gradient
            warnings.simplefilter("ignore")
            train(run, loss=loss)
        layers = [sorted(i for step, i in seen if step == s + 1) for s in range(STEPS)]
        assert layers == [
            *([[0, 1, 3, 5, 6]] * 2),
            *([[1, 3, 5, 6]] * 2),
            *([[3, 5, 6]] * 2),
            *([[5, 6]] * 2),
        ]

    def test_flags_are_as_the_user_set_them_between_steps(self):
        model = network()
        model[1].requires_grad_(False)
        run = start([LayerFreezing(0.0)], model)
        before, inside = trained_now(model), []

        def loss(model, batch):
            inside.append(trained_now(model))
            return cross_entropy(model, batch)

        for _ in range(STEPS):
            train(run, 1, loss)
            assert trained_now(model) == before
        assert inside[0] == before
        assert inside[-1] == ["5.weight", "5.bias", "6.weight", "6.bias"]
        assert inside[3] == [n for n in before if n[0] != "0"]
        assert not any(module._forward_hooks for module in model.modules())

    def test_the_last_layer_that_trains_goes_on_where_the_user_froze_the_rest(self):
        run = start([LayerFreezing(0.0)])
        for i in (3, 5, 6):
            run.model[i].requires_grad_(False)
        inside = []

        def loss(model, batch):
            inside.append(trained_now(model))
            return cross_entropy(model, batch)

        train(run, loss=loss)
        assert inside[-1] == inside[0] == ["0.weight", "1.weight", "1.bias"]
        run.start(run.optimizers, total_steps=1)
        run.on_batch(*batch(0))
        assert trained_now(run.model) == ["1.weight", "1.bias"]

    def test_batch_norm_statistics_of_frozen_layers_move(self):
        run = train(start([LayerFreezing(0.0)]), 6)
        before = copy.deepcopy(run.model[1].state_dict())
        train(run, 1)
        assert torch.equal(run.model[1].weight, before["weight"])
        assert not torch.equal(run.model[1].running_mean, before["running_mean"])

    def test_gradients_of_zero_do_not_move_frozen_layers(self):
        """As a loop leaves them with ``zero_grad(set_to_none=False)``."""
        run, model = start([LayerFreezing(0.0)]), by_hand()[0]
        for step in range(STEPS):
            run.optimizers[0].zero_grad(set_to_none=False)
            x, y = run.on_batch(*batch(step))
            cross_entropy(run.model, (x, y)).backward()
            run.step()
        assert_equal(run.model.state_dict(), model.state_dict())

    def test_a_second_backward_of_the_step_moves_nothing_frozen(self):
        """As where a module steps two optimizers, one after the other, with the same batch."""
        run = train(start([LayerFreezing(0.0)]), 5)
        before = copy.deepcopy(run.model.state_dict())
        data = run.on_batch(*batch(5))
        for _ in range(2):
            run.optimizers[0].zero_grad()
            cross_entropy(run.model, data).backward()
            run.on_gradients()
            run.optimizers[0].step()
        run.end_step()
        assert torch.equal(run.model[0].weight, before["0.weight"])
        assert torch.equal(run.model[1].weight, before["1.weight"])
        assert not torch.equal(run.model[3].weight, before["3.weight"])

    def test_what_the_user_freezes_between_steps_stays(self):
        run = train(start([LayerFreezing(0.0)]), 6)
        run.model[0].requires_grad_(False)
        train(run)
        assert [n for n, p in run.model.named_parameters() if not p.requires_grad] == ["0.weight"]
        assert not any("_mosaic_frozen" in vars(p) for p in run.model.parameters())

    def test_accumulation(self):
        """All micro-batches of a window freeze the same."""
        inside = []

        def loss(model, batch):
            inside.append(len(trained_now(model)))
            return cross_entropy(model, batch)

        train(start([LayerFreezing(0.0)]), loss=loss, accumulate=3)
        assert inside == [n for n in (9, 9, 8, 8, 6, 6, 4, 4) for _ in range(3)]

    def test_logs_how_many(self):
        run = train(start([LayerFreezing(0.0)]), 5)
        assert run.metrics["mosaic/LayerFreezing/layers_frozen"] == 2

    def test_the_length_of_the_run_must_be_known(self):
        with pytest.raises(ValueError, match="total_steps must be known"):
            start([LayerFreezing()], total_steps=None)

    def test_a_single_layer(self):
        with pytest.warns(NoEffectWarning, match="LayerFreezing: the model has no layer before"):
            run = start([LayerFreezing(0.0)], nn.Linear(2, 2))
        x, y = run.on_batch(torch.randn(4, 2), torch.randint(2, (4,)))
        cross_entropy(run.model, (x, y)).backward()
        run.step()

    def test_a_longer_run_thaws(self):
        """Going on with more steps, as a second fit does, begins where the schedule then is."""
        run = train(start([LayerFreezing(0.5)]))
        run.start(run.optimizers, total_steps=2 * STEPS)
        run.on_batch(*batch(0))
        assert len(trained_now(run.model)) == 9

    def test_reset_begins_with_nothing_frozen(self):
        run = train(start([LayerFreezing(0.0)]))
        run.reset()
        run.start([sgd(run.model.parameters())], total_steps=STEPS)
        run.on_batch(*batch(0))
        assert len(trained_now(run.model)) == 9

    @pytest.mark.parametrize("new", [False, True])
    def test_after_an_exception_inside_a_step(self, new):
        """A window that was given up leaves nothing frozen to the next, nor to a new run."""
        run = train(start([LayerFreezing(0.0)]), 5)
        run.model[1].requires_grad_(False)
        run.on_batch(*batch(5))
        assert trained_now(run.model) == [
            f"{i}.{kind}" for i in (3, 5, 6) for kind in ("weight", "bias")
        ]
        if new:
            run = start([LayerFreezing(0.0)], run.model)
        else:
            run.start(run.optimizers, total_steps=1000)
        run.on_batch(*batch(0))
        assert [n for n, p in run.model.named_parameters() if not p.requires_grad] == [
            "1.weight",
            "1.bias",
        ]

    def test_compiled(self):
        """Compiled anew at each freezing, to the same result."""
        expected = train(start([LayerFreezing(0.0)])).model.state_dict()
        run = start([LayerFreezing(0.0)])
        torch._dynamo.reset()
        compiled = torch.compile(run.model, backend="aot_eager", fullgraph=True)
        train(run, loss=lambda model, batch: cross_entropy(compiled, batch))
        for name, tensor in run.model.state_dict().items():
            torch.testing.assert_close(tensor, expected[name])


class TestResume:
    """A peer takes frozen parameters out of the optimizer, whose file then can't be loaded."""

    @OPTIMIZERS
    @pytest.mark.parametrize("at", [1, 3, 6, 7])
    def test_is_bit_equal(self, optimizer, at):
        straight = train(start([LayerFreezing(0.0)], optimizer=optimizer))
        run = train(start([LayerFreezing(0.0)], optimizer=optimizer), at)
        file = io.BytesIO()
        parts = run.model.state_dict(), run.optimizers[0].state_dict(), run.state_dict()
        torch.save(parts, file)
        file.seek(0)
        weights, state, progress = torch.load(file, weights_only=True)
        resumed = start([LayerFreezing(0.0)], network(1), optimizer=optimizer)
        resumed.model.load_state_dict(weights)
        resumed.optimizers[0].load_state_dict(state)
        resumed.load_state_dict(progress)
        train(resumed)
        assert_equal(resumed.model.state_dict(), straight.model.state_dict())
        ours, theirs = (r.optimizers[0].state_dict()["state"] for r in (resumed, straight))
        assert ours.keys() == theirs.keys() == set(range(9))

    def test_the_peers_way_fails(self):
        model = network()
        optimizer = sgd(model.parameters())
        cross_entropy(model, batch(0)).backward()
        optimizer.step()
        optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]
        with pytest.raises(KeyError):
            optimizer.state_dict()


class TestBesideOthers:
    def test_sam(self):
        """Frozen layers neither move uphill nor count in the norm."""
        run = train(start([LayerFreezing(0.0), SAM(0.5)]), 6)
        model = run.model
        before = copy.deepcopy(model.state_dict())
        moved = []

        def loss(model, batch):
            moved.append([n for n, p in model.named_parameters() if not torch.equal(p, before[n])])
            return cross_entropy(model, batch)

        train(run, 1, loss)
        assert moved == [[], ["5.weight", "5.bias", "6.weight", "6.bias"]]
        assert {n for n, p in model.named_parameters() if torch.equal(p, before[n])} == {
            *("0.weight", "1.weight", "1.bias", "3.weight", "3.bias")
        }

    def test_ema(self):
        """The average of a frozen layer goes on to its weights; training is the same."""
        run = train(start([LayerFreezing(0.0), EMA(smoothing=0.5)]))
        assert_equal(run.model.state_dict(), by_hand()[0].state_dict())
        first = run.model[0].weight.detach().clone()
        with run.evaluation():
            assert torch.isfinite(run.model[0].weight).all()
            assert not torch.equal(run.model[0].weight, first)
            torch.testing.assert_close(run.model[0].weight, first, rtol=0, atol=0.01)

    @pytest.mark.parametrize("swapped", [False, True])
    def test_clipping(self, swapped):
        """In either order: what is frozen has no norm."""
        recipe = [LayerFreezing(0.0), GradientClipping("norm", 0.1)]
        one, other = (train(start(r)) for r in (recipe, recipe[::-1]))
        assert_equal(one.model.state_dict(), other.model.state_dict())


class Nested(nn.Module):
    """Returns tensors inside other things, of which the loss takes one."""

    def __init__(self, kind):
        super().__init__()
        self.net, self.kind = network(), kind

    def forward(self, x):
        y = self.net(x)
        if self.kind == "dict":
            return {"logits": y, "others": (y.detach(), [y.mean()], "text", None)}
        return Opaque(y) if self.kind == "opaque" else y


class Opaque:
    def __init__(self, value):
        self.value = value


def logits_of(output):
    if isinstance(output, dict):
        return output["logits"]
    return output.value if isinstance(output, Opaque) else output


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone: DDP waits for its gradients all the same."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:find_unused_parameters=True was specified:UserWarning")
class TestDDP:
    OPTIONS = (
        {},
        {"gradient_as_bucket_view": True},
        {"find_unused_parameters": True},
        {"static_graph": True},
    )

    def train(self, recipe, kind="tensor", loss=None, **options):
        run = start(recipe, Nested(kind), world_size=2)
        wrapped = DistributedDataParallel(run.model, **options)
        default = lambda model, batch: F.cross_entropy(logits_of(wrapped(batch[0])), batch[1])  # noqa: E731  # short
        return train(run, loss=loss or default)

    @pytest.mark.parametrize("kind", ["tensor", "dict"])
    @pytest.mark.parametrize("options", OPTIONS, ids=lambda o: next(iter(o), "plain"))
    def test_equals_training_without_it(self, options, kind):
        run = self.train([LayerFreezing(0.0)], kind, **options)
        expected = by_hand()[0].state_dict()
        assert_equal(run.model.net.state_dict(), expected)
        assert not run.model._forward_hooks

    def test_two_passes(self):
        recipe = [LayerFreezing(0.0), SAM(0.1), GradientClipping("adaptive", 0.1)]
        run = self.train(recipe)
        assert_equal(run.model.net.state_dict(), train(start(recipe)).model.state_dict())

    def test_outputs_may_be_written_into(self):
        def loss(model, batch):
            output = wrapped(batch[0])
            output[:, 0] = 0.0
            return F.cross_entropy(output, batch[1])

        run = start([LayerFreezing(0.0)], world_size=2)
        wrapped = DistributedDataParallel(run.model)
        train(run, loss=loss)

    def test_without_it_ddp_raises(self):
        """Or what makes it safe would not be tested."""
        model = network()
        wrapped = DistributedDataParallel(model)
        freeze_layers(model, [], 0.7)
        cross_entropy(wrapped, batch(0)).backward()
        with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
            cross_entropy(wrapped, batch(1))

    def test_outputs_that_hide_their_tensors_are_refused(self):
        """In the first step, before anything is frozen and before the weights move."""
        with pytest.raises(UnsupportedError, match="in DDP the model must return a tensor"):
            self.train([LayerFreezing()], "opaque")

    def test_evaluation_is_left_alone(self):
        run = start([LayerFreezing(0.0)], world_size=2)
        wrapped = DistributedDataParallel(run.model)
        run.on_batch(*batch(0))
        with torch.no_grad():
            wrapped(batch(0)[0])
        cross_entropy(wrapped, batch(0)).backward()
        run.step()


def two_ranks(rank, path):
    """Train in one of two processes, and by hand on both halves of each batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    results = {}
    for name, options in (("plain", {}), ("view", {"gradient_as_bucket_view": True})):
        run = start([LayerFreezing(0.0)], optimizer=adamw, rank=rank, world_size=2)
        wrapped = DistributedDataParallel(run.model, **options)
        other = start([LayerFreezing(0.0)], optimizer=adamw, rank=rank, world_size=2)
        for step in range(STEPS):
            for micro in range(2):
                x, y = run.on_batch(*batch(2 * step + micro, rank))
                if micro == 0:
                    with wrapped.no_sync():
                        (cross_entropy(wrapped, (x, y)) / 2).backward()
                else:
                    (cross_entropy(wrapped, (x, y)) / 2).backward()
                other.on_batch(x, y)
                (cross_entropy(other.model, (x, y)) / 2).backward()
            for p in other.model.parameters():
                if p.grad is not None:
                    dist.all_reduce(p.grad)
                    p.grad /= 2
            for r in (run, other):
                r.step()
                r.optimizers[0].zero_grad()
        pairs = zip(run.model.parameters(), other.model.parameters(), strict=True)
        results[name] = max(float((a - b).detach().abs().max()) for a, b in pairs)
    torch.save(results, f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Accumulation without synchronisation, real reductions."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == {"plain": 0.0, "view": 0.0}


if __name__ == "__main__":
    two_ranks(int(sys.argv[1]), sys.argv[2])
