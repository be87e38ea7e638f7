"""The adapter contract for fastai."""

import functools
import warnings

import pytest
from fastai_common import CPUMixedPrecision, Learner, dataloaders, distribute, quiet

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from fastai.callback.tracker import SaveModelCallback
    from fastai.callback.training import GradientAccumulation, GradientClip
    from fastai.optimizer import OptimWrapper

from mosaic_core.adapter import Mode
from mosaic_core.testing import AdapterContract
from mosaic_core.testing._network import examples
from mosaic_core.testing.adapters import FULL
from mosaic_fastai import MosaicCallback


class FastaiSession:
    def __init__(self, job):
        self.job, mode = job, job.mode
        self.callback = None if job.recipe is None else MosaicCallback(job.recipe, seed=job.seed)
        # With several processes fastai can't validate on nothing.
        evaluation = job.evaluation or [examples(1)] * (mode.processes > 1)
        self.learn = Learner(
            dataloaders(job.batches, evaluation, mode.processes),
            job.model,
            loss_func=job.loss,
            opt_func=functools.partial(OptimWrapper, opt=job.optimizer),
            lr=job.optimizer.keywords["lr"],
            cbs=self.callback,
            path=job.folder,
        )
        quiet(self.learn)
        if mode.accumulate > 1:
            self.learn.add_cb(GradientAccumulation(8 * mode.accumulate))
        if mode.precision != "fp32":
            self.learn.add_cb(CPUMixedPrecision(mode.precision))
        if job.clip_norm is not None:
            self.learn.add_cb(GradientClip(job.clip_norm))
        if mode.processes > 1:
            distribute(self.learn)
        if job.save:
            self.learn.add_cb(SaveModelCallback("train_loss", every_epoch=True, with_opt=True))

    @property
    def run(self):
        return self.callback and self.callback.run

    def fit(self):
        if self.job.resume:
            self.learn.load("model_0")
        self.learn.fit(self.job.epochs, start_epoch=int(self.job.resume))

    def objects(self):
        if self.callback:  # it belongs to the Learner until the user takes it away
            self.learn.remove_cb(self.callback)
        return [self.learn, self.learn.model, self.learn.dls, self.learn.opt, self.learn.opt.opt]


class TestFastai(AdapterContract):
    adapter = "fastai"
    any_loss = True

    def session(self, job):
        return FastaiSession(job)

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_two_passes_with_accumulation_in_low_precision(self, precision, tmp_path):
        mode = Mode(f"accumulation in {precision}", accumulate=4, precision=precision)
        outcome = self.compare(FULL, mode, tmp_path)
        assert outcome.refused is None
        assert max(outcome.weights, outcome.averaged) <= self.tolerance
        assert outcome.effect > 1e-3
