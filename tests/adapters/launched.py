"""Checks that run together in processes of their own, and how the tests learn of them.

A file of checks registers functions for one process or two and ends with a call of :func:`main`;
each process writes which of them failed, and how.
"""

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

__all__ = ["main", "outcome"]


@functools.cache
def outcome(checks, processes):
    """Run all checks of a file for this number of processes; return what each process says."""
    answer = Path(tempfile.mkdtemp()) / "answer"
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launch += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    command = [sys.executable, *(launch if processes > 1 else []), str(checks), str(answer)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=540, check=False
    )
    files = sorted(answer.parent.glob("answer.*"))
    assert len(files) == processes, done.stderr[-5000:]
    return [json.loads(file.read_text()) for file in files]


def main(one, two, answer, only):
    """Run the checks for as many processes as there are, and write which failed."""
    import deepspeed
    import torch

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    alone = torch.distributed.get_world_size() == 1
    ran, failed = [], {}
    for name, function in (one if alone else two).items():
        if only and name not in only:
            continue
        ran.append(name)
        try:
            function()
        except BaseException:
            failed[name] = traceback.format_exc()
            if not alone:  # the other rank may be waiting
                print(failed[name], file=sys.stderr, flush=True)
                break
    rank = torch.distributed.get_rank()
    Path(f"{answer}.{rank}").write_text(json.dumps({"ran": ran, "failed": failed}))
    torch.distributed.destroy_process_group()
