"""Extremal perturbations against the public code's numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import explainer.baselines as baselines
from explainer.models.explanandum import Explanandum
from tests.golden.cases import load

FREE_OF_TIES = ["ep_7_rinit_preserve_blur_30it", "ep_8_rinit_delete_fade_30it", "ep_9_rinit_dual_blur_30it", "ep_10_rinit_dual_fade_200it"]
TIED = [
    "ep_0_preserve_blur_30it",
    "ep_1_delete_blur_30it",
    "ep_2_dual_blur_30it",
    "ep_3_preserve_fade_30it",
    "ep_4_preserve_blur_30it_contrastive",
    "ep_5_preserve_fade_200it",
    "ep_6_dual_blur_200it",
]


def run(name: str, dtype: torch.dtype, **options: Any) -> tuple[dict, dict[str, np.ndarray], Any, Any]:
    entry, arrays, net = load(name)
    args = entry["args"]
    explanandum = Explanandum(net.to(dtype), num_classes=arrays["mid/logits"].shape[1], mean=0.0, std=1.0)
    if "in/pmask_init" in arrays:
        options["init"] = torch.from_numpy(arrays["in/pmask_init"])
    else:
        options["init"] = "ones"  # the published start, which is not the default
    method = baselines.build(
        "extremal_perturbation",
        explanandum,
        areas=args["areas"],
        game={"dual": "hybrid"}.get(args["variant"], args["variant"]),
        reward="contrastive" if "contrastive" in args.get("reward_func", "") else "simple",
        perturbation=args["perturbation"],
        iterations=args["max_iter"],
        jitter=args["jitter"],
        step=args["step"],
        sigma=args["sigma"],
        **options,
    )
    images = torch.from_numpy(arrays["in/x"]).to(dtype)
    return entry, arrays, method, method.masks(images, args["target"])


@pytest.mark.parametrize("clamp", ["pass", "block"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FREE_OF_TIES)
def test_equals_the_public_code(name: str, dtype: torch.dtype, clamp: str) -> None:
    tolerance = 1e-6 if dtype == torch.float64 else 1e-4
    prefix = ("oldclamp" if clamp == "pass" else "out") + ("" if dtype == torch.float64 else "32")
    _, arrays, method, found = run(name, dtype, clamp_gradient=clamp)
    assert np.abs(found.masks[0].double().numpy() - arrays[f"{prefix}/mask"][:, 0]).max() <= tolerance
    history, length = arrays[f"{prefix}/hist"], arrays[f"{prefix}/hist"].shape[2]
    scale = tolerance * 100  # rewards are about 30, and their weight multiplies the area term by up to 600
    assert np.abs(method.history.values["reward"].numpy().T - history[:, 0]).max() <= scale
    weighted = method.history.values["area"].numpy().T * (300 * 1.0035 ** np.arange(length))
    assert np.abs(-weighted - history[:, 1]).max() <= scale


@pytest.mark.parametrize("name", TIED)
def test_within_the_spread_of_tie_breaking(name: str) -> None:
    entry, arrays, method, found = run(name, torch.float64)
    allowed = entry["tolerance"]["suggest_reimplementation"]
    mask, target = found.masks[0].numpy(), arrays["oldclamp/mask"][:, 0]
    if "resize" in entry["args"]:  # this case stores the mask resized and smoothed
        assert entry["args"]["smooth"] > 0
    else:
        assert np.abs(mask - target).mean() <= allowed["mask_mean_abs"]
    last = method.history.values["reward"][-1].numpy()
    assert np.abs(last - arrays["oldclamp/hist"][:, 0, -1]).max() <= allowed["final_reward_abs"]
