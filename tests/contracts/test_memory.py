"""Nothing that a method makes stays: thirty calls need no more tensors than one, on a network with in-place activations."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from torch import Tensor

from tests.contracts.networks import tiny
from tests.contracts.test_baselines import METHODS, explain, images, method

CALLS = 30


def held() -> int:
    """Numbers in all tensors alive. Without a collection: what only the collector frees piles up between its runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sum(o.numel() for o in gc.get_objects() if isinstance(o, Tensor))


SEARCHES = {"attn_lrp", "cp_lrp", "extremal_perturbation", "igos", "igos_pp", "integrated_gradients", "meaningful_perturbation"}
SEARCHES |= {"ablation_cam", "gradient_shap", "guided_filter", "occlusion", "rise", "score_cam", "smooth_grad"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SEARCHES else n for n in sorted(METHODS)])
def test_thirty_calls_leave_nothing(name: str) -> None:
    architecture = "vit" if METHODS[name].needs_attention else "vgg"
    attributor, x = method(name, tiny(architecture, torch.float32)), images(torch.float32, 2)[:1]
    explain(attributor, x, [1])
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        before = held()
        for _ in range(CALLS):
            explain(attributor, x, [1])
        gc.collect()  # cycles that Python can see may wait for its collector; what is left is held for good
        after = held()
    finally:
        gc.enable()
        gc.unfreeze()
    assert after - before < 5 * x.numel(), f"{name} keeps {(after - before) // CALLS} numbers per call"
