"""What is particular to the Trainer with DeepSpeed: ``hf_deepspeed_checks.py ANSWER [NAME...]``.

As with DeepSpeed alone, nothing of it runs inside pytest: every check is a function, and the
process writes which of them failed, and how.
"""

import contextlib
import dataclasses
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers as hf
from deepspeed_common import environment, gathered
from hf_common import Data, clone, difference, make, trainer
from launched import main
from safetensors.torch import load_file

from mosaic_core import Algorithm, Place, UnsupportedError
from mosaic_core.algorithms import EMA, SAM, BlurPool, LabelSmoothing, MixUp, NoOp
from mosaic_core.surgery import is_sentinel
from mosaic_hf import MosaicCallback

RECIPE = (BlurPool(), MixUp(0.4), LabelSmoothing(0.1), SAM(), EMA("4ba"))
TEXT = (LabelSmoothing(0.1), SAM(), EMA("4ba"))
STEPWISE = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
# Two groups that differ in decay, a schedule, clipping and windows.
ADAMW = {
    "optim": "adamw_torch",
    "weight_decay": 0.1,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 0.5,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
}
ONE, TWO = {}, {}


def check(*checks):
    """Register a check for one process, for two, or for both."""

    def register(function):
        for where in checks or (ONE,):
            where[function.__name__] = function
        return function

    return register


def folder():
    found = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(found)
    return Path(found[0])


def settings(stage, gather=True, **options):
    zero = {
        "stage": stage,
        "stage3_param_persistence_threshold": 100,
        "stage3_gather_16bit_weights_on_model_save": gather,
        **options.pop("zero", {}),
    }
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {**dict.fromkeys(auto, "auto"), "zero_optimization": zero, **options}


def engine_trainer(
    name, algorithms, path, stage=2, *, callbacks=(), model=None, ds=None, **options
):
    """Return a Trainer with DeepSpeed and the callback, None where there are no algorithms."""
    callback = None if algorithms is None else MosaicCallback(algorithms, seed=3)
    own = [] if callback is None else [callback]
    model = make(name) if model is None else model
    ds = settings(stage) if ds is None else ds
    return trainer(model, Data(name), path, [*own, *callbacks], deepspeed=ds, **options), callback


def weights(t, callback):
    """Return the training weights and those that a user finds in the model."""
    left = gathered(t.model)
    callback.run.leave_evaluation()
    return gathered(t.model), left


class Averages(hf.TrainerCallback):
    """Notes the averaged weights after each step, and those that are evaluated."""

    def __init__(self):
        self.after, self.evaluated, self.callback = {}, {}, None

    def on_step_end(self, args, state, control, **kwargs):
        ema = self.callback.recipe.algorithms[-1]
        self.after[state.global_step] = clone(self.callback.run.state(ema).averages)

    def on_prediction_step(self, args, state, control, model=None, **kwargs):
        assert not model.training
        self.evaluated[state.global_step] = gathered(model)


def averaging(name, stage, path, algorithms=RECIPE, **options):
    seen = Averages()
    objects = {"eval_dataset": Data(name, 8, seed=1), **options.pop("objects", {})}
    extra = options.pop("callbacks", ())
    t, seen.callback = engine_trainer(
        name, algorithms, path, stage, callbacks=[seen, *extra], objects=objects, **options
    )
    t.train()
    return t, seen


def same(a, b):
    assert difference({name: a[name] for name in b}, b) == 0


# Equal to the Trainer without DeepSpeed.


@check(TWO)
def groups_schedules_clipping_and_items_are_those_of_the_trainer():
    options = {**ADAMW, "logging_steps": 1}
    callback = MosaicCallback(TEXT, seed=3)
    t = trainer(make("llama"), Data("llama"), folder(), [callback], ddp_backend="gloo", **options)
    t.train()
    raw, left = weights(t, callback)
    logged = [entry for entry in t.state.log_history if "loss" in entry]
    for stage in (1, 3):
        t, callback = engine_trainer("llama", TEXT, folder(), stage, **options)
        t.train()
        again = [entry for entry in t.state.log_history if "loss" in entry]
        for key in ("loss", "learning_rate", "mosaic/SAM/grad_norm"):
            assert [e[key] for e in again] == pytest.approx([e[key] for e in logged], rel=1e-5), key
        ours = weights(t, callback)
        groups = t.deepspeed.basic_optimizer.param_groups
        assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
        found = difference(ours[0], raw), difference(ours[1], left)
        print(stage, found, file=sys.stderr)
        assert max(found) <= 1e-6, (stage, found)


@check()
def an_optimizer_and_a_schedule_of_the_configuration():
    params = {"lr": "auto", "weight_decay": "auto", "torch_adam": True}
    adamw = {"optimizer": {"type": "AdamW", "params": params}}
    linear = {"lr_scheduler_type": "linear", "learning_rate": 1e-3}
    t, callback = engine_trainer("resnet", RECIPE, folder(), ds=settings(2, **adamw), **linear)
    t.train()
    expected, other = engine_trainer("resnet", RECIPE, folder(), optim="adamw_torch", **linear)
    expected.train()
    for a, b in zip(weights(t, callback), weights(expected, other), strict=True):
        assert difference(a, b) <= 1e-6, difference(a, b)

    warmup = {"type": "WarmupLR", "params": {"warmup_num_steps": "auto", "warmup_max_lr": "auto"}}
    found = []
    for algorithms in (None, [NoOp(), EMA("2ba")]):  # which leave the training weights alone
        ds = settings(2, scheduler=warmup, **adamw)
        t, callback = engine_trainer("resnet", algorithms, folder(), ds=ds, warmup_steps=4)
        t.train()
        found.append(gathered(t.model) if callback is None else weights(t, callback)[0])
    same(*found)


@check()
def a_model_partitioned_by_from_pretrained():
    path = folder()
    make("vit").save_pretrained(path)
    t, callback = engine_trainer("vit", RECIPE[1:], folder(), 3)
    t.train()
    expected = weights(t, callback)
    config = settings(3)
    args = hf.TrainingArguments(str(path), use_cpu=True, deepspeed=config, report_to="none")
    model = hf.ViTForImageClassification.from_pretrained(path)
    assert hasattr(next(model.parameters()), "ds_id")
    with pytest.raises(UnsupportedError, match=r"BlurPool changes.*zero.Init.*make the model befo"):
        hf.Trainer(model, args, callbacks=[MosaicCallback(RECIPE)])
    t, callback = engine_trainer("vit", RECIPE[1:], folder(), 3, model=model, ds=config)
    t.train()
    for a, b in zip(weights(t, callback), expected, strict=True):
        assert difference(a, b) == 0


@check()
def a_model_that_model_init_makes():
    expected, callback = engine_trainer("resnet", RECIPE, folder())
    expected.train()
    left = weights(expected, callback)[1]
    callback = MosaicCallback(RECIPE, seed=3)
    options = {"deepspeed": settings(2)}
    t = trainer(lambda: make("resnet"), Data("resnet"), folder(), [callback], **options)
    t.train()
    same(gathered(t.model), left)


# Evaluation and checkpoints.


@check(ONE, TWO)
def evaluations_and_saved_models_hold_the_averaged_weights():
    class Own(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:  # with training weights in the engine
                t = self.trainer
                t.evaluate()
                t.save_model(str(self.path))

    for stage in (2, 3):
        path, own = folder(), Own()
        own.path = path / "own"
        seen = Averages()
        objects = {"eval_dataset": Data("resnet", 8, seed=1)}
        t, seen.callback = engine_trainer(
            "resnet", RECIPE, path, stage, callbacks=[seen, own], objects=objects, **STEPWISE
        )
        own.trainer = t
        t.train()
        assert sorted(seen.evaluated) == [2, 3, 4, 6]
        same(gathered(t.model), {n: seen.evaluated[6][n] for n, _ in t.model.named_parameters()})
        names = dict(t.model.named_parameters())
        for step, evaluated in seen.evaluated.items():
            file = own.path if step == 3 else path / f"checkpoint-{step}"
            saved = load_file(file / "model.safetensors")
            same(saved, {name: evaluated[name] for name in names})
            assert any(is_sentinel(name) for name in saved)
            assert not (file / "mosaic.pt").exists()
            if torch.distributed.get_world_size() == 1:
                same(evaluated, seen.after[step])


@check()
def zero_3_that_gathers_nothing_saves_partitions_of_the_average():
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    path = folder()
    options = {"save_strategy": "steps", "save_steps": 3, "ds": settings(3, gather=False)}
    seen = averaging("resnet", 3, path, **options)[1]
    assert not (path / "checkpoint-6" / "model.safetensors").exists()
    saved = get_fp32_state_dict_from_zero_checkpoint(str(path / "checkpoint-6"))
    same(saved, seen.after[6])


@check()
def batch_norm_statistics_of_the_average_are_recomputed():
    algorithms = [*RECIPE[1:4], EMA("4ba", recompute_batchnorm=3)]
    callback = MosaicCallback(algorithms, seed=3)
    t = trainer(make("resnet"), Data("resnet"), folder(), [callback], ddp_backend="gloo")
    t.train()
    left = clone(t.model.state_dict())
    for stage in (2, 3):
        path, saving = folder(), {"save_strategy": "steps", "save_steps": 6}
        t, _ = engine_trainer("resnet", algorithms, path, stage, **saving)
        t.train()
        ours = gathered(t.model)
        assert difference(ours, left) <= 1e-6, difference(ours, left)
        same(load_file(path / "checkpoint-6" / "model.safetensors"), ours)


@check()
def the_best_model_is_an_averaged_one():
    def order(prediction):
        return {"order": next(values)}

    for stage in (2, 3):
        values = iter([3.0, 1.0, 2.0])
        options = {"load_best_model_at_end": True, "metric_for_best_model": "order"}
        objects = {"compute_metrics": order}
        t, seen = averaging(
            "resnet",
            stage,
            folder(),
            objects=objects,
            greater_is_better=False,
            **options,
            **STEPWISE,
        )
        assert t.state.best_global_step == 4
        same(gathered(t.model), seen.after[4])


@check(ONE, TWO)
def resuming_is_bit_equal():
    def train(stage, path, resume=None):
        t, callback = engine_trainer(
            "bert",
            TEXT,
            path,
            stage,
            model=make("bert", dropout=0.1),
            train_sampling_strategy="random",
            save_strategy="steps",
            save_steps=at,
            **{**ADAMW, "max_steps": 8},
        )
        t.train(resume_from_checkpoint=resume)
        progress = vars(callback.run.progress).copy()
        return weights(t, callback), progress

    for stage, at in ((2, 3), (3, 4)):
        path = folder()
        whole, progress = train(stage, path)
        resumed, again = train(stage, folder(), str(path / f"checkpoint-{at}"))
        assert progress == again
        for a, b in zip(whole, resumed, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)


@check()
def a_run_goes_on_only_with_its_own_recipe():
    path, saving = folder(), {"save_strategy": "steps", "save_steps": 3}
    engine_trainer("vit", [MixUp(0.2)], path, **saving)[0].train()
    t, _ = engine_trainer("vit", [MixUp(0.3)], folder())
    with pytest.raises(UnsupportedError, match="must go on with the recipe and seed it began with"):
        t.train(resume_from_checkpoint=str(path / "checkpoint-3"))
    nothing_shadowed(t)


@check()
def a_checkpoint_without_mosaic_can_be_gone_on_from():
    path, saving = folder(), {"save_strategy": "steps", "save_steps": 10}
    engine_trainer("vit", None, path, max_steps=10, **saving)[0].train()
    t, callback = engine_trainer("vit", [MixUp(0.2), EMA("2ba")], folder(), max_steps=18)
    t.train(resume_from_checkpoint=str(path / "checkpoint-10"))
    assert callback.run.progress.step == 18
    assert callback.run.progress.epoch == 2  # of eight steps each


# What is left behind.


def nothing_shadowed(t):
    if t.deepspeed is not None:  # refused as it was made
        own = vars(t.deepspeed).keys()
        assert not {"mosaic", "backward", "step", "save_checkpoint", "load_checkpoint"} & own
    assert not {"prepare", "unscale_gradients"} & vars(t.accelerator).keys()
    shadows = {"_inner_training_loop", "training_step", "_prepare_inputs", "evaluate", "save_model"}
    assert not shadows & vars(t).keys()


@check()
def nothing_remains_after_an_exception():
    def act(self, *args, **kwargs):
        raise self.error

    objects = {"eval_dataset": Data("resnet", 4)}
    options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "objects": objects}
    for event, error in (
        ("on_train_begin", ValueError("mine")),
        ("on_step_end", KeyboardInterrupt()),
        ("on_evaluate", ValueError("mine")),
        ("on_train_end", KeyboardInterrupt()),
    ):
        raises = type("Raises", (hf.TrainerCallback,), {event: act})()
        raises.error = error
        t, callback = engine_trainer("resnet", RECIPE, folder(), callbacks=[raises], **options)
        with pytest.raises(type(error)):
            t.train()
        nothing_shadowed(t)
        assert not callback.run.in_evaluation


# What is refused.


@contextlib.contextmanager
def refused(match):
    with pytest.raises(UnsupportedError, match=match):
        yield


@check()
def what_is_not_exact_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Groups(Algorithm):
        place = Place.GRADIENTS

        def prepare_optimizer(self, optimizer, run):
            pass

    with refused(r"Groups needs optimizer.*adapter for DeepSpeed does not deliver"):
        engine_trainer("vit", [Groups()], folder())
    optimizer = torch.optim.SGD(make("vit").parameters(), lr=0.1)
    with refused(r"ignores optimizers=.*optimizer_cls_and_kwargs"):
        engine_trainer("vit", RECIPE, folder(), objects={"optimizers": (optimizer, None)})
    with refused("SAM acts on gradients.*float16 weights"):
        engine_trainer("vit", RECIPE, folder(), ds=settings(2, fp16={"enabled": "auto"}), fp16=True)
    with refused("torch_compile=False"):
        engine_trainer("vit", RECIPE, folder(), torch_compile=True, torch_compile_backend="eager")
    with refused("set per_device_train_batch_size"):
        engine_trainer("vit", RECIPE, folder(), auto_find_batch_size=True)


@check()
def an_engine_that_is_not_exact_is_refused_before_the_first_step():
    offload = {"offload_optimizer": {"device": "cpu"}}
    own = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    more = {"zero_force_ds_cpu_optimizer": False}
    ds = settings(2, zero=offload, **own, **more)
    t, _ = engine_trainer("vit", RECIPE, folder(), ds=ds)
    before = clone(t.model.state_dict())
    with refused("offloaded parameters and optimizer states"):
        t.train()
    nothing_shadowed(t)
    assert t.state.global_step == 0
    same(gathered(t.model), before)


@check()
def a_callback_that_comes_late_is_refused():
    t, _ = engine_trainer("vit", None, folder())
    t.add_callback(MosaicCallback(RECIPE))
    with refused(r"engine of this training exists already.*trainer=trainer"):
        t.train()
    nothing_shadowed(t)
    t, _ = engine_trainer("vit", None, folder())
    callback = MosaicCallback(RECIPE[1:], seed=3, trainer=t)
    t.train()
    nothing_shadowed(t)
    expected, other = engine_trainer("vit", RECIPE[1:], folder())
    expected.train()
    for a, b in zip(weights(t, callback), weights(expected, other), strict=True):
        assert difference(a, b) == 0
    with refused("give MosaicCallback to a new Trainer"):
        t.train()


@check()
def without_its_adapter_the_package_to_install_is_named():
    import mosaic_deepspeed

    sys.modules["mosaic_deepspeed"] = None
    try:
        with refused("pip install mosaic-deepspeed"):
            engine_trainer("vit", RECIPE, folder())
        engine_trainer("vit", [], folder())[0].train()  # nothing to do
    finally:
        sys.modules["mosaic_deepspeed"] = mosaic_deepspeed


if __name__ == "__main__":
    environment()
    main(ONE, TWO, sys.argv[1], sys.argv[2:])
