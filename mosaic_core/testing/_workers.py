"""Doing tasks of the adapter contract suite in other processes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mosaic_core.adapter import Mode

__all__ = ["in_worker"]


def in_worker(
    suite: type,
    task: str,
    mode: Mode,
    folder: Path,
    *,
    killed: bool = False,
    **arguments: Any,
) -> Any:
    """Do a task in as many new processes as the mode has, and return what rank 0 found."""
    folder.mkdir(parents=True, exist_ok=True)
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    source = sys.modules[suite.__module__].__file__
    request = {
        "source": source,
        "suite": suite.__name__,
        "task": task,
        "mode": mode.name,
        "folder": str(folder),
        "answer": str(answer),
        "arguments": arguments,
    }
    with _free_port() as port:
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(mode.processes)]
        launch += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    command = [sys.executable, *(launch if mode.processes > 1 else []), "-m"]
    command += ["mosaic_core.testing.worker", json.dumps(request)]
    done = subprocess.run(
        command,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    if killed:
        assert done.returncode == -signal.SIGKILL, done.stderr
        return None
    assert done.returncode == 0, done.stderr
    return json.loads(answer.read_text())


@contextlib.contextmanager
def _free_port() -> Iterator[int]:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
