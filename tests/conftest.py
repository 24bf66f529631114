"""One thread per test process: tensors are tiny, and two threads on a busy machine wait for each other. Run files in parallel instead."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import torch

torch.set_num_threads(1)
