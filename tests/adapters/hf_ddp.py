"""Two processes that train a causal language model; run by torchrun, and by ``launch``."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from hf_common import Data, clone, make, trainer

from mosaic_core.algorithms import EMA, SAM, LabelSmoothing
from mosaic_hf import MosaicCallback

OPTIONS = {"max_grad_norm": 0.5, "save_strategy": "steps", "save_steps": 3, "max_steps": 5}


def recipe():
    return [LabelSmoothing(0.1), SAM(), EMA("4ba")]


def main(folder):
    rank = int(os.environ["RANK"])
    results = {}
    for name, resume in (("weights", None), ("resumed", str(folder / "checkpoint-3"))):
        model, callback = make("llama"), MosaicCallback(recipe(), seed=3)
        options = {**OPTIONS, "ddp_backend": "gloo", "logging_steps": 1}
        t = trainer(model, Data("llama"), folder, [callback], **options)
        t.train(resume_from_checkpoint=resume)
        averaged = clone(dict(model.named_parameters()))
        callback.run.leave_evaluation()
        results[name] = clone(model.state_dict())
        if resume is None:
            results["averaged"] = averaged
            log = t.state.log_history
            results["losses"] = [entry["loss"] for entry in log if "loss" in entry]
    torch.save(results, folder / f"result.{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def launch(folder):
    """Run this file in two processes and return what each of them found."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    done = subprocess.run(
        [*command, __file__, str(folder)],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [torch.load(folder / f"result.{rank}") for rank in (0, 1)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
