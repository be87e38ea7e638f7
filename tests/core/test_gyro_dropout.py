"""GyroDropout: few fixed masks, each at work for a part of the run."""

import copy

import pytest
import torch
from torch import nn

from mosaic_core import NoEffectWarning, Run
from mosaic_core.algorithms import GyroDropout, apply_gyro_dropout, gyro_dropout


def seed_of(number: int) -> torch.Tensor:
    return torch.tensor(number)


def masks(count: int, features: int = 64, **options) -> torch.Tensor:
    """Which activations each example of a batch keeps."""
    return gyro_dropout(torch.ones(count, features), **options) != 0


class TestFunction:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(6, 5), (6, 3, 4), (1, 7), (7, 2, 3, 4)])
    def test_what_is_kept_is_rescaled(self, shape, dtype):
        x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
        y = gyro_dropout(x, 0.5, sigma=4, tau=2, mask_seed=seed_of(1), pick_seed=seed_of(2))
        assert y.shape == x.shape
        assert y.dtype == dtype
        assert ((y == 0) | (y == 2 * x)).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_rounds_once(self, dtype):
        """The factor 1 / 0.9 is itself no bfloat16 number."""
        x = torch.randn(8, 99, dtype=dtype, generator=torch.Generator().manual_seed(0))
        y = gyro_dropout(x, 0.1)
        assert torch.equal(y[y != 0], (x.double() / 0.9).to(dtype)[y != 0])

    def test_a_batch_of_none(self):
        assert gyro_dropout(torch.ones(0, 4)).shape == (0, 4)

    @pytest.mark.parametrize("count", [1, 3, 8, 9])
    def test_examples_take_turns_with_the_masks_at_work(self, count):
        m = masks(count, sigma=64, tau=4, mask_seed=seed_of(1), pick_seed=seed_of(2))
        for i in range(count):
            assert torch.equal(m[i], m[i % 4])

    def test_there_are_no_more_masks_than_sigma(self):
        found = set()
        for pick in range(60):
            m = masks(4, sigma=5, tau=4, mask_seed=seed_of(3), pick_seed=seed_of(pick))
            found |= {tuple(row.tolist()) for row in m}
        assert len(found) == 5

    @pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.9])
    def test_p_is_the_probability_to_drop(self, p):
        m = masks(64, 4000, p=p, sigma=256, tau=64, mask_seed=seed_of(0), pick_seed=seed_of(0))
        kept = len(m.unique(dim=0)) * 4000  # draws; some masks may be at work twice
        share = m.unique(dim=0).double().mean()
        assert abs(share - (1 - p)) <= 4 * (p * (1 - p) / kept) ** 0.5

    def test_the_mean_over_masks_is_the_input(self):
        x, total = torch.linspace(-1, 1, 10).repeat(1, 1), torch.zeros(1, 10)
        for seed in range(4000):
            total += gyro_dropout(x, mask_seed=seed_of(seed), pick_seed=seed_of(0))
        assert ((total / 4000 - x).abs() <= 4.5 * x.abs() / 4000**0.5).all()

    def test_gradient_passes_where_the_input_does(self):
        x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        seeds = {"mask_seed": seed_of(1), "pick_seed": seed_of(2)}
        assert torch.autograd.gradcheck(lambda x: gyro_dropout(x, **seeds), x)

    def test_the_generator_draws_the_seeds(self):
        one, same, other = (
            masks(4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
        )
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"p": 1.0}, r"gyro_dropout: p must be in \[0, 1\), got 1.0"),
            ({"p": -0.1}, r"p must be in"),
            ({"tau": 0}, r"gyro_dropout: tau must be in \[1, sigma=256\], got 0"),
            ({"sigma": 8}, r"tau must be in \[1, sigma=8\], got 16"),
        ],
    )
    def test_bad_arguments(self, options, match):
        with pytest.raises(ValueError, match=match):
            gyro_dropout(torch.ones(2, 2), **options)
        with pytest.raises(ValueError, match=match.replace("gyro_dropout", "GyroDropout")):
            GyroDropout(**options)


def make_net() -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 20), nn.Dropout(0.1), nn.Linear(20, 3), nn.Dropout(0.2))


class TestSurgery:
    def test_dropout_is_replaced_in_place(self):
        model = make_net()
        before, keys = list(model.parameters()), list(model.state_dict())
        assert apply_gyro_dropout(model, sigma=8, tau=2) == ["1", "3"]
        assert list(model.state_dict()) == keys
        assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
        assert isinstance(model[1], nn.Dropout)
        assert model[1].p == 0.5
        y = model[1](torch.ones(4, 20))
        assert set(y.unique().tolist()) == {0.0, 2.0}

    def test_in_evaluation_it_is_the_identity(self):
        model, x = make_net().eval(), torch.randn(5, 6)
        expected = model(x)
        apply_gyro_dropout(model)
        assert torch.equal(model(x), expected)

    def test_twice_is_once(self):
        model = make_net()
        apply_gyro_dropout(model, sigma=8, tau=2)
        once = copy.deepcopy(model)
        assert apply_gyro_dropout(model, sigma=8, tau=2) == ["1", "3"]
        x = torch.randn(5, 6)
        assert torch.equal(model(x), once(x))

    def test_the_latest_settings_hold(self):
        """As for a second run of the same model."""
        model, other = make_net(), make_net()
        apply_gyro_dropout(model)
        apply_gyro_dropout(model, p=0.2, sigma=8, tau=2)
        apply_gyro_dropout(other, p=0.2, sigma=8, tau=2)
        x = torch.randn(5, 6)
        assert torch.equal(model(x), other(x))

    def test_only_plain_dropout_is_replaced(self):
        with pytest.warns(NoEffectWarning, match=r"apply_gyro_dropout: the model has no nn.Drop"):
            apply_gyro_dropout(nn.Sequential(nn.Dropout2d(), nn.AlphaDropout()))

    def test_it_compiles_to_one_graph(self):
        model = make_net()
        apply_gyro_dropout(model, sigma=8, tau=2)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        x = torch.randn(5, 6)
        assert torch.equal(compiled(x), model(x))
        model[1].pick_seed.fill_(12345)  # as a run does: no recompilation needed
        assert torch.equal(compiled(x), model(x))


def make_run(total_steps=8, sigma=8, tau=2, **options) -> Run:
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = [GyroDropout(sigma=sigma, tau=tau)]
    return Run(recipe, model=model, optimizer=optimizer, total_steps=total_steps, **options)


def masks_over(run: Run, steps: int, layer: int = 1) -> list[tuple]:
    found = []
    for _ in range(steps):
        run.on_batch(torch.ones(4, 6), torch.zeros(4, dtype=torch.int64))
        kept = run.model[layer](torch.ones(4, 40)) != 0
        found.append(tuple(map(tuple, kept.tolist())))
        run.end_step()
    return found


class TestRun:
    def test_masks_stay_for_a_period(self):
        """64 masks, 16 at work: 4 periods of 2 steps."""
        found = masks_over(make_run(sigma=64, tau=16), 8)
        assert found[0::2] == found[1::2]
        assert len(set(found)) == 4

    @pytest.mark.parametrize("total", [1, 3])
    def test_short_runs(self, total):
        """Fewer steps than periods: every step has masks of its own."""
        found = masks_over(make_run(total), total)
        assert len(set(found)) == total

    def test_all_masks_of_a_run_are_of_sigma(self):
        found = masks_over(make_run(400, sigma=6, tau=1), 400)
        assert len({row for rows in found for row in rows}) <= 6

    def test_micro_batches_of_a_step_work_with_the_same_masks(self):
        run = make_run()
        outputs = []
        for _ in range(2):
            run.on_batch(torch.ones(4, 6), torch.zeros(4, dtype=torch.int64))
            outputs.append(run.model[1](torch.ones(4, 40)))
        assert torch.equal(*outputs)

    def test_layers_and_ranks_differ_but_ranks_share_the_masks(self):
        assert masks_over(make_run(), 1, 1) != masks_over(make_run(), 1, 3)
        ranks = [masks_over(make_run(200, 6, 2, rank=r, world_size=2), 200) for r in (0, 1)]
        assert ranks[0] != ranks[1]
        assert len({row for found in ranks for rows in found for row in rows}) <= 6

    def test_a_resumed_run_finds_its_masks(self):
        straight = masks_over(make_run(), 8)
        run = make_run()
        first = masks_over(run, 3)
        resumed = make_run()
        resumed.load_state_dict(run.state_dict())
        assert first + masks_over(resumed, 5) == straight

    def test_a_run_of_unknown_length_is_refused(self):
        with pytest.raises(ValueError, match=r"total_steps must be known"):
            make_run(None)

    def test_the_report_names_the_layers(self):
        assert "GyroDropout drops in 1, 3" in str(make_run().report)
