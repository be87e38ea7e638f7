"""One thread for every process: the models are tiny, and two processes share two cores."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, also by children

import torch

torch.set_num_threads(1)

sys.path.insert(0, str(Path(__file__).parent))  # timed, which core and adapters share
