"""iGOS++ and I-GOS against the public code: masks, step lengths and the objective's gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import explainer
from explainer.baselines.igos_pp import IGOS, IGOSPlusPlus, _Problem
from tests.golden.cases import load

METHODS = {"igos_pp_LS_0": IGOSPlusPlus, "igos_pp_LS_1": IGOSPlusPlus, "igos_pp_NAG_2": IGOSPlusPlus, "igos_igos_LS_3": IGOS}


def prepare(case: str, dtype: torch.dtype):
    entry, arrays, net = load(case)
    args = entry["args"]
    classifier = explainer.Explanandum(net.to(dtype), 5, task="multiclass", mean=0.0, std=1.0)
    method = METHODS[case](
        classifier,
        size=args["size"],
        iterations=args["iterations"],
        points=args["ig_iter"],
        l1=args["L1"],
        l2=args["L2"],
        noise=0.2 if args["mode"] == "seeded" else 0.0,
        optimizer="nesterov" if args.get("opt") == "NAG" else "line_search",
        step=args["alpha"],
        fill=torch.as_tensor(arrays["in/baseline"], dtype=dtype),
    )
    images = torch.as_tensor(arrays["in/x"], dtype=dtype)
    return entry, arrays, method, images, torch.tensor(args["labels"])


def upsampled(mask: np.ndarray, images: torch.Tensor) -> torch.Tensor:
    low = torch.as_tensor(mask, dtype=images.dtype)
    return torch.nn.functional.interpolate(low, images.shape[-2:], mode="bilinear", align_corners=True)[:, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", ["igos_pp_LS_0", "igos_pp_NAG_2", "igos_igos_LS_3"])
def test_mask_equals_the_public_code(case: str, dtype: torch.dtype) -> None:
    entry, arrays, method, images, labels = prepare(case, dtype)
    tolerance = entry["tolerance"]["suggest_float64" if dtype == torch.float64 else "suggest_float32"]["atol_rel_to_max"]
    expected = 1 - upsampled(arrays["out/mask"], images)
    maps = method(images, labels)
    assert maps.dtype == dtype
    torch.testing.assert_close(maps, expected, rtol=0, atol=tolerance)
    if "out/alphas" in arrays:
        steps = torch.stack([row["step"] for row in method.history])
        torch.testing.assert_close(steps, torch.as_tensor(arrays["out/alphas"], dtype=dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", ["igos_pp_LS_0", "igos_igos_LS_3"])
def test_first_gradient(case: str) -> None:
    _, arrays, method, images, labels = prepare(case, torch.float64)
    problem = _Problem(method, images, labels, torch.Generator())
    start = torch.ones(len(images), method.n_masks, 1, method.size, method.size, dtype=torch.float64)
    expected = torch.as_tensor(arrays["out/grad_iter0"]).view_as(start)
    _, slope = problem.gradient(start, torch.arange(len(images)))
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-7 * expected.abs().max().item())


def test_noise_in_the_public_order() -> None:
    """One image and one stream of float32 noise: del, ins, product del, product ins; then the same for every loss of the line search."""
    entry, arrays, method, images, labels = prepare("igos_pp_LS_1", torch.float32)
    maps = method(images, labels, generator=torch.Generator().manual_seed(entry["seed"]))
    torch.testing.assert_close(maps, 1 - upsampled(arrays["out/mask"], images), rtol=0, atol=entry["tolerance"]["suggest_float32"]["atol"])
