"""The two import roots of Lightning, and quiet trainers."""

import importlib
import logging
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # lightning_common, also in child processes

ROOTS = ("pytorch_lightning", "lightning.pytorch")


@pytest.fixture(params=ROOTS)
def pl(request):
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return importlib.import_module(request.param)
