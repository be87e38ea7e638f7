"""One process of the adapter contract suite: ``python -m mosaic_core.testing.worker REQUEST``."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["main"]


def main(request: dict[str, Any]) -> None:
    """Do the task of a request and let rank 0 write the answer.

    Args:
        request: Where the suite is, which task to do in which mode, and where to write.
    """
    torch.set_num_threads(1)
    source = Path(request["source"])
    sys.path.insert(0, str(source.parent))
    spec = importlib.util.spec_from_file_location(source.stem, source)
    if spec is None or spec.loader is None:
        raise ImportError(f"worker: {source} can't be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[source.stem] = module
    spec.loader.exec_module(module)
    suite = getattr(module, request["suite"])()
    mode = suite.mode(request["mode"])
    answer = suite.work(request["task"], mode, Path(request["folder"]), request["arguments"])
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        Path(request["answer"]).write_text(json.dumps(answer))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
