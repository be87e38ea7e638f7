"""The adapter contract for the Hugging Face Trainer."""

import dataclasses

import torch
import transformers
from torch import nn
from torch.utils.data import Dataset

from mosaic_core.testing import AdapterContract
from mosaic_hf import MosaicCallback


class Examples(Dataset):
    """The examples of some batches; with several processes, those of the batches of this rank."""

    def __init__(self, batches, processes=1):
        self.batches, self.processes = batches, processes

    def __len__(self):
        return 8 * len(self.batches) * self.processes

    def __getitem__(self, index):  # the sampler gives batch i to rank i % processes
        images, classes = self.batches[index // 8 // self.processes]
        return {"pixel_values": images[index % 8], "labels": classes[index % 8]}


class Classifier(nn.Module):
    """What the Trainer takes for a model: keyword arguments in, the loss out."""

    def __init__(self, net, loss):
        super().__init__()
        self.net = net
        self.job_loss = [loss]  # in a list, so that it is no attribute the suite compares

    def forward(self, pixel_values, labels=None):
        logits = self.net(pixel_values)
        return {"loss": self.job_loss[0](logits, labels), "logits": logits}


class HFSession:
    def __init__(self, job):
        self.job, processes = job, job.mode.processes
        self.callback = None if job.recipe is None else MosaicCallback(job.recipe, seed=job.seed)
        args = transformers.TrainingArguments(
            output_dir=str(job.folder),
            use_cpu=True,
            bf16=job.mode.precision == "bf16",
            num_train_epochs=job.epochs,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=8,
            gradient_accumulation_steps=job.mode.accumulate,
            max_grad_norm=job.clip_norm or 0,
            train_sampling_strategy="sequential",
            eval_strategy="epoch" if job.evaluation else "no",
            save_strategy="epoch" if job.save else "no",
            ddp_backend="gloo" if processes > 1 else None,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            logging_strategy="no",
        )
        optimizer = job.optimizer(job.model.parameters())
        self.trainer = transformers.Trainer(
            job.model,
            args,
            train_dataset=Examples(job.batches, processes),
            eval_dataset=Examples(job.evaluation) if job.evaluation else None,
            callbacks=[self.callback] if self.callback else [],
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        )
        if job.mode.precision == "fp16":  # which Accelerate offers on a GPU alone
            accelerator = self.trainer.accelerator
            accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
            accelerator.scaler = torch.amp.GradScaler("cpu")

    @property
    def run(self):
        return self.callback and self.callback.run

    def fit(self):
        checkpoint = str(self.job.folder / "checkpoint-10") if self.job.resume else None
        self.trainer.train(resume_from_checkpoint=checkpoint)

    def objects(self):
        trainer = self.trainer
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        handler = trainer.callback_handler
        return [trainer, trainer.model, trainer.accelerator, handler, trainer.args, optimizer]


class TestHuggingFace(AdapterContract):
    adapter = "hf"

    @property
    def described(self):
        adapter = super().described
        modes = tuple(mode for mode in adapter.modes if "stage" not in mode.options)
        return dataclasses.replace(adapter, modes=modes)  # the others: test_hf_deepspeed_contract

    def wrap(self, net, loss):
        return Classifier(net, loss)

    def plain_loss(self, model, batch, loss):
        return loss(model.net(batch[0]), batch[1])

    def session(self, job):
        return HFSession(job)
