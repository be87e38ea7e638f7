"""The Trainer with DeepSpeed: see ``hf_deepspeed_checks.py``, which runs in other processes."""

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hf_deepspeed_checks import ONE, TWO

CHECKS = Path(__file__).with_name("hf_deepspeed_checks.py")


@functools.cache
def outcome(processes):
    """Run all checks for this number of processes, and return which failed, by rank and name."""
    answer = Path(tempfile.mkdtemp()) / "answer"
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    launch += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    command = [sys.executable, *(launch if processes > 1 else []), str(CHECKS), str(answer)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=540, check=False
    )
    files = sorted(answer.parent.glob("answer.*"))
    assert len(files) == processes, done.stderr[-5000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE)
def test_in_one_process(name):
    (found,) = outcome(1)
    assert name in found["ran"]
    assert name not in found["failed"], found["failed"][name]


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO)
def test_in_two_processes(name):
    for found in outcome(2):
        assert name in found["ran"]
        assert name not in found["failed"], found["failed"][name]
