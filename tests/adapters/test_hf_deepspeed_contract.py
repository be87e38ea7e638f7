"""The adapter contract for the Hugging Face Trainer with its DeepSpeed integration."""

import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import pytest
import transformers
from deepspeed_common import WEIGHTS, config, environment
from test_deepspeed_contract import TestDeepSpeed as DeepSpeedContract  # it lies in no package
from test_hf_contract import Examples, HFSession
from torch import nn

from mosaic_core.testing._workers import in_worker
from mosaic_hf import MosaicCallback


class Classifier(nn.Module):
    """What the Trainer takes for a model; without labels it returns the logits alone."""

    def __init__(self, net, loss):
        super().__init__()
        self.net = net
        self.job_loss = [loss]  # in a list, so that it is no attribute the suite compares

    def forward(self, pixel_values, labels=None):
        logits = self.net(pixel_values)
        if labels is None:
            return logits
        return {"loss": self.job_loss[0](logits, labels), "logits": logits}


_PLAIN = {}


def trainer_of(optimizer):
    """Return a Trainer that makes its optimizer with a function, as DeepSpeed takes no other."""

    class OwnOptimizer(transformers.Trainer):
        def create_optimizer(self, model=None):
            if self.optimizer is None:
                self.optimizer = optimizer(self.model.parameters())
            return self.optimizer

    return OwnOptimizer


class HFDeepSpeedSession(HFSession):
    def __init__(self, job):
        environment()
        self.job, mode = job, job.mode
        self.callback = None if job.recipe is None else MosaicCallback(job.recipe, seed=job.seed)
        weights = mode.options.get("weights")
        settings = config(
            mode.options["stage"],
            accumulate=mode.accumulate,
            weights=weights,
            clip_norm=job.clip_norm,
        )
        args = transformers.TrainingArguments(
            output_dir=str(job.folder),
            use_cpu=True,
            bf16=weights == "bf16",
            fp16=weights == "fp16",
            deepspeed=settings,
            num_train_epochs=job.epochs,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=8,
            gradient_accumulation_steps=mode.accumulate,
            max_grad_norm=job.clip_norm or 0,
            train_sampling_strategy="sequential",
            lr_scheduler_type="constant",
            eval_strategy="epoch" if job.evaluation else "no",
            save_strategy="epoch" if job.save else "no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            logging_strategy="no",
        )
        self.trainer = trainer_of(job.optimizer)(
            job.model,
            args,
            train_dataset=Examples(job.batches, mode.processes),
            eval_dataset=Examples(job.evaluation) if job.evaluation else None,
            callbacks=[self.callback] if self.callback else [],
        )

    def objects(self):
        engine = self.trainer.deepspeed
        return [*super().objects(), engine, engine.optimizer, engine.basic_optimizer]


class TestHuggingFaceDeepSpeed(DeepSpeedContract):
    adapter = "hf"

    @property
    def described(self):
        adapter = super().described
        modes = tuple(mode for mode in adapter.modes if "stage" in mode.options)
        return dataclasses.replace(adapter, modes=modes)

    def _first_mode(self):
        return self.mode("DeepSpeed ZeRO-2")

    def together(self, mode, other):
        return mode.processes == other.processes

    def wrap(self, net, loss):
        return Classifier(net, loss)

    def session(self, job):
        return HFDeepSpeedSession(job)

    def train_plain(self, job):
        """Train with the plain loop, which knows of no stage, once for all of them."""
        mode, recipe = job.mode, tuple(job.recipe)
        how = mode.accumulate, mode.processes, mode.options.get("weights")
        key = (recipe, *how, repr(job.optimizer), job.clip_norm, type(job.loss), job.epochs)
        if key not in _PLAIN:
            _PLAIN[key] = self._train_plain(job)
        return dataclasses.replace(_PLAIN[key])

    def _train_plain(self, job):
        dtype = WEIGHTS.get(job.mode.options.get("weights"))
        if dtype is not None:  # the Trainer casts the inputs before anybody sees them
            job = dataclasses.replace(job, batches=[(x.to(dtype), y) for x, y in job.batches])
        return super().train_plain(job)

    # Starting a process takes longer than a training, so one does all tasks.

    def do(self, task, folder, **arguments):
        return tasks_done()[json.dumps([task, arguments])]

    def _all(self, mode, folder):
        return {
            json.dumps([task, arguments]): self.work(task, mode, folder / str(i), arguments)
            for i, (task, arguments) in enumerate(TASKS)
        }

    @pytest.mark.slow
    @pytest.mark.parametrize("optimizer", ["adamw"])
    def test_resume_after_a_kill_is_bit_equal(self, optimizer, tmp_path):
        super().test_resume_after_a_kill_is_bit_equal(optimizer, tmp_path)


TASKS = (
    ("options", {"recipe": "none"}),
    ("options", {"recipe": "full"}),
    ("ignoring", {}),
    ("evaluation", {}),
    *(("remains", {"error": error}) for error in ("", "ValueError", "KeyboardInterrupt")),
)


@functools.cache
def tasks_done():
    suite = TestHuggingFaceDeepSpeed
    return in_worker(suite, "all", suite()._first_mode(), Path(tempfile.mkdtemp()))
