"""One thread for every process: the models are tiny, and two processes share two cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, also by children

import torch

torch.set_num_threads(1)
