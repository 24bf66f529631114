"""RISE against TorchRay, occlusion and feature ablation against captum."""

from __future__ import annotations

import pytest
import torch

import explainer
from explainer.baselines.occlusion import Occlusion
from explainer.baselines.rise import RISE
from tests.golden.cases import load

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def prepare(case: str, dtype: torch.dtype):
    entry, arrays, net = load(case)
    tolerance = entry["tolerance"]["suggest_float64" if dtype == torch.float64 else "suggest_float32"]["atol_rel_to_max"]
    # The reference applies a sigmoid whatever the model: here that is what "multilabel" means.
    classifier = explainer.Explanandum(net.to(dtype), 5, task="multilabel", mean=0.0, std=1.0)
    return entry["args"], arrays, classifier, torch.as_tensor(arrays["in/x"], dtype=dtype), tolerance


def assert_equal(maps: torch.Tensor, reference, tolerance: float) -> None:
    expected = torch.as_tensor(reference, dtype=maps.dtype)
    # rtol: the reference's map was stored in float32, so each value is known to half a unit in its last place.
    torch.testing.assert_close(maps, expected, rtol=2**-24, atol=tolerance * expected.abs().max().item())


@DTYPES
@pytest.mark.parametrize("case", ["rise_0_fixed", "rise_1_seeded"])
def test_rise(case: str, dtype: torch.dtype) -> None:
    args, arrays, classifier, images, tolerance = prepare(case, dtype)
    masks = torch.as_tensor(arrays["in/masks"], dtype=dtype)
    method = RISE(classifier, masks=masks, normalize=False, batch_size=7)
    assert_equal(method.all_classes(images), arrays["out/saliency"], tolerance)
    targets = torch.tensor(args["rise_class_targets"])
    assert_equal(method(images, targets), arrays["out/saliency_class"][:, 0], tolerance)
    p = args.get("p", 0.5)
    assert_equal(RISE(classifier, masks=masks, p=p)(images, targets) * p, arrays["out/saliency_class"][:, 0], tolerance)


@DTYPES
@pytest.mark.parametrize("case", ["captum_Occlusion_16", "captum_FeatureAblation_17"])
def test_occlusion(case: str, dtype: torch.dtype) -> None:
    args, arrays, classifier, images, tolerance = prepare(case, dtype)
    if "window" in args:
        method = Occlusion(classifier, window=tuple(args["window"][1:]), stride=tuple(args["strides"][1:]), batch_size=5)
    else:
        method = Occlusion(classifier, segments=torch.as_tensor(arrays["in/feature_mask"]).long(), batch_size=5)
    maps = method(images, args["target"])
    # The patch spans the three channels, so captum's three maps are one.
    assert_equal(maps[:, None].expand(-1, 3, -1, -1), arrays["out/attr"], tolerance)
    torch.testing.assert_close(method.all_classes(images, [3, args["target"][0]])[:, 1], maps)
