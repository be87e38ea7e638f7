"""What the DeepSpeed tests share: the environment of one process, a model, and a session."""

import os
import socket

import torch
from torch import nn
from torch.utils.data import DataLoader

WEIGHTS = {"bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 128.0  # of the loss with float16 weights


def environment():
    """Let DeepSpeed run on the CPU, in one process where none was launched; no compiler needed."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if "RANK" not in os.environ:
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))
            port = held.getsockname()[1]
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    # DeepSpeed asks for a CPU with instructions for float16; torch computes it on any.
    get_accelerator().is_fp16_supported = lambda: True
    logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def config(
    stage=0, *, accumulate=1, autocast=False, weights=None, sums=None, clip_norm=None, **options
):
    """Return a DeepSpeed configuration; small parameters stay whole in ZeRO-3, others do not."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 100, **options.pop("zero", {})}
    result = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        **options,
    }
    if autocast:
        result["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if weights:
        scale = {"loss_scale": SCALE} if weights == "fp16" else {}
        result.setdefault(weights, {"enabled": True, **scale})
        result["data_types"] = {"buffer_dtype": weights}  # batch norm wants its buffers alike
        if sums:
            result["data_types"]["grad_accum_dtype"] = sums
    return result


class Net(nn.Module):
    """Returns logits, or the loss where labels are given."""

    def __init__(self, net, loss):
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, x, y=None):
        logits = self.net(x)
        return logits if y is None else self.loss(logits, y)


def gathered(model):
    """Return copies of all parameters and buffers, of which ZeRO-3 may hold a part."""
    import deepspeed

    sharded = [p for p in model.parameters() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded):
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


class DeepSpeedSession:
    """What a user's script does: an ordinary loop."""

    def __init__(self, job):
        environment()
        import deepspeed

        import mosaic_deepspeed

        self.job = job
        mode = job.mode
        self.dtype = WEIGHTS.get(mode.options.get("weights"), torch.float32)
        arguments = {
            "model": job.model,
            "optimizer": job.optimizer,
            "config": config(
                mode.options["stage"],
                accumulate=mode.accumulate,
                autocast=mode.precision == "bf16",
                weights=mode.options.get("weights"),
                sums=mode.options.get("sums"),
                clip_norm=job.clip_norm,
                zero=mode.options.get("zero", {}),
            ),
        }
        self.batches = DataLoader(job.batches, batch_size=None)
        if job.recipe is None:
            self.engine, *_ = deepspeed.initialize(**arguments)
            return
        steps = len(job.batches) // mode.accumulate
        self.engine, *_ = mosaic_deepspeed.initialize(
            job.recipe,
            seed=job.seed,
            total_steps=job.epochs * steps,
            steps_per_epoch=steps,
            **arguments,
        )
        self.handle = self.engine.mosaic

    @property
    def run(self):
        return None if self.job.recipe is None else self.handle.run

    def fit(self):
        engine = self.engine
        if self.job.recipe is None:
            self._fit(self.batches)
        else:
            with engine.mosaic:
                self._fit(engine.mosaic.loader(self.batches))

    def _fit(self, batches):
        job, engine = self.job, self.engine
        first = 0
        if job.resume:
            _, state = engine.load_checkpoint(job.folder, "0")
            first = state["epoch"] + 1
        for epoch in range(first, job.epochs):
            engine.train()
            for x, y in batches:
                x = x.to(self.dtype)
                loss = engine(x, y) if job.mode.precision == "bf16" else job.loss(engine(x), y)
                engine.backward(loss)
                engine.step()
            if job.save:
                engine.save_checkpoint(job.folder, str(epoch), {"epoch": epoch})
            if job.evaluation:
                engine.eval()
                with torch.no_grad(), engine.mosaic.evaluation():
                    for x, y in job.evaluation:
                        job.loss(engine(x), y)

    def objects(self):
        return [self.engine, self.job.model, self.engine.optimizer, self.engine.basic_optimizer]
