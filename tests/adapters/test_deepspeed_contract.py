"""The adapter contract for DeepSpeed, ZeRO 0 to 3."""

import functools

import torch
from deepspeed_common import SCALE, WEIGHTS, DeepSpeedSession, Net, environment, gathered

from mosaic_core import Run
from mosaic_core.parameters import Fragment
from mosaic_core.testing import AdapterContract
from mosaic_core.testing._jobs import STEPS_PER_EPOCH


class MasterWeights:
    """A plain float32 copy of 16-bit weights: what DeepSpeed's bf16 and fp16 come down to."""

    def __init__(self, model, sums):
        self.model, self.sums = model, sums  # dtype in which gradients are kept

    @functools.cached_property
    def pairs(self):  # when surgery has been done
        return [(p, p.detach().float().requires_grad_()) for p in self.model.parameters()]

    def start(self):
        names = [name for name, _ in self.model.named_parameters()]
        self.found = [
            Fragment(name, p, tuple(p.shape), 0, p.numel(), master.detach())
            for name, (p, master) in zip(names, self.pairs, strict=True)
        ]

    def fragments(self):
        return self.found

    def keep_grads(self):
        self.grads = {n: p.grad.to(self.sums) for n, p in self.model.named_parameters()}

    def grad(self, fragment):
        return self.grads[fragment.name].float()

    def set_grad(self, fragment, grad):
        self.grads[fragment.name].copy_(grad)

    def drop_grads(self):
        self.model.zero_grad()

    def all_reduce(self, value):
        return value

    @torch.no_grad()
    def publish(self):
        for p, master in self.pairs:
            p.copy_(master)


class TestDeepSpeed(AdapterContract):
    adapter = "deepspeed"
    in_process = False

    def together(self, mode, other):
        # DeepSpeed never forgets that one engine of a process used autocast.
        return (mode.precision, mode.processes) == (other.precision, other.processes)

    def wrap(self, net, loss):
        return Net(net, loss)

    def plain_loss(self, model, batch, loss):
        return loss(model(batch[0]), batch[1])

    def session(self, job):
        return DeepSpeedSession(job)

    def weights(self, model, run):
        environment()
        found = gathered(model)
        low = next(iter(found.values())).dtype != torch.float32
        if run is not None and len(run.recipe) and low:
            for f in run.parameters.fragments():  # what the optimizer updates
                found[f"master of {f.name}"] = f.master.detach().clone()
        return found

    def train_plain(self, job):
        dtype = WEIGHTS.get(job.mode.options.get("weights"))
        if dtype is None:
            return super().train_plain(job)
        model, scale = job.model, SCALE if dtype == torch.float16 else 1.0
        sums = torch.float32 if job.mode.options.get("sums") == "fp32" else dtype
        view = MasterWeights(model, sums)
        run = Run(
            job.recipe,
            model=model,
            seed=job.seed,
            parameters=view,
            forward=lambda batch: model(batch[0].to(dtype)),
        )
        model.to(dtype)  # after the surgery, as DeepSpeed does
        masters = [master for _, master in view.pairs]
        optimizer = job.optimizer(masters)
        steps = job.epochs * STEPS_PER_EPOCH
        run.start([optimizer], total_steps=steps, steps_per_epoch=STEPS_PER_EPOCH)

        def backward(batch):
            (job.loss(model(batch[0].to(dtype)), batch[1]) * scale).backward()
            view.keep_grads()

        for _ in range(job.epochs):
            for batch in job.batches:
                model.zero_grad()
                mixed = run.on_batch(batch)
                backward(mixed)
                run.check_loss()
                run.second_pass(lambda mixed=mixed: backward(mixed))
                run.on_gradients()
                for (_, master), grad in zip(view.pairs, view.grads.values(), strict=True):
                    master.grad = grad.float() / scale
                optimizer.step()
                view.publish()
                run.end_step()
            run.end_epoch()
        return self.result(model, run, [])
