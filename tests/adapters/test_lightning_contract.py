"""The adapter contract for Lightning, under both of its import roots."""

import importlib
import logging

import torch
from torch.utils.data import DataLoader

from mosaic_core.testing import AdapterContract
from mosaic_lightning import MosaicCallback

for _name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
    logging.getLogger(_name).setLevel(logging.ERROR)


class LightningSession:
    def __init__(self, pl, job):
        self.job, self.module = job, job.model
        self.module.job = [
            job
        ]  # in a list, so that Lightning sees neither hyper-parameter nor module
        self.callback = None if job.recipe is None else MosaicCallback(job.recipe, seed=job.seed)
        callbacks = [self.callback] if self.callback else []
        if job.save:
            callbacks.append(pl.callbacks.ModelCheckpoint(job.folder, "{epoch}", save_top_k=-1))
        precision = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": None}[job.mode.precision]
        plugins = None
        if job.mode.precision == "fp16":  # "16-mixed" on the CPU would become bf16-mixed
            scaler = torch.amp.GradScaler("cpu")
            plugins = [pl.plugins.precision.MixedPrecision("16-mixed", "cpu", scaler=scaler)]
        self.trainer = pl.Trainer(
            accelerator="cpu",
            devices=job.mode.processes,
            strategy="ddp" if job.mode.processes > 1 else "auto",
            max_epochs=job.epochs,
            accumulate_grad_batches=job.mode.accumulate,
            gradient_clip_val=job.clip_norm,
            precision=precision,
            plugins=plugins,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=job.save,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=job.folder,
        )

    @property
    def run(self):
        return self.callback and self.callback.run

    def fit(self):
        batches, evaluation = (
            DataLoader(data, batch_size=None) if data else None
            for data in (self.job.batches, self.job.evaluation)
        )
        checkpoint = self.job.folder / "epoch=0.ckpt" if self.job.resume else None
        self.trainer.fit(self.module, batches, evaluation, ckpt_path=checkpoint)

    def objects(self):
        return [self.trainer, self.module, self.trainer.strategy, *self.trainer.optimizers]


class LightningContract(AdapterContract):
    adapter = "lightning"
    root = "pytorch_lightning"

    def wrap(self, net, loss):
        pl = importlib.import_module(self.root)

        class Module(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = net

            def training_step(self, batch, batch_idx):
                return loss(self.net(batch[0]), batch[1])

            validation_step = training_step

            def configure_optimizers(self):
                return self.job[0].optimizer(self.parameters())

        return Module()

    def plain_loss(self, model, batch, loss):
        return loss(model.net(batch[0]), batch[1])

    def session(self, job):
        return LightningSession(importlib.import_module(self.root), job)


class TestPytorchLightning(LightningContract):
    root = "pytorch_lightning"


class TestLightningPytorch(LightningContract):
    root = "lightning.pytorch"
