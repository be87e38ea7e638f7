"""SelectiveBackprop: the hardest examples of a batch, by the trainer's own loss."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mosaic_core import Run, UnsupportedError, register_loss
from mosaic_core.algorithms import (
    LabelSmoothing,
    MixUp,
    SelectiveBackprop,
    select_using_loss,
    should_selective_backprop,
)
from mosaic_core.target import MixedTarget

ALWAYS = SelectiveBackprop(start=0.0, end=1.0, interrupt=0)


def make_net() -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))


def make_run(recipe, model=None, **options) -> Run:
    model = make_net() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Run(recipe, model=model, optimizer=optimizer, **{"total_steps": 10} | options)


def data(count: int = 8):
    g = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 2, 2, generator=g), torch.randint(5, (count,), generator=g)


def rows_of(part: torch.Tensor, whole: torch.Tensor) -> list[int]:
    """Find which rows of a batch were kept."""
    return [int((whole == row).flatten(1).all(1).nonzero().item()) for row in part]


class TestWhen:
    @pytest.mark.parametrize(
        ("duration", "step", "interrupt", "expected"),
        [
            (0.49, 0, 0, False),
            (0.5, 0, 0, True),
            (0.89, 7, 0, True),
            (0.9, 0, 0, False),
            (0.6, 0, 2, True),
            (0.6, 1, 2, False),
            (0.6, 2, 3, False),
            (0.6, 3, 3, True),
            (0.6, 5, 1, False),
        ],
    )
    def test_it_selects(self, duration, step, interrupt, expected):
        got = should_selective_backprop(duration, step, 0.5, 0.9, interrupt)
        assert got is expected

    def test_a_run_selects_in_its_middle(self):
        run, sizes = make_run([SelectiveBackprop(start=0.2, end=0.8, interrupt=3)]), []
        for _ in range(10):
            x, y = run.on_batch(*data())
            assert len(x) == len(y)
            sizes.append(len(x))
            F.cross_entropy(run.model(x), y).backward()
            run.step()
        assert sizes == [8, 8, 8, 4, 4, 8, 4, 4, 8, 8]

    def test_a_run_of_unknown_length_is_refused(self):
        with pytest.raises(ValueError, match=r"total_steps must be known"):
            make_run([ALWAYS], total_steps=None)


class TestFunction:
    @pytest.mark.parametrize(("count", "keep"), [(8, 0.5), (7, 0.5), (10, 0.33), (5, 1.0)])
    def test_it_keeps_a_share(self, count, keep):
        x, y = data(count)
        kept, labels = select_using_loss(x, y, make_net().eval(), F.cross_entropy, keep)
        assert len(kept) == len(labels) == int(keep * count)
        rows = rows_of(kept, x)
        assert rows == sorted(set(rows))  # none twice, and in their order
        assert torch.equal(labels, y[rows])

    def test_at_least_one_is_kept(self):
        x, y = data(1)
        assert len(select_using_loss(x, y, make_net().eval(), F.cross_entropy)[0]) == 1

    def test_hard_examples_are_preferred_as_the_percentile_says(self):
        """Of two examples with percentiles 1/4 and 3/4, the harder one in 3 of 4 draws."""
        x, y = torch.tensor([[3.0], [1.0]]), torch.zeros(2, 1)
        g = torch.Generator().manual_seed(0)
        hard = sum(
            select_using_loss(x, y, nn.Identity(), F.mse_loss, 0.5, generator=g)[0].item() == 3
            for _ in range(2000)
        )
        assert abs(hard / 2000 - 0.75) < 4 * (0.75 * 0.25 / 2000) ** 0.5

    def test_keeping_one_of_many_all_but_ignores_the_easy_half(self):
        """At keep = 1/8 the chance goes with the seventh power of the percentile."""
        x, y = torch.arange(16.0)[:, None], torch.zeros(16, 1)
        g = torch.Generator().manual_seed(0)
        kept = torch.cat(
            [
                select_using_loss(x, y, nn.Identity(), F.mse_loss, 0.125, generator=g)[0]
                for _ in range(300)
            ]
        )
        assert (kept < 8).double().mean() < 0.02

    def test_losses_of_an_example_are_averaged(self):
        """A segmentation: the image with the larger mean loss is the hard one."""
        x = torch.zeros(2, 3, 4, 4)
        x[0, 0], x[1, 1] = 5.0, 5.0  # the first image predicts class 0 everywhere, the other 1
        y = torch.ones(2, 4, 4, dtype=torch.int64)
        counts = [
            rows_of(select_using_loss(x, y, nn.Identity(), F.cross_entropy, generator=g)[0], x)[0]
            for g in [torch.Generator().manual_seed(s) for s in range(200)]
        ]
        assert 110 < counts.count(0) < 190

    def test_neither_buffers_nor_streams_move(self):
        model, (x, y) = make_net(), data()
        model.append(nn.Dropout(0.5))
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        stream = torch.get_rng_state()
        select_using_loss(x, y, model, F.cross_entropy, generator=torch.Generator())
        assert torch.equal(torch.get_rng_state(), stream)
        assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())

    def test_images_are_scaled_down_to_choose(self):
        seen = []

        def model(x):
            seen.append(x.shape)
            return x.mean((2, 3))

        class Model(nn.Module):
            forward = staticmethod(model)

        x, y = torch.randn(4, 5, 8, 8), torch.zeros(4, dtype=torch.int64)
        kept, _ = select_using_loss(x, y, Model(), F.cross_entropy, scale_factor=0.5)
        assert seen == [(4, 5, 4, 4)]
        assert kept.shape == (2, 5, 8, 8)

    def test_the_generator_decides(self):
        x, y = data(32)
        model = make_net().eval()

        def select(seed):
            g = torch.Generator().manual_seed(seed)
            return rows_of(select_using_loss(x, y, model, F.cross_entropy, generator=g)[0], x)

        assert select(0) == select(0)
        assert select(0) != select(1)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"keep": 0.0}, r"select_using_loss: keep must be in \(0, 1\], got 0.0"),
            ({"keep": 1.1}, r"keep must be in"),
            ({"scale_factor": 0.0}, r"select_using_loss: scale_factor must be in \(0, 1\]"),
        ],
    )
    def test_bad_arguments(self, options, match):
        with pytest.raises(ValueError, match=match):
            select_using_loss(*data(), make_net(), F.cross_entropy, **options)

    def test_lengths_must_agree(self):
        with pytest.raises(ValueError, match=r"target must have the length of input, 8, got 3"):
            select_using_loss(data()[0], torch.zeros(3), make_net(), F.cross_entropy)

    @pytest.mark.parametrize("shape", [(2, 3), (2, 3, 8, 1)])
    def test_only_images_can_be_scaled(self, shape):
        with pytest.raises(ValueError, match=r"select_using_loss: scale_factor below 1 needs"):
            select_using_loss(torch.ones(shape), torch.ones(2), nn.Identity(), F.mse_loss, 0.5, 0.5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep": 0.0}, r"SelectiveBackprop: keep must be in \(0, 1\], got 0.0"),
        ({"scale_factor": 2.0}, r"SelectiveBackprop: scale_factor must be in \(0, 1\], got 2.0"),
        ({"start": -0.1}, r"start and end must be in \[0, 1\] and in this order, got -0.1 and 0.9"),
        ({"start": 0.9, "end": 0.5}, r"start and end must be"),
        ({"end": 1.5}, r"start and end must be"),
        ({"interrupt": -1}, r"SelectiveBackprop: interrupt must be at least 0, got -1"),
    ],
)
def test_bad_settings(options, match):
    with pytest.raises(ValueError, match=match):
        SelectiveBackprop(**options)


def chosen(run: Run, batch=None) -> list[int]:
    batch = data(32) if batch is None else batch
    return rows_of(run.on_batch(*batch)[0], batch[0])


class TestLosses:
    """Whose loss it is that decides."""

    def test_batch_norm_moves_once(self):
        run, plain = make_run([ALWAYS]), make_net().train()
        x, y = run.on_batch(*data())
        F.cross_entropy(run.model(x), y)
        plain(x)
        for name, buffer in plain.named_buffers():
            assert torch.equal(run.model.get_buffer(name), buffer), name

    def test_cross_entropy_takes_the_place_of_a_loss_in_a_loop(self):
        model, seen = make_net(), []
        model.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
        rows = chosen(make_run([ALWAYS], model))
        losses = F.cross_entropy(seen[0], data(32)[1], reduction="none")
        assert losses[rows].mean() > losses.mean()

    def test_the_trainers_loss_decides_where_forward_computes_it(self):
        """It weighs class 0 alone, so examples of class 0 are the hard ones."""
        model, weight = make_net(), torch.tensor([1.0, 1e-6, 1e-6, 1e-6, 1e-6])

        def forward(batch):
            F.cross_entropy(model(batch[0]), batch[1], weight, label_smoothing=0.0)

        g = torch.Generator().manual_seed(0)
        x, y = torch.randn(64, 3, 2, 2, generator=g), torch.arange(64) % 8
        y[y > 4] = 4
        total = 0
        for seed in range(20):
            run = make_run([SelectiveBackprop(0.0, 1.0, 0.25)], model, seed=seed, forward=forward)
            total += int((y[chosen(run, (x, y))] == 0).sum())
        # 8 of 64 are of class 0 and 16 are kept; at random 2 of them would be.
        assert total / 20 > 5

    def test_ignored_labels_do_not_count(self):
        """Two images with the same loss at the labels that count are as hard as each other."""
        run = make_run([ALWAYS], nn.Conv2d(3, 3, 1))
        x, y = torch.randn(1, 3, 4, 4).repeat(2, 1, 1, 1), torch.zeros(2, 4, 4, dtype=torch.int64)
        y[1, :, 2:] = -100
        x[1, :, :, 2:] = 0
        x[0, :, :, 2:] = x[0, :, :, :2]
        x[1, :, :, :2] = x[0, :, :, :2]
        run.whole = (x, y)
        run.locator.read((x, y), "input"), run.locator.read((x, y), "target")
        from mosaic_core.example_losses import example_losses
        from mosaic_core.mixture import Mixture

        losses = example_losses(run, x, Mixture.of(y))
        torch.testing.assert_close(losses[0], losses[1])

    def test_tokens_are_grouped_by_example(self):
        """A language model flattens its tokens: the loss of a sequence is their mean."""
        model = nn.Embedding(7, 7)

        def forward(batch):
            ids, labels = batch
            F.cross_entropy(model(ids)[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1))

        ids = torch.randint(7, (8, 5), generator=torch.Generator().manual_seed(0))
        run = make_run([ALWAYS], model, forward=forward)
        x, y = run.on_batch(ids, ids)
        assert x.shape == y.shape == (4, 5)
        assert torch.equal(x, y)

    def test_a_loss_given_by_the_user_decides(self):
        @register_loss
        def doubled(output, target, reduction="mean"):
            return 2 * F.mse_loss(output, target, reduction=reduction)

        model = nn.Linear(4, 1)

        def forward(batch):
            doubled(model(batch[0]), batch[1])

        g = torch.Generator().manual_seed(0)
        x, y = torch.randn(32, 4, generator=g), torch.randn(32, 1, generator=g)
        rows = chosen(make_run([ALWAYS], model, forward=forward), (x, y))
        losses = (model(x) - y).square().flatten()
        assert len(rows) == 16
        assert losses[rows].mean() > losses.mean()

    def test_several_losses_add_up(self):
        model = nn.Linear(4, 2)

        def forward(batch):
            F.cross_entropy(model(batch[0]), batch[1])
            F.cross_entropy(2 * model(batch[0]), batch[1])

        x, y = torch.randn(8, 4), torch.randint(2, (8,))
        from mosaic_core.example_losses import example_losses
        from mosaic_core.mixture import Mixture

        run = make_run([ALWAYS], model, forward=forward)
        run.whole = (x, y)
        run.locator.read((x, y), "input"), run.locator.read((x, y), "target")
        expected = sum(F.cross_entropy(k * model(x), y, reduction="none") for k in (1, 2))
        torch.testing.assert_close(example_losses(run, x, Mixture.of(y)), expected.detach())

    def test_a_loss_that_is_not_known_is_refused(self):
        model = make_net()

        def forward(batch):
            return {"loss": (model(batch[0]) ** 2).mean()}

        for algorithm in (ALWAYS, SelectiveBackprop()):  # which would select from step 5 on
            with pytest.raises(UnsupportedError, match=r"forward computed no loss that mosaic kn"):
                make_run([algorithm], model, forward=forward).on_batch(*data())

    def test_it_is_tried_once_before_it_selects(self):
        model, calls = make_net(), []
        model.register_forward_hook(lambda *args: calls.append(run.progress.step))
        run = make_run([SelectiveBackprop(interrupt=0)], model)
        for _ in range(10):
            run.on_batch(*data())
            run.on_batch(*data())
            run.end_step()
        assert calls == [0, 5, 5, 6, 6, 7, 7, 8, 8]

    def test_targets_that_are_no_classes_are_refused_in_a_loop(self):
        x = data()[0]
        with pytest.raises(UnsupportedError, match=r"use F.cross_entropy, or make the loss known"):
            make_run([ALWAYS]).on_batch(x, torch.randn(8, 5))

    @pytest.mark.parametrize(
        ("model", "input", "label"),
        [
            (nn.Embedding(7, 7), torch.ones(8, 5).long(), torch.ones(8, 5).long()),  # of tokens
            (nn.Linear(12, 1), torch.ones(8, 12), torch.ones(8).long()),  # for a binary loss
        ],
        ids=["classes last", "one logit"],
    )
    def test_an_output_that_is_no_logits_of_the_labels_is_refused_in_a_loop(
        self, model, input, label
    ):
        with pytest.raises(UnsupportedError, match=r"give Run a forward that computes it"):
            make_run([ALWAYS], model).on_batch(input, label)

    def test_a_loss_that_mixes_examples_is_refused(self):
        model = make_net()

        def forward(batch):
            F.cross_entropy(model(batch[0])[:3], batch[1][:3])

        with pytest.raises(UnsupportedError, match=r"or one that mixes examples"):
            make_run([ALWAYS], model, forward=forward).on_batch(*data())

    def test_a_loss_without_single_examples_is_refused(self):
        @register_loss
        def whole(output, target):
            return (output - target).square().sum()

        model = nn.Linear(4, 1)

        def forward(batch):
            whole(model(batch[0]), batch[1])

        with pytest.raises(UnsupportedError, match=r'need reduction="none", which it does not'):
            make_run([ALWAYS], model, forward=forward).on_batch(torch.ones(4, 4), torch.ones(4, 1))


@dataclass
class Item:
    image: torch.Tensor
    label: torch.Tensor
    extra: object


class TestBatch:
    """What else lies in the batch goes along."""

    def test_every_tensor_with_a_row_for_each_example(self):
        x, y = data()
        batch = {
            "x": x,
            "labels": y,
            "index": torch.arange(8),
            "nested": [torch.arange(8) * 2, {"weights": torch.arange(8.0)}],
            "scale": torch.tensor(3.0),
            "classes": torch.arange(5),
            "names": "eight of them",
        }
        new = make_run([ALWAYS]).on_batch(batch)
        rows = new["index"].tolist()
        assert len(rows) == 4
        assert torch.equal(new["x"], x[rows])
        assert torch.equal(new["labels"], y[rows])
        assert new["nested"][0].tolist() == [2 * row for row in rows]
        assert new["nested"][1]["weights"].tolist() == rows
        assert new["scale"] is batch["scale"]
        assert new["classes"] is batch["classes"]
        assert new["names"] == "eight of them"
        assert len(batch["index"]) == len(batch["nested"][0]) == 8  # the user's stays

    def test_dataclasses(self):
        x, y = data()
        new = make_run([ALWAYS]).on_batch(Item(x, y, (torch.arange(8), "a")))
        rows = new.extra[0].tolist()
        assert torch.equal(new.image, x[rows])
        assert torch.equal(new.label, y[rows])

    def test_it_chooses_before_anything_is_mixed(self):
        recipe = [LabelSmoothing(0.1), MixUp(0.4), ALWAYS]
        alone, run = make_run([ALWAYS]), make_run(recipe)
        x, y = alone.on_batch(*data())
        mixed, target = run.on_batch(*data())
        assert isinstance(target, MixedTarget)
        assert torch.equal(target.mixture.label, y)
        assert mixed.shape == x.shape
        assert not torch.equal(mixed, x)
        assert type(y) is torch.Tensor

    def test_every_rank_and_micro_batch_chooses_for_itself(self):
        one, other = (make_run([ALWAYS], rank=rank, world_size=2) for rank in (0, 1))
        first, second = chosen(one), chosen(one)
        assert len({tuple(rows) for rows in (first, second, chosen(other))}) == 3
