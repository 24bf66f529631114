"""The CAM family on tokens and channels-last maps against pytorch-grad-cam's numbers, in both precisions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from explainer import Explanandum
from explainer.baselines import build
from tests.golden.transformer_cases import load

METHODS = {
    "GradCAM": ("grad_cam", {"convention": "pytorch_grad_cam"}),
    "GradCAMPlusPlus": ("grad_cam_pp", {}),
    "HiResCAM": ("hires_cam", {}),
    "LayerCAM": ("layer_cam", {}),
    "ScoreCAM": ("score_cam", {}),
    "XGradCAM": ("x_grad_cam", {}),
}
CASES = [
    "cam_GradCAM_vit",
    "cam_GradCAMPlusPlus_rect",
    "cam_XGradCAM_reg",
    "cam_LayerCAM_deit",
    "cam_HiResCAM_gap",
    "cam_ScoreCAM_vit",
    "cam_GradCAM_rect_2layers",
    "cam_GradCAM_swin_norm2",
    "cam_LayerCAM_swin_norm",
    "cam_ScoreCAM_swin_norm2",
]
# What the default must be: the reference's own choice for a class token, the last norm for averages. (Swin's norm2 is inside a block.)
DEFAULTS = {"vit": "blocks.2.norm1", "vit_rect": "blocks.2.norm1", "vit_reg": "blocks.2.norm1", "deit": "blocks.2.norm1"}
DEFAULTS |= {"vit_gap": "norm", "swin": "norm"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("name", CASES)
def test_pytorch_grad_cam_on_transformers(name: str, dtype: torch.dtype) -> None:
    entry, arrays, net = load(name, dtype)
    model = Explanandum(net, 5, task="multiclass", mean=0.0, std=1.0)
    images, target = torch.as_tensor(arrays["in/x"]).to(dtype), torch.tensor(entry["args"]["target"])
    np.testing.assert_allclose(model(images).detach().numpy(), arrays["mid/logits"], rtol=0, atol=1e-5)
    layers = entry["args"]["target_layers"]
    method, options = METHODS[entry["args"]["method"]]
    built = build(method, model, layer=layers if len(layers) > 1 else layers[0], **options)
    outputs = {f"out/raw_layer{n}": raw for n, raw in enumerate(built.layer_maps(images, target))} | {"out/cam": built(images, target)}
    for key, actual in outputs.items():
        expected, bounds = arrays[key].astype(np.float64), entry["tolerance"]
        exact = bounds["suggest_float64"]["atol_rel_to_max"]
        tolerance = exact if dtype == torch.float64 else bounds["per_output"][key]["suggest_float32_atol_rel_to_max"]
        assert tuple(actual.shape) == expected.shape and actual.dtype == dtype
        worst = np.abs(actual.double().numpy() - expected).max()
        assert worst <= tolerance * np.abs(expected).max(), (key, worst)


@pytest.mark.parametrize("name", CASES)
def test_the_default_layer(name: str) -> None:
    entry, arrays, net = load(name)
    model = Explanandum(net, 5, task="multiclass", mean=0.0, std=1.0)
    built = build("grad_cam", model)
    maps = built.layer_maps(torch.as_tensor(arrays["in/x"]).double(), torch.tensor(entry["args"]["target"]))
    assert built.layer == DEFAULTS[entry["network"]]
    assert list(maps[0].shape[1:]) == entry["args"]["token_grid"] and maps[0].abs().max() > 0
