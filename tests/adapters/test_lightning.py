"""Lightning against the plain loop: the same weights, and nothing left behind."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning_common import (
    STEPS,
    Batches,
    clone,
    difference,
    loader,
    module_class,
    recipe,
    train_lightning,
    train_plain,
    trainer,
)
from lightning_ddp import RECIPES, shard
from timed import check_trainer

from mosaic_core import Recipe, Run
from mosaic_core.algorithms import EMA, SAM, Backdrop, BlurPool, MixUp, NoOp
from mosaic_lightning import MosaicCallback
from mosaic_lightning._workload import train


def assert_same(lightning, plain, tolerance=1e-6):
    assert difference(lightning.weights, plain.weights) <= tolerance
    assert difference(lightning.averaged, plain.averaged) <= tolerance


def test_recipe_equals_plain_loop(pl):
    lightning, plain = train_lightning(pl, recipe()), train_plain(pl, recipe())
    assert_same(lightning, plain)
    assert difference(lightning.weights, lightning.averaged) > 1e-3  # they do differ
    assert difference(train_lightning(pl, recipe(), seed=4).weights, plain.weights) > 1e-3


def test_recomputed_batchnorm_equals_plain_loop(pl):
    algorithms = [EMA("10ba", recompute_batchnorm=4)]
    assert_same(train_lightning(pl, algorithms), train_plain(pl, algorithms))


def test_bf16_true_averages_in_float32(pl):
    result = train_lightning(pl, [EMA("10ba")], precision="bf16-true")
    average = result.callback.run.state(result.callback.recipe.algorithms[0]).averages
    assert {t.dtype for t in average.values()} == {torch.float32}
    assert {p.dtype for p in result.module.parameters()} == {torch.bfloat16}


def half(pl, scale):
    """Return the Trainer's options, and those of the plain loop, for float16 with a scaler."""
    scalers = [torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=4) for _ in range(2)]
    plugin = pl.plugins.precision.MixedPrecision("16-mixed", "cpu", scaler=scalers[0])
    lightning = {"plugins": [plugin], "precision": None}
    return lightning, {"autocast": torch.float16, "scaler": scalers[1]}


# torch says so where the very first step overflows, with a schedule and without mosaic alike.
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler:UserWarning")
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("algorithms", [recipe(), [*recipe(), SAM()]], ids=["one", "two"])
def test_fp16_with_a_scaler_that_overflows_first(pl, algorithms, accumulate):
    lightning, plain = half(pl, 2.0**22)
    result = train_lightning(
        pl, algorithms, batch_size=4, accumulate_grad_batches=accumulate, **lightning
    )
    expected = train_plain(pl, algorithms, batch_size=4, accumulate=accumulate, **plain)
    assert_same(result, expected)
    assert lightning["plugins"][0].scaler.get_scale() == plain["scaler"].get_scale()
    assert result.callback.run.progress.step == STEPS


def test_steps_that_the_scaler_skips_do_not_enter_the_average(pl):
    updates = []

    class Counted(EMA):
        def on_step_end(self, run):
            updates.append(run.progress.step)
            super().on_step_end(run)

    lightning, _ = half(pl, 2.0**22)
    train_lightning(pl, [Counted("10ba")], **lightning)
    assert updates[0] > 1  # the first ones overflowed
    assert updates[-1] == STEPS


# Two passes.


@pytest.mark.parametrize(
    ("lightning", "plain"),
    [
        ({}, {}),
        ({"accumulate_grad_batches": 4}, {"accumulate": 4}),
        ({"gradient_clip_val": 0.5}, {"clip_norm": 0.5}),
        ({"precision": "bf16-mixed"}, {"autocast": torch.bfloat16}),
    ],
    ids=["plain", "accumulation", "clipping", "bf16"],
)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_two_passes(pl, optimizer, lightning, plain):
    algorithms = [*recipe(), SAM()]
    options = {"batch_size": 4, "optimizer": optimizer}
    result = train_lightning(pl, algorithms, **options, **lightning)
    expected = train_plain(pl, algorithms, **options, **plain)
    assert_same(result, expected)
    counted = result.weights["net.1.num_batches_tracked"]  # batch norm moved once
    assert counted == STEPS * plain.get("accumulate", 1)
    once = train_plain(pl, recipe(), **options, **plain)
    assert difference(result.weights, once.weights) > 1e-3


def test_the_second_pass_leaves_no_trace_in_logs_and_metrics(pl):
    import torchmetrics

    class Module(module_class(pl)):
        def __init__(self):
            super().__init__()
            self.count = torchmetrics.SumMetric()
            self.logged = 0

        def training_step(self, batch, batch_idx):
            self.count.update(len(batch[0]))
            self.log("count", self.count, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    module = Module()
    fit = trainer(pl, [MosaicCallback([SAM()])], max_epochs=1, accumulate_grad_batches=2)
    fit.fit(module, loader())
    assert fit.callback_metrics["count"] == 160
    assert_nothing_shadowed(module)
    assert "training_step" not in vars(fit.strategy)


# Data.


def as_dict(batch):
    return {"id": "a", "pixel_values": batch[0], "labels": batch[1]}


@pytest.mark.parametrize("stage", ["module", "datamodule"])
def test_dict_batches_and_the_users_own_transfer_hook(pl, stage):
    class Hook:
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return {**batch, "pixel_values": batch["pixel_values"] * 2}

    class Module(*([Hook] if stage == "module" else []), module_class(pl)):
        def loss(self, batch):
            assert batch["id"] == "a"
            return F.cross_entropy(self.net(batch["pixel_values"]), batch["labels"])

        def validation_step(self, batch, batch_idx):
            self.loss(batch)

    class Data(*([Hook] if stage == "datamodule" else []), pl.LightningDataModule):
        def train_dataloader(self):
            return Batches(as_dict(batch) for batch in loader())

        val_dataloader = train_dataloader

    torch.manual_seed(0)
    module, callback = Module(), MosaicCallback(recipe(), seed=3)
    trainer(pl, [callback], max_steps=STEPS).fit(module, datamodule=Data())
    callback.run.leave_evaluation()
    assert callback.run.report.notes == ["batch: input at 'pixel_values', target at 'labels'"]

    torch.manual_seed(0)
    plain = module_class(pl)()
    reference = MosaicCallback(recipe(), seed=3)
    doubled = Batches((x * 2, y) for x, y in loader())
    trainer(pl, [reference], max_steps=STEPS).fit(plain, doubled)
    reference.run.leave_evaluation()
    assert difference(dict(module.named_parameters()), dict(plain.named_parameters())) == 0


def test_a_batch_without_a_target_says_what_to_set(pl):
    batches = Batches({"picture": x, "kind": y} for x, y in loader())
    callback = MosaicCallback([MixUp()])
    with pytest.raises(LookupError, match=r"picture: float32.*Set input_key") as error:
        trainer(pl, [callback], max_steps=1).fit(module_class(pl)(), batches)
    assert "dict(" in str(error.value)


def test_keys_as_getter_and_setter(pl):
    class Module(module_class(pl)):
        def loss(self, batch):
            return super().loss(batch["data"])

    def get(i):
        return lambda batch: batch["data"][i]

    def put(i):
        return lambda batch, value: {
            "data": tuple(value if j == i else old for j, old in enumerate(batch["data"]))
        }

    torch.manual_seed(0)
    module = Module()
    keys = {"input_key": (get(0), put(0)), "target_key": (get(1), put(1))}
    callback = MosaicCallback(recipe(), seed=3, **keys)
    trainer(pl, [callback], max_steps=STEPS).fit(module, Batches({"data": b} for b in loader()))
    callback.run.leave_evaluation()
    assert difference(clone(module.state_dict()), train_plain(pl, recipe()).weights) <= 1e-6


# The loss.


def test_a_loss_that_ignores_the_mixture_raises_before_the_weights_move(pl):
    class Module(module_class(pl)):
        def loss(self, batch):
            x, y = batch
            return -(F.one_hot(y, 5) * self.net(x).log_softmax(1)).sum(1).mean()

    module = Module()
    before = clone(dict(module.named_parameters()))
    callback = MosaicCallback([MixUp()])
    with pytest.raises(RuntimeError, match=r"ignored the mixed labels.*register_loss"):
        trainer(pl, [callback], max_steps=2).fit(module, loader())
    assert difference(dict(module.named_parameters()), before) == 0


def test_torchmetrics_in_the_training_step_sees_plain_labels(pl):
    import torchmetrics

    class Module(module_class(pl)):
        def __init__(self):
            super().__init__()
            self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=5)
            self.expected = []

        def training_step(self, batch, batch_idx):
            x, y = batch
            logits = self.net(x)
            self.accuracy(logits, y)
            self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
            if not self.training:  # batch-norm statistics are being recomputed
                return F.cross_entropy(logits, y)
            own = loader().dataset.tensors[1][batch_idx * 8 : batch_idx * 8 + 8]
            self.expected.append((logits.argmax(1) == own).float().mean())
            return F.cross_entropy(logits, y)

    torch.manual_seed(0)
    module = Module()
    algorithms = [*recipe()[1:], EMA("10ba", recompute_batchnorm=3)]
    callback = MosaicCallback(algorithms, seed=3)
    fit = trainer(pl, [callback], max_epochs=1, val_check_interval=5)
    fit.fit(module, loader(), loader())
    expected = torch.stack(module.expected).mean()
    assert fit.callback_metrics["accuracy"] == pytest.approx(expected.item(), abs=1e-6)


def test_a_compiled_module_trains_the_same(pl):
    torch.manual_seed(0)
    module = module_class(pl)()
    callback = MosaicCallback(recipe(), seed=3)
    module.net.compile(backend="aot_eager", fullgraph=True)
    trainer(pl, [callback], max_steps=STEPS).fit(module, loader())
    callback.run.leave_evaluation()
    plain = train_plain(pl, recipe())
    assert difference(clone(module.state_dict()), plain.weights) <= 1e-6


# Evaluation.


def test_validation_sees_plain_batches_and_averaged_weights(pl):
    class Watch(pl.Callback):
        def __init__(self):
            self.raw, self.averaged = [], []

        def on_train_batch_end(self, trainer, module, *_):
            self.raw.append(module.net[0].weight.detach().clone())
            state = callback.run.state(callback.recipe.algorithms[-1])
            self.averaged.append(state.averages["net.0.weight"].clone())

        def on_train_batch_start(self, trainer, module, *_):
            if self.raw:
                assert torch.equal(module.net[0].weight, self.raw[-1])

    module, watch = module_class(pl)(), Watch()
    callback = MosaicCallback(recipe())
    fit = trainer(pl, [callback, watch], max_epochs=2, num_sanity_val_steps=0)
    fit.fit(module, loader(), loader(32, 64))
    assert len(module.seen) == 4
    for i, (target, weight) in enumerate(module.seen):
        assert type(target) is torch.Tensor
        assert torch.equal(weight, watch.averaged[19 if i < 2 else 39])
    assert torch.equal(module.net[0].weight, watch.averaged[-1])

    before = clone(module.state_dict())
    for stage in (fit.validate, fit.test, fit.predict):
        stage(module, loader(32, 64), **({} if stage == fit.predict else {"verbose": False}))
    assert difference(clone(module.state_dict()), before) == 0


def test_evaluation_alone_needs_no_fit(pl):
    module = module_class(pl)()
    for stage in ("validate", "test", "predict"):
        callback = MosaicCallback(recipe())
        getattr(trainer(pl, [callback]), stage)(module, loader(32, 64))
        assert list(callback.run.report.changes) == ["BlurPool"]
    assert type(module.net[4]).__name__ == "BlurConv2d"


def test_an_average_by_epoch_is_validated_in_its_epoch(pl):
    module = module_class(pl)()
    callback = MosaicCallback([EMA("1ep")])
    fit = trainer(pl, [callback], max_epochs=1, num_sanity_val_steps=0)
    fit.fit(module, loader(), loader(32, 64))
    state = callback.run.state(callback.recipe.algorithms[0])
    assert torch.equal(module.seen[0][1], state.averages["net.0.weight"])


def test_a_second_fit_goes_on_from_the_training_weights(pl):
    torch.manual_seed(0)
    module, callback = module_class(pl)("adamw"), MosaicCallback([EMA("1ba")])
    fit = trainer(pl, [callback], max_steps=5)
    fit.fit(module, loader())
    raw = clone(callback.run.state_dict()["training_weights"])
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, module, *_):
            seen.append(clone(dict(module.named_parameters())))

    trainer(pl, [callback, Watch()], max_steps=1).fit(module, loader())
    assert difference(seen[0], raw) == 0

    with torch.no_grad():  # weights loaded by the user win over the training weights
        module.net[0].weight.fill_(0.5)
    trainer(pl, [callback, Watch()], max_steps=1).fit(module, loader())
    assert (seen[-1]["net.0.weight"] == 0.5).all()


def test_a_second_fit_comes_after_the_first_in_the_run(pl):
    module, callback, fractions = module_class(pl)(), MosaicCallback([NoOp()]), []

    class Watch(pl.Callback):
        def on_train_batch_start(self, *_):
            fractions.append(callback.run.progress.fraction)

    for _ in range(2):
        trainer(pl, [callback, Watch()], max_steps=4).fit(module, loader())
    assert fractions == [0, 0.25, 0.5, 0.75, 0.5, 0.625, 0.75, 0.875]


# Checkpoints.


def saver(pl, path, **options):
    return pl.callbacks.ModelCheckpoint(path, "{step}", save_top_k=-1, **options)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("at", [7, 20])
def test_resume_is_bit_equal(pl, tmp_path, optimizer, at):
    algorithms = [*recipe(), Backdrop("net.4")]

    def fit(callbacks=(), ckpt_path=None):
        torch.manual_seed(0)
        module = module_class(pl)(optimizer)
        callback = MosaicCallback(algorithms, seed=3)
        run = trainer(
            pl, [callback, *callbacks], max_steps=30, enable_checkpointing=bool(callbacks)
        )
        run.fit(module, Batches(loader()), loader(32, 64), ckpt_path=ckpt_path)
        return clone(module.state_dict()), clone(callback.run.state_dict()["training_weights"])

    whole = fit([saver(pl, tmp_path, every_n_train_steps=at)])
    resumed = fit(ckpt_path=tmp_path / f"step={at}.ckpt")
    for a, b in zip(whole, resumed, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_hold_the_averaged_weights(pl, tmp_path, weights_only):
    module, callback = module_class(pl)(), MosaicCallback(recipe())
    save = saver(pl, tmp_path, every_n_train_steps=10, save_weights_only=weights_only)
    fit = trainer(pl, [save, callback], max_steps=20, enable_checkpointing=True)
    fit.fit(module, loader())
    checkpoint = torch.load(tmp_path / "step=20.ckpt", weights_only=True)
    for name, parameter in module.named_parameters():  # averaged after the fit
        assert torch.equal(checkpoint["state_dict"][name], parameter)
    assert ("run" in checkpoint["mosaic"]) is not weights_only

    # Without the recipe, strict loading fails and says why; with it, it works.
    with pytest.raises(RuntimeError, match=r"changed by BlurPool.*MosaicCallback"):
        module_class(pl).load_from_checkpoint(tmp_path / "step=20.ckpt", weights_only=False)
    with pytest.raises(RuntimeError, match="changed by BlurPool"):
        trainer(pl).test(module_class(pl)(), loader(32, 64), ckpt_path=tmp_path / "step=20.ckpt")
    with_recipe = trainer(pl, [MosaicCallback(recipe())])
    fresh = module_class(pl)()
    with_recipe.test(fresh, loader(32, 64), ckpt_path=tmp_path / "step=20.ckpt", verbose=False)
    assert difference(clone(fresh.state_dict()), clone(module.state_dict())) == 0

    from mosaic_lightning import load_from_checkpoint

    loaded = load_from_checkpoint(module_class(pl), tmp_path / "step=20.ckpt", optimizer="adamw")
    assert loaded.hparams.optimizer == "adamw"
    assert type(loaded.net[4]).__name__ == "BlurConv2d"
    module.eval()
    x = loader(32).dataset.tensors[0]
    assert torch.equal(loaded.eval().net(x), module.net(x))


def test_a_checkpoint_saved_after_the_fit_is_the_averaged_one(pl, tmp_path):
    result = train_lightning(pl, recipe())
    result.callback.run.enter_evaluation()
    result.trainer.save_checkpoint(tmp_path / "end.ckpt")
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert difference(checkpoint["state_dict"], result.averaged) == 0
    raw = checkpoint["mosaic"]["run"]["training_weights"]
    assert difference(raw, {name: result.weights[name] for name in raw}) == 0


def test_weights_that_the_module_keeps_out_of_the_file_stay_out(pl, tmp_path):
    class Module(module_class(pl)):
        def on_save_checkpoint(self, checkpoint):
            del checkpoint["state_dict"]["net.0.weight"]

    save = saver(pl, tmp_path, every_n_train_steps=5, save_weights_only=True)
    callback = MosaicCallback([EMA("4ba")])
    trainer(pl, [callback, save], max_steps=5, enable_checkpointing=True).fit(Module(), loader())
    assert "net.0.weight" not in torch.load(tmp_path / "step=5.ckpt")["state_dict"]


def test_a_run_goes_on_only_with_its_own_recipe(pl, tmp_path):
    save = saver(pl, tmp_path, every_n_train_steps=5)
    first = trainer(pl, [MosaicCallback(recipe()), save], max_steps=5, enable_checkpointing=True)
    first.fit(module_class(pl)(), loader())
    other = trainer(pl, [MosaicCallback([BlurPool(), MixUp(0.3)])], max_steps=9)
    with pytest.raises(RuntimeError, match="must go on with the recipe and seed it began with"):
        other.fit(module_class(pl)(), loader(), ckpt_path=tmp_path / "step=5.ckpt")


def test_a_checkpoint_without_mosaic_can_be_gone_on_from(pl, tmp_path):
    save = saver(pl, tmp_path, every_n_train_steps=5)
    trainer(pl, [save], max_steps=5, enable_checkpointing=True).fit(module_class(pl)(), loader())
    callback = MosaicCallback(recipe())
    on = trainer(pl, [callback], max_steps=9)
    on.fit(module_class(pl)(), loader(), ckpt_path=tmp_path / "step=5.ckpt")
    assert callback.run.progress.step == 9


# What is refused.


def refused(pl, match, callbacks=None, module=None, **options):
    module = module_class(pl)() if module is None else module
    before = clone(dict(module.named_parameters()))
    with pytest.raises((RuntimeError, ValueError), match=match):  # noqa: PT012  # whichever it is
        fit = trainer(pl, callbacks or [MosaicCallback(recipe())], max_steps=2, **options)
        fit.fit(module, loader())
    assert difference(dict(module.named_parameters()), before) == 0
    assert_nothing_shadowed(module)


def test_two_callbacks_are_refused(pl):
    two = [MosaicCallback([MixUp()]), MosaicCallback([EMA()])]
    refused(pl, "takes one MosaicCallback.*one recipe", two)


def test_dataloader_iter_is_refused(pl):
    class Module(module_class(pl)):
        def training_step(self, dataloader_iter):
            return self.loss(next(dataloader_iter)[0])

    refused(pl, r"dataloader_iter.*batch, batch_idx", module=Module())


def test_lightnings_own_averaging_beside_ours_is_refused(pl):
    own = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.1)
    refused(
        pl,
        "EMA can't be combined with the callback StochasticWeightAveraging",
        [MosaicCallback([EMA()]), own],
    )


def test_two_pass_algorithms_need_automatic_optimisation(pl):
    module = module_class(pl)()
    module.automatic_optimization = False
    match = "SAM runs a training step another time.*automatic_optimization = True"
    refused(pl, match, [MosaicCallback([SAM()])], module)


@pytest.mark.parametrize("algorithm", [NoOp(), SAM()], ids=lambda a: a.name)
def test_gradients_that_only_the_optimizer_unscales_are_refused(pl, algorithm):
    class Module(module_class(pl)):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), fused=True)

    match = r"acts on gradients.*fused=False"
    refused(pl, match, [MosaicCallback([algorithm])], Module(), **half(pl, 2.0)[0])


@pytest.mark.slow
def test_spawned_processes_are_refused(pl):
    script = (
        "import importlib, sys; sys.path.insert(0, sys.argv[1])\n"
        "from lightning_common import *\n"
        "if __name__ == '__main__':\n"
        f"    pl = importlib.import_module('{pl.__name__}')\n"
        "    fit = trainer(pl, [MosaicCallback(recipe())], strategy='ddp_fork', devices=2,"
        " max_steps=1)\n"
        "    fit.fit(module_class(pl)(), loader())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    assert 'use strategy="ddp"' in done.stderr


def test_an_unknown_strategy_is_refused(pl):
    class Own(pl.strategies.SingleDeviceStrategy):
        pass

    refused(pl, r"Own is not supported.*one device", strategy=Own(torch.device("cpu")))


# What is left behind.


def assert_nothing_shadowed(module):
    own = {"configure_model", "on_save_checkpoint", "on_after_batch_transfer", "optimizer_step"}
    assert not (own | {"log", "log_dict"}) & vars(module).keys()


@pytest.mark.parametrize("exception", [None, ValueError("mine"), KeyboardInterrupt()])
def test_nothing_patched_remains(pl, exception):
    class Module(module_class(pl)):
        def validation_step(self, batch, batch_idx):
            if exception is not None and self.global_step:
                raise exception

    module, callback = Module(), MosaicCallback(recipe())
    raw = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            raw.append(clone(dict(module.named_parameters())))

    fit = trainer(pl, [callback, Watch()], max_epochs=1)
    if exception is None:
        fit.fit(module, loader(), loader())
    else:
        with pytest.raises((ValueError, SystemExit)):
            fit.fit(module, loader(), loader())
        # The training weights are back, although validation held the averaged ones.
        assert difference(dict(module.named_parameters()), raw[-1]) == 0
    assert_nothing_shadowed(module)
    for optimizer in fit.optimizers:
        assert not optimizer._optimizer_step_post_hooks


def test_an_attribute_of_the_user_is_put_back(pl):
    module = module_class(pl)()
    calls = []
    own = lambda checkpoint: calls.append(checkpoint)  # noqa: E731  # an instance attribute
    module.on_save_checkpoint = own
    trainer(pl, [MosaicCallback(recipe())], max_steps=2).fit(module, loader())
    assert module.on_save_checkpoint is own


# Other ways to train.


def test_manual_optimisation_with_two_optimizers(pl):
    class Module(module_class(pl)):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            self.manual_backward(self.net[0].weight.square().mean())  # a loss without labels
            first.step()
            first.zero_grad()
            second.zero_grad()
            self.manual_backward(self.loss(batch))
            second.step()
            second.zero_grad()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net.parameters(), lr=lr) for lr in (0.01, 0.1)]

    module, callback = Module(), MosaicCallback(recipe())
    trainer(pl, [callback], max_steps=20).fit(module, loader())
    assert callback.run.progress.step == 10  # one a batch, where Lightning counts two


def test_skipped_batches(pl):
    class Module(module_class(pl)):
        def on_train_batch_start(self, batch, batch_idx):
            return None if batch_idx < 3 else -1

        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    callback = MosaicCallback([MixUp(), EMA("1ep")])
    trainer(pl, [callback], max_epochs=2).fit(Module(), loader())
    assert callback.run.progress.epoch == 2


def test_learning_rate_finder_leaves_the_run_fresh(pl, tmp_path):
    class Module(module_class(pl)):
        def __init__(self):
            super().__init__()
            self.lr = 0.1

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    torch.manual_seed(0)
    module, callback = Module(), MosaicCallback(recipe())
    before = clone(dict(module.named_parameters()))
    fit = trainer(pl, [callback], max_steps=10, default_root_dir=tmp_path)
    tuner = importlib_tuner(pl)(fit)
    tuner.lr_find(module, loader(), num_training=10, update_attr=False)
    assert difference(dict(module.named_parameters()), before) == 0
    fit.fit(module, loader())
    assert callback.run.progress.step == 10


def importlib_tuner(pl):
    import importlib

    return importlib.import_module(f"{pl.__name__}.tuner").Tuner


def test_values_reach_the_logger(pl, tmp_path):
    logger = pl.loggers.CSVLogger(tmp_path)
    callback = MosaicCallback(recipe())
    trainer(pl, [callback], max_steps=10, logger=logger, log_every_n_steps=5).fit(
        module_class(pl)(), loader()
    )
    text = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "mosaic/MixUp/mixing" in text.splitlines()[0]
    assert "train_loss" in text.splitlines()[0]
    assert len(logger.experiment.metrics_keys) >= 3


@pytest.mark.parametrize("setting", ["alpha", "alfa"])
def test_a_recipe_from_the_configuration_of_lightning_cli(
    pl, setting, tmp_path, capsys, monkeypatch
):
    # Lightning calls jsonargparse by names that this is about to drop.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    cli = pytest.importorskip(f"{pl.__name__}.cli")

    class Module(module_class(pl)):
        def train_dataloader(self):
            return loader()

    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    algorithms = [{"class_path": "mosaic_core.algorithms.MixUp", "init_args": {setting: 0.4}}]
    callback = {
        "class_path": "mosaic_lightning.MosaicCallback",
        "init_args": {"recipe": algorithms},
    }
    options = {"accelerator": "cpu", "max_steps": 2, **dict.fromkeys(quiet, False)}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.dump({"trainer": {**options, "callbacks": [callback]}}))
    arguments = ["fit", "--config", str(config)]
    if setting == "alfa":  # a typo is no silent no-op
        with pytest.raises(SystemExit):
            cli.LightningCLI(Module, save_config_callback=None, args=arguments)
        assert "alfa" in capsys.readouterr().err
        return
    fitted = cli.LightningCLI(Module, save_config_callback=None, args=arguments).trainer
    (run,) = [c.run for c in fitted.callbacks if isinstance(c, MosaicCallback)]
    assert run.recipe == Recipe([MixUp(0.4)])
    assert run.progress.step == 2


# Two processes.


@pytest.mark.slow
def test_ddp_equals_a_hand_averaged_loop(pl, tmp_path):
    script = Path(__file__).parent / "lightning_ddp.py"
    source = script.read_text().replace("pytorch_lightning", pl.__name__)
    copy = tmp_path / "lightning_ddp.py"
    copy.write_text(source)
    path = os.pathsep.join([str(script.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(
        [sys.executable, str(copy), str(tmp_path / "result")],
        env=environment,
        timeout=300,
        check=True,
    )
    ranks = [torch.load(tmp_path / f"result.{rank}") for rank in (0, 1)]
    for name, algorithms in RECIPES.items():
        expected = hand_averaged(pl, algorithms)
        for kind in ("weights", "averaged"):
            assert difference(ranks[0][name][kind], ranks[1][name][kind]) == 0
            assert difference(ranks[0][name][kind], expected[kind]) <= 1e-6


def hand_averaged(pl, algorithms, accumulate=2):
    """Train two replicas side by side and average their gradients by hand."""
    replicas = []
    for rank in (0, 1):
        torch.manual_seed(0)
        module = module_class(pl)().train()
        configured = module.configure_optimizers()
        optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
        options = {"total_steps": STEPS, "seed": 3, "rank": rank, "world_size": 2}
        run = Run(algorithms, model=module, optimizer=optimizer, **options)
        replicas.append((run, module, optimizer, scheduler))
    two_pass = [a for a in algorithms if isinstance(a, SAM)]
    streams = [itertools.cycle(shard(rank)) for rank in (0, 1)]

    def backward(windows):
        for (_, module, _, _), window in zip(replicas, windows, strict=True):
            module.zero_grad()
            for batch in window:
                (module.loss(batch) / accumulate).backward()
        for pair in zip(*(module.parameters() for _, module, _, _ in replicas), strict=True):
            mean = (pair[0].grad + pair[1].grad) / 2
            for parameter in pair:
                parameter.grad.copy_(mean)

    for _ in range(STEPS):
        windows = [
            [run.on_batch(next(stream)) for _ in range(accumulate)]
            for (run, _, _, _), stream in zip(replicas, streams, strict=True)
        ]
        backward(windows)
        for algorithm in two_pass:
            for run, _, _, _ in replicas:
                algorithm.on_first_pass(run)
            backward(windows)
            for run, _, _, _ in replicas:
                algorithm.on_second_pass(run)
        for run, _, optimizer, scheduler in replicas:
            run.on_gradients()
            optimizer.step()
            scheduler.step()
            run.end_step()
    run, module, _, _ = replicas[0]
    weights = clone(dict(module.named_parameters()))
    run.enter_evaluation()
    return {"weights": weights, "averaged": clone(dict(module.named_parameters()))}


def test_time_is_told_apart_by_phases():
    check_trainer(train)
