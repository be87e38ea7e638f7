"""StochasticDepth against residual blocks whose branch is weighted by hand."""

import copy
import io
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from mosaic_core import ConflictError, NoEffectWarning, Run, UnsupportedError
from mosaic_core.algorithms import SAM, StochasticDepth, apply_stochastic_depth
from mosaic_core.parameters import ReplicatedParameters


class Block(nn.Module):
    """A pre-norm block, ``x + f(x)``, that counts how often it is computed."""

    def __init__(self, width=6, form=lambda y: y):
        super().__init__()
        self.branch = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width)
        )
        self.form, self.calls = form, 0

    def forward(self, x):
        self.calls += self.training
        return self.form(x + self.branch(x))


def blocks(count=3, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*(Block(**options) for _ in range(count)))


def small_resnet(kind=BasicBlock):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResNet(kind, [2, 2, 1, 1], num_classes=5)


def images(n=4):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 32, 32, generator=g), torch.randint(5, (n,), generator=g)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def decide(model, *dropped):
    """Drop these blocks, whatever their probability."""
    for module, drop in zip(stochastic(model), dropped, strict=True):
        module.mosaic_depth.draw(module.mosaic_depth.rate, 0 if drop else 2**63 - 1)


def stochastic(model):
    return [m for m in model.modules() if hasattr(m, "mosaic_depth")]


def rates(model):
    return [m.mosaic_depth.rate for m in stochastic(model)]


def gradients(model, x, y):
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def buffers(model):
    return copy.deepcopy(dict(model.named_buffers()))


def assert_equal(actual, expected, tolerance=0.0):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=tolerance, msg=name)


class TestValues:
    @pytest.mark.parametrize("dropped", [(False, True, False), (True, True, True), (False,) * 3])
    def test_block_method_is_the_sum_of_the_paper(self, dropped):
        model = blocks().double()
        x = draw(4, 6, dtype=torch.float64)
        expected = x
        for block, drop in zip(model, dropped, strict=True):
            expected = expected if drop else expected + block.branch(expected) / (1 - 0.3)
        apply_stochastic_depth(model, drop_rate=0.3, drop_distribution="uniform")
        decide(model, *dropped)
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
    @pytest.mark.parametrize("dropped", [False, True])
    def test_behind_a_relu_it_is_the_rectified_sum(self, kind, dropped):
        """Also its gradients: nothing of what the ReLU of the block clips is lost."""
        width = 8 * kind.expansion
        block = kind(width, 8).double()
        other = copy.deepcopy(block)
        norm = other.bn3 if kind is Bottleneck else other.bn2
        norm.register_forward_hook(lambda m, args, f: f * (0 if dropped else 1 / (1 - 0.6)))
        x = draw(2, width, 5, 5, dtype=torch.float64).relu()
        x, again = x.clone().requires_grad_(), x.clone().requires_grad_()
        model = nn.Sequential(block)
        apply_stochastic_depth(model, drop_rate=0.6)
        decide(model, dropped)
        y, expected = model(x), other(again)
        assert (expected == 0).any()
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        g = draw(*y.shape, dtype=torch.float64)
        y.backward(g)
        expected.backward(g)
        torch.testing.assert_close(x.grad, again.grad, rtol=1e-10, atol=1e-10)
        for p, q in zip(block.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("method", ["block", "sample"])
    def test_rate_1_is_the_identity_branch(self, method):
        model, x = blocks(), draw(4, 6)
        apply_stochastic_depth(model, None, method, 1.0, "uniform")
        assert torch.equal(model(x), x)

    @pytest.mark.parametrize("method", ["block", "sample"])
    def test_rate_0_is_the_plain_model(self, method):
        model, x = small_resnet(), images()
        expected, statistics = gradients(model, *x), buffers(model)
        model = small_resnet()
        apply_stochastic_depth(model, None, method, 0.0)
        assert_equal(gradients(model, *x), expected)
        assert_equal(buffers(model), statistics)

    @pytest.mark.parametrize("method", ["block", "sample"])
    def test_evaluation_is_the_plain_model(self, method):
        model, (x, _) = small_resnet().eval(), images()
        expected = model(x)
        apply_stochastic_depth(model, None, method, 0.9)
        assert torch.equal(model(x), expected)

    def test_sample_method_drops_examples(self):
        model = blocks(1)
        x = draw(64, 3, 6)
        full = model(x) - x
        apply_stochastic_depth(model, None, "sample", 0.4, "uniform")
        branch = model(x) - x
        dropped = (branch == 0).flatten(1).all(1)
        assert 10 < dropped.sum() < 42
        torch.testing.assert_close(branch[~dropped], full[~dropped] / 0.6, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("method", ["block", "sample"])
    def test_the_mean_over_draws_is_the_block(self, method):
        model, x, n = blocks(1).requires_grad_(False), draw(1, 6, dtype=torch.float64), 3000
        model.double()
        block = model(x)
        apply_stochastic_depth(model, None, method, 0.3)
        run = Run([], model=model)
        total = torch.zeros_like(x)
        for step in range(n):
            run.progress.step = step
            model[0].mosaic_depth.draw(0.3, run.seed_for(StochasticDepth()))
            total += model(x)
        deviation = (block - x).abs() * math.sqrt(0.3 / 0.7 / n)
        assert ((total / n - block).abs() <= 4 * deviation).all()

    def test_batch_of_one_and_ragged_batches(self):
        model = blocks(2)
        apply_stochastic_depth(model, None, "sample")
        assert model(draw(1, 6)).shape == (1, 6)
        assert model(draw(5, 2, 6)).shape == (5, 2, 6)
        assert model(draw(0, 6)).shape == (0, 6)


class TestRates:
    @pytest.mark.parametrize(
        ("distribution", "expected"),
        [("linear", [0.2, 0.4, 0.6, 0.8]), ("uniform", [0.8] * 4)],
    )
    def test_distribution_over_depth(self, distribution, expected):
        model = blocks(4)
        apply_stochastic_depth(model, drop_rate=0.8, drop_distribution=distribution)
        assert rates(model) == pytest.approx(expected)

    @pytest.mark.parametrize("rate", [0.2, 0.7])
    def test_frequency_in_a_run(self, rate):
        model = blocks(10)
        run = start(StochasticDepth("block", rate, "uniform"), model)
        dropped = []
        for _ in range(100):
            run.on_batch(draw(2, 6), torch.zeros(2))
            dropped += [m.mosaic_depth.dropped for m in model]
            run.end_step()
        error = abs(sum(dropped) / 1000 - rate)
        assert error < 4 * math.sqrt(rate * (1 - rate) / 1000)

    def test_frequency_without_a_run(self):
        model = blocks(1)
        apply_stochastic_depth(model, drop_rate=0.7)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for _ in range(200):
                model(draw(2, 6))
        assert abs(model[0].calls / 200 - 0.3) < 4 * math.sqrt(0.21 / 200)

    @pytest.mark.parametrize(
        ("warmup", "expected"),
        [
            (0.0, [1, 1, 1, 1]),
            (0.4, [0, 0.25, 0.5, 0.75, 1, 1]),
            ("0.4dur", [0, 0.25, 0.5, 0.75, 1, 1]),
            ("2ba", [0, 0.5, 1, 1]),
            ("1ep", [0, 0.2, 0.4, 0.6, 0.8, 1, 1]),
        ],
    )
    def test_warmup(self, warmup, expected):
        model = blocks(1)
        run = start(StochasticDepth("block", 0.5, drop_warmup=warmup), model)
        scales = []
        for _ in expected:
            run.on_batch(draw(2, 6), torch.zeros(2))
            scales.append(model[0].mosaic_depth.scale)
            run.end_step()
        assert scales == pytest.approx([1 / (1 - 0.5 * share) for share in expected])

    def test_a_warmup_this_run_cannot_tell_is_refused(self):
        model = blocks(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match="total_steps must be known"):
            Run([StochasticDepth(drop_warmup=0.1)], model=model, optimizer=optimizer)


class TestSkipping:
    def test_a_dropped_block_is_not_computed_and_gets_zeros(self):
        model, x = blocks(), draw(4, 6)
        apply_stochastic_depth(model, drop_rate=0.5, drop_distribution="uniform")
        decide(model, False, True, False)
        model(x).sum().backward()
        assert [m.calls for m in model] == [1, 0, 1]
        for block, zero in zip(model, (False, True, False), strict=True):
            assert all((p.grad == 0).all() == zero for p in block.parameters())

    @pytest.mark.parametrize("rate", [0.25, 0.5])  # one over 0.75 is rounded
    @pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
    def test_equals_weighting_by_zero(self, kind, rate):
        """As sharded and compiled models do: gradients, and no statistics of a dropped block."""
        x, results = images(), []
        for skips in (True, False):
            model = small_resnet(kind)
            names = apply_stochastic_depth(model, drop_rate=rate, drop_distribution="uniform")
            for module in stochastic(model):
                assert module.mosaic_depth.skips
                module.mosaic_depth.skips = skips
            decide(model, *(i % 2 == 0 for i in range(len(names))))
            results.append((gradients(model, *x), buffers(model)))
        (skipped, statistics), (weighted, same) = results
        assert_equal(weighted, skipped)
        assert_equal(same, statistics)
        untouched = [b for n, b in statistics.items() if n.startswith(f"{names[0]}.")]
        assert untouched
        assert all(b in (0, 1) for buffer in untouched for b in buffer.unique())

    def test_optimizers_decay_a_dropped_block(self):
        model = blocks(1)
        apply_stochastic_depth(model, drop_rate=1.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1.0)
        before = model[0].branch[1].weight.detach().clone()
        model(draw(2, 6)).sum().backward()
        optimizer.step()
        torch.testing.assert_close(model[0].branch[1].weight, 0.9 * before)

    def test_sharded_parameters_are_never_skipped(self):
        class Sharded:
            def __init__(self, view):
                self.start, self.fragments = view.start, view.fragments

        model = blocks(2)
        view = Sharded(ReplicatedParameters(model))
        run = Run([StochasticDepth("block", 1.0, "uniform")], model=model, parameters=view)
        run.start([torch.optim.SGD(model.parameters(), lr=0.1)])
        x, _ = run.on_batch(draw(2, 6), torch.zeros(2))
        assert torch.equal(model(x), x)
        assert [m.calls for m in model] == [1, 1]

    @pytest.mark.parametrize(
        "form",
        [lambda y: (y,), lambda y: (y, None), lambda y: (y, y.sum())],
        ids=["alone", "none", "more"],
    )
    def test_tuples_stay_tuples(self, form):
        model, x = nn.Sequential(Block(form=form)), draw(2, 6)
        apply_stochastic_depth(model, drop_rate=0.5)
        kept = None
        for dropped in (False, True):
            decide(model, dropped)
            output = model(x)
            assert type(output) is tuple
            if dropped:
                assert torch.equal(output[0], x)
                assert [type(o) for o in output] == [type(o) for o in kept]
            kept = output

    def test_an_input_by_name(self):
        model, x = blocks(1), draw(2, 6)
        apply_stochastic_depth(model, drop_rate=1.0)
        assert torch.equal(model[0](x=x), x)

    def test_an_input_by_name_behind_others(self):
        class Masked(Block):
            def forward(self, x, mask=None):
                return x + self.branch(x) * mask

        model = nn.ModuleList([Masked(), Masked()])
        for _ in range(2):  # a second application sees the class of the first
            with torch.no_grad():
                apply_stochastic_depth(model, "Masked", drop_rate=1.0)
        x = draw(2, 6)
        assert torch.equal(model[0](mask=torch.zeros(2, 1), x=x), x)

    def test_the_next_block_may_work_in_place(self):
        model = nn.Sequential(Block(), nn.ReLU(inplace=True))
        apply_stochastic_depth(model, drop_rate=1.0)
        x = draw(2, 6).requires_grad_()
        model(x * 1).sum().backward()
        assert torch.equal(x.grad, (x > 0).float())


class TestErrors:
    def test_settings(self):
        for make in (StochasticDepth, lambda **k: apply_stochastic_depth(blocks(1), **k)):
            with pytest.raises(ValueError, match="stochastic_method must be 'block' or 'sample'"):
                make(stochastic_method="layer")
            for rate in (-0.1, 1.1, float("nan")):
                with pytest.raises(ValueError, match=r"drop_rate must be in \[0, 1\], got"):
                    make(drop_rate=rate)
            with pytest.raises(ValueError, match="drop_distribution must be 'linear' or"):
                make(drop_distribution="normal")

    @pytest.mark.parametrize("warmup", [-0.1, 1.5, "soon", "10", float("nan")])
    def test_warmup(self, warmup):
        with pytest.raises(ValueError, match="StochasticDepth: drop_warmup must be"):
            StochasticDepth(drop_warmup=warmup)

    def test_warmup_in_samples(self):
        with pytest.raises(ValueError, match="drop_warmup must be in dur, ep or ba, got '10sp'"):
            StochasticDepth(drop_warmup="10sp")

    def test_nothing_found(self):
        with pytest.warns(NoEffectWarning, match="the model has no residual block; nothing"):
            assert apply_stochastic_depth(nn.Sequential(nn.Linear(2, 2))) == []
        with pytest.warns(NoEffectWarning, match="no residual block that matches 'layer9'"):
            assert apply_stochastic_depth(blocks(), "layer9") == []

    @pytest.mark.parametrize(
        ("name", "attribute"),
        [("DropPath", "drop_prob"), ("ViTDropPath", "drop_prob"), ("StochasticDepth", "p")],
    )
    def test_a_model_that_drops_branches_itself_is_refused(self, name, attribute):
        model = blocks(1)
        model[0].branch.append(type(name, (nn.Identity,), {})())
        for rate in (None, 0.0):
            setattr(model[0].branch[-1], attribute, rate)
            assert apply_stochastic_depth(model) == ["0"]
        setattr(model[0].branch[-1], attribute, 0.1)
        with pytest.raises(
            UnsupportedError, match=r"'0.branch.4' at the rate 0.1; make it without"
        ):
            Run([StochasticDepth()], model=model)

    def test_a_trusted_block_that_changes_the_shape(self):
        class Grows(nn.Module):
            def forward(self, x, other):
                return torch.cat([x, x])

        model = nn.Sequential(Grows())
        assert apply_stochastic_depth(model, "Grows") == ["0"]
        with pytest.raises(TypeError, match=r"keep the shape of its input, got \(2, 6\) and"):
            model[0](draw(2, 6), None)

    def test_two_passes_would_not_draw_alike(self):
        with pytest.raises(ConflictError, match="StochasticDepth can't be combined with SAM"):
            Run([StochasticDepth(), SAM()], model=blocks())


class TestSurgery:
    @pytest.mark.parametrize("method", ["block", "sample"])
    def test_parameters_names_and_classes_stay(self, method):
        model = small_resnet()
        parameters, keys = dict(model.named_parameters()), list(model.state_dict())
        held = dict(model.named_buffers())
        assert apply_stochastic_depth(model, None, method) == ["layer1.0", "layer1.1", "layer2.1"]
        assert list(model.state_dict()) == keys
        assert all(p is parameters[name] for name, p in model.named_parameters())
        assert all(b is held[name] for name, b in model.named_buffers())
        assert isinstance(model.layer1[0], BasicBlock)
        assert type(model.layer1[0]).__name__ == "BasicBlock"
        small_resnet().load_state_dict(model.state_dict())

    def test_idempotent(self):
        model = blocks()
        first = apply_stochastic_depth(model, drop_rate=0.6)
        kinds = [type(m) for m in model.modules()]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert apply_stochastic_depth(model, drop_rate=0.6) == first
        assert [type(m) for m in model.modules()] == kinds
        assert rates(model) == pytest.approx([0.2, 0.4, 0.6])

    def test_by_name_and_by_class(self):
        model = small_resnet()
        assert apply_stochastic_depth(model, "layer2.*") == ["layer2.1"]
        assert apply_stochastic_depth(model, "BasicBlock") == ["layer1.0", "layer1.1", "layer2.1"]

    @pytest.mark.parametrize("dropped", [False, True])
    def test_copies_and_files(self, dropped):
        model, x = small_resnet(), images()
        apply_stochastic_depth(model, drop_rate=0.5)
        decide(model, dropped, not dropped, dropped)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        others = [copy.deepcopy(model), torch.load(file, weights_only=False)]
        expected = gradients(model, *x)
        for other in others:
            assert_equal(gradients(other, *x), expected)
            assert other.layer1[0].mosaic_depth is not model.layer1[0].mosaic_depth

    @pytest.mark.parametrize("method", ["block", "sample"])
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing_recomputes_the_same(self, use_reentrant, method):
        model, x = blocks(4), draw(8, 6)
        run = start(StochasticDepth(method, 0.5, "uniform"), model)
        run.on_batch(x, torch.zeros(8))
        model(x).square().sum().backward()
        expected = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        y = checkpoint(model, x.requires_grad_(), use_reentrant=use_reentrant)
        y.square().sum().backward()
        assert_equal({n: p.grad for n, p in model.named_parameters()}, expected)

    @pytest.mark.parametrize("method", ["block", "sample"])
    def test_low_precision(self, method):
        model, x = small_resnet(), images()
        apply_stochastic_depth(model, None, method, 0.5)
        if method == "block":
            decide(model, False, True, False)
        dtypes = []
        model.layer1.register_forward_hook(lambda m, args, y: dtypes.append(y.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            assert all(torch.isfinite(g).all() for g in gradients(model, *x).values())
        model.bfloat16()(x[0].bfloat16())
        assert dtypes == [torch.bfloat16] * 2

    def test_channels_last(self):
        model, (x, _) = small_resnet().to(memory_format=torch.channels_last), images()
        apply_stochastic_depth(model, drop_rate=0.5)
        decide(model, True, False, True)
        seen = []
        for block in stochastic(model):
            block.register_forward_hook(
                lambda m, args, y: seen.append(y.is_contiguous(memory_format=torch.channels_last))
            )
        model(x.contiguous(memory_format=torch.channels_last))
        assert seen == [True] * 3

    @pytest.mark.parametrize("method", ["block", "sample"])
    def test_compiles_without_a_graph_break_and_once_for_all_draws(self, method):
        x, models = (
            images(),
            [
                nn.Sequential(*small_resnet().layer1, nn.AdaptiveAvgPool2d(1), nn.Flatten())
                for _ in range(2)
            ],
        )
        x = (draw(4, 64, 8, 8).relu(), x[1])
        algorithm = StochasticDepth(method, 0.5, "uniform", drop_warmup="4ba")
        runs = [start(algorithm, model) for model in models]
        torch._dynamo.reset()
        compiled = torch.compile(models[1], fullgraph=True, backend="aot_eager")
        torch._dynamo.utils.counters.clear()
        dropped = set()
        for _ in range(8):
            for run in runs:
                run.on_batch(*x)
            expected = gradients(models[0], *x)
            models[1].zero_grad()
            F.cross_entropy(compiled(x[0]), x[1]).backward()
            assert_equal({n: p.grad for n, p in models[1].named_parameters()}, expected, 1e-5)
            assert_equal(buffers(models[1]), buffers(models[0]), 1e-6)
            dropped.add(tuple(m.mosaic_depth.dropped for m in stochastic(models[0])))
            for run in runs:
                run.end_step()
        assert len(dropped) > 2 or method == "sample"
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def start(algorithm, model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = {"total_steps": 10, "steps_per_epoch": 5}
    return Run([algorithm], model=model, optimizer=optimizer, **steps, **options)


class TestInARun:
    def drawn(self, run):
        run.on_batch(draw(2, 6), torch.zeros(2))
        return [int(m.mosaic_depth.tensors[2]) for m in stochastic(run.model)]

    @pytest.mark.parametrize(("method", "shared"), [("block", True), ("sample", False)])
    def test_block_micro_batch_step_seed_and_for_samples_rank_draw_anew(self, method, shared):
        algorithm = StochasticDepth(method)
        run = start(algorithm, blocks(2))
        seen = [*self.drawn(run), *self.drawn(run)]
        run.end_step()
        seen += self.drawn(run)
        seen += self.drawn(start(algorithm, blocks(2), seed=1))
        assert len(set(seen)) == 8
        assert self.drawn(start(algorithm, blocks(2))) == seen[:2]
        other = self.drawn(start(algorithm, blocks(2), rank=1, world_size=2))
        assert (other == seen[:2]) == shared

    def test_draws_do_not_depend_on_where_the_model_stands(self):
        """A trainer may ask for the model inside a module of its own."""
        algorithm, inner = StochasticDepth(), blocks(2)
        wrapper = nn.Module()
        wrapper.net = blocks(2)
        assert self.drawn(start(algorithm, inner)) == self.drawn(start(algorithm, wrapper))

    def test_is_noted_and_needs_no_sentinel(self):
        run = start(StochasticDepth(), blocks(2))
        assert "StochasticDepth drops 0, 1" in str(run.report)
        assert not run.report.changes

    def test_dropout_is_left_alone(self):
        """What is drawn for the blocks comes from no global stream."""
        model, x = blocks(4), draw(8, 6)
        run = start(StochasticDepth("sample", 0.5), model)
        state = torch.get_rng_state()
        run.on_batch(x, torch.zeros(8))
        model(x)
        assert torch.equal(torch.get_rng_state(), state)


TINY = {
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


class TestTransformers:
    """Their whole training step, with and without dropped blocks."""

    def model(self, kind):
        hf = pytest.importorskip("transformers")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if kind == "bert":
                config = hf.BertConfig(
                    vocab_size=20, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **TINY
                )
                return hf.BertForSequenceClassification(config)
            if kind == "gpt2":
                options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
                config = hf.GPT2Config(vocab_size=20, n_embd=8, n_layer=3, n_head=2, **options)
                return hf.GPT2LMHeadModel(config)
            config = hf.ViTConfig(
                image_size=8,
                patch_size=4,
                num_channels=3,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                **TINY,
            )
            return hf.ViTForImageClassification(config)

    def loss(self, model, kind):
        g = torch.Generator().manual_seed(0)
        if kind == "vit":
            x = {"pixel_values": torch.randn(4, 3, 8, 8, generator=g)}
            return model(**x, labels=torch.tensor([0, 1, 0, 1])).loss
        ids = torch.randint(20, (4, 6), generator=g)
        labels = ids if kind == "gpt2" else torch.tensor([0, 1, 0, 1])
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss

    @pytest.mark.parametrize("kind", ["bert", "gpt2", "vit"])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_a_dropped_block_might_as_well_not_be_there(self, kind, checkpointing):
        model = self.model(kind).train()
        other = copy.deepcopy(model)
        assert len(apply_stochastic_depth(model, drop_rate=0.0)) == 3
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)()  # its name before transformers 5.20
        decide(model, False, True, False)
        held = next(m for m in other.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)
        dropped = list(held[1].parameters())
        del held[1]
        for i, block in enumerate(held):
            if kind == "gpt2":
                block.attn.layer_idx = i
        stochastic(model)[1].mosaic_depth.draw(1.0, 0)
        self.loss(model, kind).backward()
        self.loss(other, kind).backward()
        expected = {id(p): p.grad for p in other.parameters()}
        kept = [
            p
            for p in model.parameters()
            if not any(p is q for q in stochastic(model)[1].parameters())
        ]
        assert len(dropped) == len(list(model.parameters())) - len(kept)
        for p, grad in zip(kept, expected.values(), strict=True):
            torch.testing.assert_close(p.grad, grad)
        assert all((p.grad == 0).all() for p in stochastic(model)[1].parameters())
