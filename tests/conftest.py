"""One thread per test process: tensors are tiny, and two threads on a busy machine wait for each other. Run files in parallel instead."""

import atexit
import os
import random
import shutil
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
if "EXPLAINER_CACHE" not in os.environ:  # tests neither read nor fill the user's memory of file digests
    os.environ["EXPLAINER_CACHE"] = tempfile.mkdtemp(prefix="explainer-tests-")
    atexit.register(shutil.rmtree, os.environ["EXPLAINER_CACHE"], ignore_errors=True)

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test that builds a network or draws images without a seed of its own gets the same ones every time and in every order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
