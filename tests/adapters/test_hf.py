"""The Hugging Face Trainer against losses and loops written out, and what is its own."""

from dataclasses import dataclass

import hf_ddp
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from hf_common import (
    CAUSAL,
    IMAGES,
    STEPS,
    Data,
    by_hand,
    clone,
    difference,
    fit,
    make,
    trainer,
    unchanged,
)
from safetensors.torch import load_file
from timed import check_trainer
from torch import nn

from mosaic_core import Algorithm, ConflictError, LossError, Place, Run, UnsupportedError
from mosaic_core.algorithms import (
    EMA,
    SAM,
    Backdrop,
    BlurPool,
    LabelSmoothing,
    MixUp,
    NoOp,
    SelectiveBackprop,
)
from mosaic_core.algorithms._selective_backprop import _choose
from mosaic_core.loop import train_steps
from mosaic_hf import MosaicCallback, load_pretrained
from mosaic_hf._workload import train


def recipe():
    return [EMA("2ba"), LabelSmoothing(0.1), MixUp(0.4), BlurPool(), SAM()]


# The loss.


def written_out(logits, labels, items):
    """The smoothed, mixed cross entropy from its definition, summed over the counted items."""
    logits, mixture = logits.double(), labels.mixture
    components = mixture.components
    if logits.dim() == 3:
        logits = logits[:, :-1]
        components = [(label[:, 1:], weight) for label, weight in components]
    log_prob = logits - logits.exp().sum(-1, keepdim=True).log()
    total = 0.0
    for label, weight in components:
        target = torch.zeros_like(logits).scatter_(-1, label.clamp_min(0)[..., None], 1.0)
        target = (1 - mixture.smoothing) * target + mixture.smoothing / logits.shape[-1]
        each = -(target * log_prob).sum(-1) * (label != -100)
        total = total + (1 if weight is None else weight) * each.sum()
    return total / items


def smoothed(name):
    return [LabelSmoothing(0.1), *([MixUp(0.4)] if name in IMAGES else [])]


@pytest.mark.parametrize("name", [*IMAGES, "bert", *CAUSAL])
def test_the_loss_of_each_model_is_the_one_written_out(name, tmp_path):
    double = {"dtype": torch.float64}
    ours = fit(name, smoothed(name), tmp_path, gradient_accumulation_steps=2, **double)
    expected = by_hand(name, smoothed(name), written_out, accumulate=2, **double)
    assert difference(ours.weights, expected.weights) <= 1e-6
    plain = fit(name, [], tmp_path, gradient_accumulation_steps=2, **double)
    assert difference(plain.weights, expected.weights) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "llama"])
def test_torch_compile(name, tmp_path):
    options = {"gradient_accumulation_steps": 2, "max_steps": 4}
    algorithms = [*smoothed(name), SAM(), EMA("2ba")]
    ours = fit(
        name, algorithms, tmp_path, torch_compile=True, torch_compile_backend="aot_eager", **options
    )
    eager = fit(name, algorithms, tmp_path, **options)
    assert difference(ours.weights, eager.weights) <= 1e-6
    assert difference(ours.averaged, eager.averaged) <= 1e-6


def cross_entropy(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_compute_loss_func(name, tmp_path):
    def hand(logits, labels, items):  # BERT's own loss, which ignores the items, is not used
        return written_out(logits, labels, 8)

    double, objects = {"dtype": torch.float64}, {"compute_loss_func": cross_entropy}
    options = {"gradient_accumulation_steps": 2, "objects": objects}
    ours = fit(name, smoothed(name), tmp_path, **options, **double)
    expected = by_hand(name, smoothed(name), hand, accumulate=2, **double)
    assert difference(ours.weights, expected.weights) <= 1e-6


@pytest.mark.slow
def test_a_loss_that_the_compiler_takes_past_the_labels_raises(tmp_path):
    compiled = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}
    with pytest.raises(LossError, match="give Trainer a compute_loss_func"):
        fit("bert", [LabelSmoothing()], tmp_path, **compiled)
    objects = {"compute_loss_func": cross_entropy}
    ours = fit("bert", [LabelSmoothing()], tmp_path, objects=objects, **compiled)
    eager = fit("bert", [LabelSmoothing()], tmp_path, objects=objects, max_steps=2)
    assert difference(ours.weights, eager.weights) <= 1e-6


def test_mixing_of_token_numbers_says_why_it_can_not_be(tmp_path):
    with pytest.raises(TypeError, match=r"input must be floating-point, got torch\.int64"):
        fit("gpt2", [MixUp()], tmp_path)


def test_a_recipe_that_drops_examples_keeps_the_mean(tmp_path):
    @dataclass(frozen=True)
    class FirstHalf(Algorithm):
        place = Place.SELECTION
        changes_labels = True

        def on_batch(self, batch, run):
            kept = torch.arange(len(batch.input) // 2)
            return batch.replace(batch.input[kept], batch.labels.select(kept))

    def mean(logits, labels, items):
        return F.cross_entropy(logits, labels) / 2  # two micro-batches

    ours = fit("vit", [FirstHalf()], tmp_path, gradient_accumulation_steps=2)
    expected = by_hand("vit", [FirstHalf()], mean, accumulate=2)
    assert difference(ours.weights, expected.weights) <= 1e-6


@pytest.mark.parametrize("name", ["bert", *CAUSAL])
def test_a_selection_is_that_of_a_loop_written_out(name, tmp_path):
    """With attention masks, dropout, and labels of which not all count; two micro-batches."""
    always, data = SelectiveBackprop(start=0.0, end=1.0, interrupt=0), Data(name, count=30)
    for i, item in enumerate(data.items):
        item["attention_mask"] = (torch.arange(10) < 10 - i % 4).long()
    ours, model = (make(name, dropout=0.1) for _ in range(2))
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 5, "max_steps": 3}

    class Seeded(hf.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            torch.manual_seed(state.global_step)

    callbacks = [MosaicCallback([always], seed=3), Seeded()]
    trainer(ours, data, tmp_path, callbacks, **options).train()

    def losses(batch):
        logits, labels = model(**batch | {"labels": None}).logits, batch["labels"]
        if name == "bert":
            return F.cross_entropy(logits, labels, reduction="none")[:, None]
        return F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")

    def count(batch):  # as the Trainer does: it knows of Llama alone that it shifts the labels
        labels = batch["labels"]
        return (labels[:, 1:] if name == "llama" else labels).ne(-100).sum()

    optimizer, batches = torch.optim.SGD(model.parameters(), lr=0.02), iter(data.batches(5))
    run = Run([always], model=model, optimizer=optimizer, total_steps=3, seed=3)
    model.train()
    for step in range(3):
        torch.manual_seed(step)
        window = [next(batches) for _ in range(2)]
        for batch in window:
            stream = torch.get_rng_state()
            with torch.no_grad():
                each = losses(batch)
            torch.set_rng_state(stream)
            counted = each.ne(0).sum(1).clamp_min(1)
            kept = _choose(each.sum(1) / counted, 0.5, run.seed_for(always))
            left = {key: value[kept] for key, value in batch.items()}
            items = sum(map(count, window)) * count(left) / count(batch)
            items = len(kept) if name == "bert" else items  # it takes its own mean
            (losses(left).sum() / items).backward()
            run.progress.micro_batch += 1
        optimizer.step()
        optimizer.zero_grad()
        run.end_step()
    assert difference(clone(ours.state_dict()), clone(model.state_dict())) <= 1e-6


# Two passes, clipping and other ways to train.


def test_clipping_and_the_logged_norm_are_those_of_what_the_algorithms_leave(tmp_path):
    @dataclass(frozen=True)
    class Tripled(Algorithm):
        place = Place.GRADIENTS

        def on_gradients(self, run):
            for fragment in run.parameters.fragments():
                run.parameters.set_grad(fragment, 3 * run.parameters.grad(fragment))

    norms = {}
    for clip in (0, 0.5):
        for name, algorithms in (("ours", [Tripled()]), ("bare", None)):
            result = fit("vit", algorithms, tmp_path, max_grad_norm=clip, logging_steps=1)
            assert result.trainer.args.max_grad_norm == clip
            norms[name] = [entry["grad_norm"] for entry in result.trainer.state.log_history[:-1]]
        assert norms["ours"][0] == pytest.approx(3 * norms["bare"][0], rel=1e-6)
    # Clipped to the same length after the first step, both have moved to the same place.
    one = {"max_steps": 1, "max_grad_norm": 0.1}
    ours, bare = (fit("vit", a, tmp_path, **one) for a in ([Tripled()], None))
    assert difference(ours.weights, bare.weights) <= 1e-6


def half(t, scale):
    """Let a Trainer on the CPU train in float16 with a scaler, which it offers on a GPU alone."""
    t.accelerator.native_amp, t.accelerator.state._mixed_precision = True, "fp16"
    t.accelerator.scaler = scaler(scale)


def scaler(scale):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=4)


# torch says so where the very first step overflows, with a schedule and without mosaic alike.
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler:UserWarning")
@pytest.mark.parametrize("clip", [0, 0.5])
@pytest.mark.parametrize("scale", [2.0**8, 2.0**20], ids=["fits", "overflows"])
def test_fp16_with_a_scaler(scale, clip, tmp_path):
    steps, updates = 12, []

    class Counted(EMA):
        def on_step_end(self, run):
            updates.append(run.progress.step)
            super().on_step_end(run)

    algorithms = [*recipe()[1:], Counted("4ba"), NoOp()]
    model, callback = make("resnet"), MosaicCallback(algorithms, seed=3)
    t = trainer(model, Data("resnet"), tmp_path, [callback], max_steps=steps, max_grad_norm=clip)
    half(t, scale)
    t.train()
    averaged = clone(dict(model.named_parameters()))
    callback.run.leave_evaluation()
    assert updates[-1] == steps
    assert (updates[0] > 1) == (scale > 2**8)  # the first ones overflowed

    plain, batches = make("resnet").train(), Data("resnet").batches()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.02)
    run = Run(algorithms, model=plain, optimizer=optimizer, total_steps=steps, seed=3)
    train_steps(
        run,
        [batches[i % len(batches)] for i in range(steps)],
        lambda model, batch: model(**batch).loss,
        autocast=torch.float16,
        clip_norm=clip or None,
        scaler=scaler(scale),
    )
    assert difference(clone(model.state_dict()), clone(plain.state_dict())) <= 1e-6
    run.enter_evaluation()
    assert difference(averaged, clone(dict(plain.named_parameters()))) <= 1e-6


def test_activation_checkpointing(tmp_path):
    names = hf.TrainingArguments.__dataclass_fields__
    option = "activation_checkpointing"
    option = option if option in names else "gradient_checkpointing"
    algorithms = [*smoothed("vit"), Backdrop("vit.layers.0"), EMA("2ba")]
    options = {"gradient_accumulation_steps": 2, "bf16": True}
    ours = fit("vit", algorithms, tmp_path, **{option: True}, **options)
    plain = fit("vit", algorithms, tmp_path, **options)
    assert difference(ours.weights, plain.weights) <= 1e-6
    without = fit("vit", [*smoothed("vit"), EMA("2ba")], tmp_path, **options)
    assert difference(without.weights, plain.weights) > 1e-4


class OwnSteps(hf.Trainer):
    """A subclass that overrides what a micro-batch goes through."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.prepared = self.logged = 0

    def _prepare_inputs(self, inputs):
        self.prepared += 1
        inputs = super()._prepare_inputs(inputs)
        return {**inputs, "pixel_values": 2 * inputs["pixel_values"]}  # not to be done twice

    def training_step(self, model, inputs, num_items_in_batch=None):
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.log({"own": 1.0})
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


def test_the_methods_of_a_subclass_are_called_as_ever(tmp_path):
    options = {"gradient_accumulation_steps": 2}
    ours = fit("resnet", recipe(), tmp_path, cls=OwnSteps, **options)
    assert ours.trainer.prepared == 2 * STEPS
    logged = sum("own" in entry for entry in ours.trainer.state.log_history)
    assert logged == 2 * STEPS  # the second pass leaves no trace

    model, data = make("resnet").train(), Data("resnet")
    for item in data.items:
        item["pixel_values"] = 2 * item["pixel_values"]
    callback = MosaicCallback(recipe(), seed=3)
    objects = {"compute_loss_func": cross_entropy}
    trainer(model, data, tmp_path, [callback], objects=objects, **options).train()
    callback.run.leave_evaluation()
    assert difference(ours.weights, clone(model.state_dict())) <= 1e-6


def test_a_stream_of_examples_without_a_length(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(Data("resnet").items)

    model, callback = make("resnet"), MosaicCallback(recipe(), seed=3)
    trainer(model, Stream(), tmp_path, [callback]).train()
    callback.run.leave_evaluation()
    expected = fit("resnet", recipe(), tmp_path)
    assert difference(clone(model.state_dict()), expected.weights) == 0


def test_keys_of_a_batch(tmp_path):
    keys = {
        "input_key": (lambda b: b["pixel_values"], lambda b, v: {**b, "pixel_values": v}),
        "target_key": "labels",
    }
    model, callback = make("resnet"), MosaicCallback(recipe(), seed=3, **keys)
    trainer(model, Data("resnet"), tmp_path, [callback]).train()
    callback.run.leave_evaluation()
    expected = fit("resnet", recipe(), tmp_path)
    assert difference(clone(model.state_dict()), expected.weights) == 0
    assert "input at 'pixel_values', target at 'labels'" in str(expected.callback.run.report)

    wrong = MosaicCallback(recipe(), target_key="kind")
    with pytest.raises(LookupError, match=r"'kind' is not in it.*Set target_key"):
        trainer(make("resnet"), Data("resnet"), tmp_path, [wrong]).train()


# Reaching the Trainer.


def test_surgery_comes_before_the_optimizer(tmp_path):
    callback = MosaicCallback([Wider()])
    t = trainer(make("vit"), Data("vit"), tmp_path, [callback])
    t.train()
    groups = [p for group in t.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in groups} == {id(p) for p in t.model.parameters()}
    assert "extra" in dict(t.model.named_parameters())


@dataclass(frozen=True)
class Wider(Algorithm):
    """Gives the model one more parameter."""

    place = Place.SURGERY

    def prepare_model(self, model, run):
        model.register_parameter("extra", nn.Parameter(torch.ones(3)))


@pytest.mark.parametrize("how", ["add_callback", "attach", "trainer="])
def test_a_callback_that_comes_late(how, tmp_path):
    model, callback = make("resnet"), MosaicCallback(recipe(), seed=3)
    t = trainer(model, Data("resnet"), tmp_path)
    if how == "add_callback":
        t.add_callback(callback)
    elif how == "attach":
        callback.attach(t)
    else:
        callback = MosaicCallback(recipe(), seed=3, trainer=t)
    t.train()
    callback.run.leave_evaluation()
    expected = fit("resnet", recipe(), tmp_path)
    assert difference(clone(model.state_dict()), expected.weights) == 0


def test_new_parameters_that_come_too_late_are_refused(tmp_path):
    model = make("vit")
    given = {"optimizers": (torch.optim.SGD(model.parameters(), lr=0.1), None)}
    callback = MosaicCallback([Wider()])
    with pytest.raises(UnsupportedError, match="let the Trainer make the optimizer"):
        trainer(model, Data("vit"), tmp_path, [callback], objects=given)
    assert callback.run is None
    t = trainer(make("vit"), Data("vit"), tmp_path)
    t.add_callback(MosaicCallback([Wider()]))
    with pytest.raises(
        UnsupportedError, match=r"optimizer exists already.*optimizer_cls_and_kwargs"
    ):
        t.train()


def test_a_trainer_that_is_not_found_is_asked_for():
    with pytest.raises(UnsupportedError, match=r"was not found.*trainer=trainer"):
        MosaicCallback([MixUp()]).on_init_end(None, None, None)


def test_model_init(tmp_path):
    callback = MosaicCallback(recipe(), seed=3)
    t = trainer(lambda: make("resnet"), Data("resnet"), tmp_path, [callback])
    expected = fit("resnet", recipe(), tmp_path)
    for _ in range(2):  # the second time the surgery comes when the loop has begun
        t.train()
        assert "BlurPool" in callback.run.report.changes
        assert callback.run.progress.step == STEPS
        assert difference(clone(dict(t.model.named_parameters())), expected.averaged) == 0
    assert "model_init" in vars(t)  # the user's own
    assert t.model_init.__name__ == "<lambda>"


def test_training_again_goes_on_from_the_training_weights(tmp_path):
    model, callback, seen = make("resnet"), MosaicCallback(recipe(), seed=3), []
    t = trainer(model, Data("resnet"), tmp_path, [callback, Watch(seen)])
    t.train()
    raw = callback.run.state_dict()["training_weights"]
    seen.clear()
    t.train()
    assert difference(seen[0], raw) == 0
    with torch.no_grad():  # weights loaded by the user win over the training weights
        model.classifier[1].weight.fill_(0.5)
    seen.clear()
    t.train()
    assert (seen[0]["classifier.1.weight"] == 0.5).all()


def test_a_second_trainer_goes_on_with_the_same_callback(tmp_path):
    callback, seen = MosaicCallback(recipe(), seed=3), []
    trainer(make("resnet"), Data("resnet"), tmp_path, [callback], max_steps=4).train()
    model, raw = callback.run.model, callback.run.state_dict()["training_weights"]
    averaged = clone(dict(model.named_parameters()))
    second = trainer(model, Data("resnet"), tmp_path, [callback, Watch(seen)], max_steps=4)
    assert difference(clone(dict(model.named_parameters())), averaged) == 0  # until it trains
    second.train()
    assert difference(seen[0], raw) == 0


@pytest.mark.parametrize("new", [False, True])
def test_a_second_training_comes_after_the_first_in_the_run(new, tmp_path):
    fractions, callback = [], MosaicCallback([NoOp()])

    class Fraction(hf.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            fractions.append(callback.run.progress.fraction)

    t = trainer(make("resnet"), Data("resnet"), tmp_path, [callback, Fraction()], max_steps=2)
    t.train()
    if new:
        callbacks = [callback, Fraction()]
        t = trainer(t.model, Data("resnet"), tmp_path, callbacks, max_steps=2)
    t.train()
    assert fractions == [0, 0.5, 0.5, 0.75]


class Watch(hf.TrainerCallback):
    """Notes the weights before each step."""

    def __init__(self, seen):
        self.seen = seen

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append(clone(dict(model.named_parameters())))


# Evaluation and checkpoints.


class Weights(hf.TrainerCallback):
    """Notes which weights are trained, evaluated and saved, and the average at the time."""

    def __init__(self, callback):
        self.callback = callback
        self.evaluated, self.averages, self.begun = {}, {}, {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.begun[state.global_step] = clone(dict(model.named_parameters()))

    def on_step_end(self, args, state, control, **kwargs):
        ema = self.callback.recipe.algorithms[-1]
        self.averages[state.global_step] = clone(self.callback.run.state(ema).averages)

    def on_prediction_step(self, args, state, control, model=None, **kwargs):
        assert not model.training
        self.evaluated[state.global_step] = clone(dict(model.named_parameters()))


STRATEGIES = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}


def test_evaluations_and_checkpoints_see_the_averaged_weights(tmp_path):
    model, callback = make("resnet"), MosaicCallback(recipe(), seed=3)
    watch = Weights(callback)
    objects = {"eval_dataset": Data("resnet", 8, seed=1)}
    t = trainer(model, Data("resnet"), tmp_path, [callback, watch], objects=objects, **STRATEGIES)
    t.train()
    assert sorted(watch.evaluated) == [2, 4, 6]
    for step, weights in watch.evaluated.items():
        assert difference(weights, watch.averages[step]) == 0
        saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        average = watch.averages[step]
        assert difference({name: saved[name] for name in average}, average) == 0
        state = torch.load(tmp_path / f"checkpoint-{step}" / "mosaic.pt", weights_only=True)
        if step < STEPS:
            assert difference(watch.begun[step], state["training_weights"]) == 0
            assert difference(watch.begun[step], average) > 1e-4
    assert difference(clone(dict(model.named_parameters())), watch.averages[STEPS]) == 0
    # All the same as without evaluations.
    callback.run.leave_evaluation()
    assert difference(clone(model.state_dict()), fit("resnet", recipe(), tmp_path).weights) == 0


def test_batch_norm_statistics_of_the_average_are_recomputed(tmp_path):
    algorithms = [*smoothed("resnet"), EMA("4ba", recompute_batchnorm=3)]
    model, callback = make("resnet"), MosaicCallback(algorithms, seed=3)
    options = {"save_strategy": "steps", "save_steps": 3}
    trainer(model, Data("resnet"), tmp_path, [callback], **options).train()
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert difference(clone(model.state_dict()), saved) == 0

    plain, batches = make("resnet").train(), Data("resnet").batches()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.02)
    forward = lambda batch: plain(**batch)  # noqa: E731  # in place, as an argument
    run = Run(
        algorithms, model=plain, optimizer=optimizer, total_steps=STEPS, seed=3, forward=forward
    )
    train_steps(run, batches[:STEPS], lambda model, batch: model(**batch).loss)
    run.enter_evaluation()
    assert difference(clone(model.state_dict()), clone(plain.state_dict())) <= 1e-6


def test_a_callback_that_evaluates_and_saves_by_itself(tmp_path):
    class Own(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                self.metrics = t.evaluate()
                t.save_model(str(tmp_path / "own"))

    callback = MosaicCallback([EMA("4ba")], seed=3)
    watch, objects = Weights(callback), {"eval_dataset": Data("resnet", 8, seed=1)}
    callbacks = [callback, watch, Own()]
    t = trainer(make("resnet"), Data("resnet"), tmp_path, callbacks, objects=objects)
    t.train()
    assert difference(watch.evaluated[3], watch.averages[3]) == 0
    saved = load_file(tmp_path / "own" / "model.safetensors")
    assert difference({n: saved[n] for n in watch.averages[3]}, watch.averages[3]) == 0
    assert not (tmp_path / "own" / "mosaic.pt").exists()


def test_the_best_model_is_an_averaged_one(tmp_path):
    def order(prediction):
        return {"order": next(values)}

    values, callback, begun = iter([3.0, 1.0, 2.0] * 2), MosaicCallback(recipe(), seed=3), []
    watch = Weights(callback)
    objects = {"eval_dataset": Data("resnet", 8, seed=1), "compute_metrics": order}
    options = {"load_best_model_at_end": True, "metric_for_best_model": "order"}
    t = trainer(
        make("resnet"),
        Data("resnet"),
        tmp_path,
        [callback, watch, Watch(begun)],
        objects=objects,
        greater_is_better=False,
        **options,
        **STRATEGIES,
    )
    t.train()
    assert t.state.best_global_step == 4
    best = watch.averages[4]
    assert difference(clone(dict(t.model.named_parameters())), best) == 0
    begun.clear()
    t.train()  # begins with the weights that were loaded
    assert difference(begun[0], best) == 0


def test_an_average_by_epoch_is_evaluated_in_its_epoch(tmp_path):
    callback = MosaicCallback([EMA("1ep")])

    class Epochs(hf.TrainerCallback):
        def on_prediction_step(self, args, state, control, model=None, **kwargs):
            average = callback.run.state(callback.recipe.algorithms[0]).averages
            assert difference(clone(dict(model.named_parameters())), average) == 0
            seen[state.global_step] = callback.run.progress.epoch

    seen, objects = {}, {"eval_dataset": Data("vit", 4)}
    options = {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "steps", "eval_steps": 8}
    t = trainer(
        make("vit"), Data("vit"), tmp_path, [callback, Epochs()], objects=objects, **options
    )
    t.train()
    assert seen == {8: 1, 16: 2}


def test_evaluation_prediction_and_metrics_are_untouched(tmp_path):
    def accuracy(prediction):
        assert type(prediction.label_ids).__name__ == "ndarray"
        return {
            "accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())
        }

    held_out, results = Data("vit", 12, seed=1), []
    for callbacks in ([MosaicCallback([MixUp(), LabelSmoothing(), EMA("2ba")])], []):
        model = make("vit")
        objects = {"eval_dataset": held_out, "compute_metrics": accuracy}
        t = trainer(model, Data("vit"), tmp_path, callbacks, objects=objects)
        if callbacks:
            t.train()
            trained = clone(model.state_dict())
        model.load_state_dict(trained)
        metrics = t.evaluate()
        assert not [name for name in metrics if "mosaic" in name]
        output = t.predict(held_out)
        results.append(
            (metrics["eval_loss"], metrics["eval_accuracy"], output.predictions.tolist())
        )
    assert results[0] == results[1]


@pytest.mark.parametrize("at", [3, 8])
def test_resume_is_bit_equal(at, tmp_path):
    def train(folder, resume=None):
        model, callback = make("bert", dropout=0.1), MosaicCallback(algorithms, seed=3)
        t = trainer(
            model,
            Data("bert"),
            folder,
            [callback],
            max_steps=12,
            gradient_accumulation_steps=2,
            train_sampling_strategy="random",
            optim="adamw_torch",
            lr_scheduler_type="linear",
            save_strategy="steps",
            save_steps=at,
        )
        t.train(resume_from_checkpoint=resume)
        return clone(model.state_dict()), callback.run.state_dict()

    algorithms = [LabelSmoothing(0.1), SAM(), EMA("4ba")]
    whole = train(tmp_path / "whole")
    resumed = train(tmp_path / "resumed", str(tmp_path / "whole" / f"checkpoint-{at}"))
    assert all(torch.equal(whole[0][name], resumed[0][name]) for name in whole[0])
    raw, again = (state["training_weights"] for _, state in (whole, resumed))
    assert all(torch.equal(raw[name], again[name]) for name in raw)
    assert whole[1]["progress"] == resumed[1]["progress"]


def test_the_same_trainer_can_resume(tmp_path):
    callback = MosaicCallback(recipe(), seed=3)
    t = trainer(
        make("resnet"), Data("resnet"), tmp_path, [callback], save_strategy="steps", save_steps=4
    )
    t.train()
    averaged = clone(dict(t.model.named_parameters()))
    t.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert difference(clone(dict(t.model.named_parameters())), averaged) == 0


def test_a_run_goes_on_only_with_its_own_recipe(tmp_path):
    fit("vit", [MixUp(0.2)], tmp_path, save_strategy="steps", save_steps=3)
    other = trainer(make("vit"), Data("vit"), tmp_path, [MosaicCallback([MixUp(0.3)], seed=3)])
    with pytest.raises(UnsupportedError, match="must go on with the recipe and seed it began with"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    nothing_shadowed(other)


def test_a_checkpoint_without_mosaic_can_be_gone_on_from(tmp_path):
    fit("vit", None, tmp_path, save_strategy="steps", save_steps=3)
    callback = MosaicCallback([MixUp(), EMA("2ba")])
    t = trainer(make("vit"), Data("vit"), tmp_path, [callback])
    t.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert callback.run.progress.step == STEPS


# A model that was changed.


def test_a_changed_model_explains_itself(tmp_path, caplog):
    result = fit("resnet", recipe(), tmp_path, save_strategy="steps", save_steps=3)
    result.callback.run.enter_evaluation()
    result.trainer.save_model(str(tmp_path / "end"))  # after training: the configuration tells
    model, images = result.trainer.model.eval(), Data("resnet").batches()[0]["pixel_values"]
    expected, cls = model(images).logits, type(model)

    logger = "transformers.modeling_utils"
    with caplog.at_level("WARNING", logger):
        loaded = load_pretrained(cls, tmp_path / "end").eval()
        assert torch.equal(loaded(images).logits, expected)
        checkpoint = load_pretrained(hf.AutoModelForImageClassification, tmp_path / "checkpoint-6")
        assert torch.equal(checkpoint.eval()(images).logits, expected)
    assert "mosaic" not in caplog.text

    # Without the recipe it is not the same model, which is logged and stands in config.json.
    hf.logging.enable_propagation()
    try:
        with caplog.at_level("WARNING", logger):
            plain = cls.from_pretrained(tmp_path / "checkpoint-6").eval()
    finally:
        hf.logging.disable_propagation()
    assert "belong to a model changed by BlurPool" in caplog.text
    assert not torch.equal(plain(images).logits, expected)
    assert list(plain.config.mosaic["changed"]) == ["BlurPool"]
    other = MosaicCallback([MixUp()])
    for _ in range(2):  # asking again does not help
        with pytest.raises(UnsupportedError, match=r"changed by BlurPool.*config.mosaic = None"):
            trainer(plain, Data("resnet"), tmp_path, [other])
    trainer(plain, Data("resnet"), tmp_path, [MosaicCallback([BlurPool()])])
    assert torch.equal(plain(images).logits, expected)


def test_load_pretrained_can_not_fill_new_parameters(tmp_path):
    make("vit").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"makes new parameters; make the model from its"):
        load_pretrained(hf.ViTForImageClassification, tmp_path, [Wider()])


def test_weights_alone_are_saved_without_the_run(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "save_only_model": True}
    fit("vit", [EMA("2ba")], tmp_path, **options)
    assert (tmp_path / "checkpoint-3" / "model.safetensors").exists()
    assert not (tmp_path / "checkpoint-3" / "mosaic.pt").exists()


# Two processes.


@pytest.mark.slow
def test_two_processes_equal_one_that_accumulates(tmp_path):
    ours = hf_ddp.launch(tmp_path)
    model, callback = make("llama"), MosaicCallback(hf_ddp.recipe(), seed=3)
    options = {**hf_ddp.OPTIONS, "gradient_accumulation_steps": 2, "logging_steps": 1}
    t = trainer(model, Data("llama"), tmp_path, [callback], **options)
    t.train()
    averaged = clone(dict(model.named_parameters()))
    callback.run.leave_evaluation()
    raw = clone(model.state_dict())
    for rank in ours:
        assert difference(rank["averaged"], averaged) <= 1e-6
        assert difference(rank["weights"], raw) <= 1e-6
        for name in raw:  # after going on from the checkpoint
            assert torch.equal(rank["resumed"][name], rank["weights"][name])
    losses = [entry["loss"] for entry in t.state.log_history if "loss" in entry]
    assert ours[0]["losses"] == pytest.approx(losses, rel=1e-5)


def test_values_reach_the_log(tmp_path):
    result = fit("vit", [MixUp(), SAM()], tmp_path, logging_steps=2)
    steps = [entry for entry in result.trainer.state.log_history if "loss" in entry]
    assert len(steps) == 3
    for entry in steps:
        assert {"mosaic/MixUp/mixing", "mosaic/SAM/grad_norm", "grad_norm"} <= entry.keys()


# What is refused.


def refused(match, tmp_path, error=UnsupportedError, algorithms=None, cls=hf.Trainer, **options):
    callback, model = MosaicCallback(algorithms or recipe()), make("vit")
    with unchanged(model), pytest.raises(error, match=match):
        trainer(model, Data("vit"), tmp_path, [callback], cls=cls, **options)


def test_two_callbacks_are_refused(tmp_path):
    two = [MosaicCallback([MixUp()]), MosaicCallback([EMA()])]
    with pytest.raises(UnsupportedError, match=r"takes one MosaicCallback.*one recipe"):
        trainer(make("vit"), Data("vit"), tmp_path, two)
    t = trainer(make("vit"), Data("vit"), tmp_path, two[:1])
    t.add_callback(two[1])
    with pytest.raises(UnsupportedError, match="takes one MosaicCallback"):
        t.train()
    nothing_shadowed(t)


def test_label_smoothing_of_the_trainer_is_refused(tmp_path):
    factor = {"label_smoothing_factor": 0.2}
    match = r"LabelSmoothing can't be combined with .*label_smoothing_factor"
    refused(match, tmp_path, ConflictError, [LabelSmoothing()], **factor)
    match = r"MixUp needs the loss.*LabelSmoothing\(0.2\) into the recipe"
    refused(match, tmp_path, algorithms=[MixUp()], **factor)
    fit("vit", [EMA("2ba")], tmp_path, **factor)  # which it does not touch


def test_noise_on_embeddings_beside_ours_is_refused(tmp_path):
    @dataclass(frozen=True)
    class Noise(Algorithm):
        place = Place.AUGMENTATION
        excludes = frozenset({"trainer embedding noise"})

    match = r"Noise can't be combined with .*neftune_noise_alpha"
    refused(match, tmp_path, ConflictError, [Noise()], neftune_noise_alpha=5.0)


def test_data_parallel_is_refused(tmp_path):
    class TwoDevices(hf.TrainingArguments):
        @property
        def n_gpu(self):
            return 2

        parallel_mode = hf.training_args.ParallelMode.NOT_DISTRIBUTED

    args = TwoDevices(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(UnsupportedError, match=r"not_distributed.*DataParallel.*torchrun"):
        hf.Trainer(
            make("vit"), args, train_dataset=Data("vit"), callbacks=[MosaicCallback([EMA()])]
        )


@pytest.mark.parametrize(
    ("flag", "match"),
    [
        ("is_fsdp_enabled", "FSDP shards the parameters.*DDP"),
        ("is_distributed_loading_by_transformers", r"parallelism shard the model.*DDP"),
        ("is_model_parallel", "spread over several devices.*DDP"),
    ],
)
def test_engines_are_refused(flag, match, tmp_path):
    class Engine(hf.Trainer):
        @property
        def optimizer(self):  # set between the engine's creation and the events
            return None

        @optimizer.setter
        def optimizer(self, value):
            setattr(self, flag, True)

    refused(match, tmp_path, cls=Engine)
    # An empty recipe has nothing that could go wrong.
    trainer(make("vit"), Data("vit"), tmp_path, [MosaicCallback([])], cls=Engine)


def test_a_batch_size_that_is_found_by_beginning_again_is_refused(tmp_path):
    refused("set per_device_train_batch_size", tmp_path, auto_find_batch_size=True)


def test_optimizers_that_step_in_backward_are_refused(tmp_path):
    match = "NoOp acts on gradients.*steps inside backward.*adamw_torch"
    refused(match, tmp_path, algorithms=[NoOp()], optim="galore_adamw_layerwise")


# What is left behind.


def nothing_shadowed(t):
    names = {
        *("_inner_training_loop", "_run_epoch", "_evaluate", "_finalize_training", "training_step"),
        *(
            "_prepare_inputs",
            "evaluate",
            "predict",
            "save_model",
            "_save",
            "_load_best_model",
            "log",
        ),
    }
    assert not names & vars(t).keys()
    assert not {"unscale_gradients"} & vars(t.accelerator).keys()
    assert "call_event" not in vars(t.callback_handler)
    assert not [c for c in t.callback_handler.callbacks if "on_train_begin" in shadowed(c)]
    if t.optimizer is not None:
        optimizer = getattr(t.optimizer, "optimizer", t.optimizer)
        assert not optimizer._optimizer_step_post_hooks


def shadowed(callback):
    return vars(callback).keys() - {"error", "event"}


def raising(event, error):
    """Return a callback that raises in one event."""

    def act(self, *args, **kwargs):
        if self.error is not None:
            raise self.error

    callback = type("Raises", (hf.TrainerCallback,), {event: act})()
    callback.error = error
    return callback


@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
@pytest.mark.parametrize(
    "error", [ValueError("mine"), KeyboardInterrupt()], ids=["error", "ctrl-c"]
)
@pytest.mark.parametrize(
    "event", ["on_train_begin", "on_epoch_begin", "on_step_end", "on_evaluate", "on_train_end"]
)
def test_nothing_remains_after_an_exception(event, error, again, tmp_path):
    callback, raises = MosaicCallback(recipe(), seed=3), raising(event, None if again else error)
    objects = {"eval_dataset": Data("resnet", 4)}
    options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    t = trainer(
        make("resnet"), Data("resnet"), tmp_path, [callback, raises], objects=objects, **options
    )
    if again:
        t.train()
        nothing_shadowed(t)
        raises.error = error
    with pytest.raises(type(error)):
        t.train()
    nothing_shadowed(t)
    if event != "on_train_end":
        assert not callback.run.in_evaluation


def test_training_goes_on_after_an_exception(tmp_path):
    callback, raises = MosaicCallback([EMA("2ba")], seed=3), raising("on_evaluate", ValueError("x"))
    objects = {"eval_dataset": Data("vit", 4)}
    options = {"eval_strategy": "steps", "eval_steps": 2}
    t = trainer(make("vit"), Data("vit"), tmp_path, [callback, raises], objects=objects, **options)
    with pytest.raises(ValueError, match="x"):
        t.train()
    raw = clone(dict(t.model.named_parameters()))
    raises.error, begun = None, []
    t.add_callback(Watch(begun))
    t.train()
    assert difference(begun[0], raw) == 0


def test_attributes_of_the_user_are_put_back(tmp_path):
    t = trainer(make("vit"), Data("vit"), tmp_path, [MosaicCallback(recipe()[:3])])
    own, calls = t.log, []
    t.log = lambda logs, *rest: calls.append(logs) or own(logs, *rest)
    mine = t.log
    t.train()
    assert t.log is mine
    assert calls


def test_time_is_told_apart_by_phases():
    check_trainer(train, loss_in="forward")  # the model computes it
