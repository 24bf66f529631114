"""Gradient and CAM families against the numbers of TorchRay, captum and pytorch-grad-cam, in both precisions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from explainer import Explanandum
from explainer.baselines import build
from explainer.baselines.kernels.maps import resize_map
from tests.golden.cases import load

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])


class Case:
    """One golden case with its network in the wanted precision."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.entry, self.arrays, net = load(name)
        assert net is not None
        self.dtype = dtype
        self.explanandum = Explanandum(net.to(dtype), 5, task="multiclass", mean=0.0, std=1.0)
        self.images = self.tensor("in/x")
        self.args = self.entry["args"]
        self.target = torch.tensor(self.args["target"])

    def tensor(self, key: str) -> Tensor:
        return torch.as_tensor(self.arrays[key]).to(self.dtype)

    def check(self, actual: Tensor, key: str, slack: float = 1.0) -> None:
        expected = self.arrays[key].astype(np.float64)
        if expected.ndim == 4 and actual.ndim == 3:
            expected = expected[:, 0]
        precision = "suggest_float64" if self.dtype == torch.float64 else "suggest_float32"
        tolerance = slack * self.entry["tolerance"][precision]["atol_rel_to_max"]
        assert actual.dtype == self.dtype
        assert actual.shape == expected.shape
        worst = np.abs(actual.double().numpy() - expected).max()
        assert worst <= tolerance * np.abs(expected).max(), (key, worst, tolerance * np.abs(expected).max())


@DTYPES
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("tr_gradient_0", "gradient"),
        ("tr_guided_backprop_1", "guided_backprop"),
        ("tr_deconvnet_2", "deconvnet"),
        ("tr_linear_approx_3", "linear_approx"),
    ],
)
def test_torchray_at_the_input(name: str, method: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    case.check(build(method, case.explanandum)(case.images, case.target), "out/saliency")


@DTYPES
def test_torchray_gradient_at_a_layer_resized_and_smoothed(dtype: torch.dtype) -> None:
    case = Case("tr_gradient_5", dtype)
    method = build("gradient", case.explanandum, layer=case.args["saliency_layer"], smooth=case.args["smooth"])
    case.check(method(case.images, case.target), "out/saliency")


@DTYPES
def test_torchray_linear_approx_at_a_layer(dtype: torch.dtype) -> None:
    case = Case("tr_linear_approx_6", dtype)
    method = build("linear_approx", case.explanandum, layer=case.args["saliency_layer"])
    small = method.channels(case.images, case.target).sum(1)
    case.check(small, "out/saliency")
    torch.testing.assert_close(method(case.images, case.target), resize_map(small, (32, 32)))


@DTYPES
@pytest.mark.parametrize("name", ["tr_grad_cam_7", "tr_grad_cam_8", "tr_grad_cam_13"])
def test_torchray_grad_cam(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    method = build("grad_cam", case.explanandum, layer=case.args["saliency_layer"])
    small = method.layer_maps(case.images, case.target)[0].clamp(min=0)
    width, height = case.args.get("resize", small.shape[-2:])
    case.check(resize_map(small, (height, width)), "out/saliency")
    torch.testing.assert_close(method(case.images, case.target), resize_map(small, case.images.shape[-2:]))


@DTYPES
@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("captum_Saliency_0", "gradient", {}),
        ("captum_Saliency_4", "gradient", {"absolute": False}),
        ("captum_Saliency_19", "gradient", {}),
        ("captum_InputXGradient_1", "input_x_gradient", {}),
        ("captum_GuidedBackprop_2", "guided_backprop", {"convention": "captum"}),
        ("captum_Deconvolution_3", "deconvnet", {}),
        ("captum_GuidedGradCam_18", "guided_grad_cam", {"layer": "7", "reduction": "sum"}),
        ("captum_IntegratedGradients_5", "integrated_gradients", {}),
        ("captum_IntegratedGradients_5", "integrated_gradients", {"batch_size": 7}),
        ("captum_IntegratedGradients_20", "integrated_gradients", {}),
    ],
)
def test_captum_channels(name: str, method: str, options: dict, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    built = build(method, case.explanandum, **options)
    channels = built.channels(case.images, case.target)
    case.check(channels, "out/attr")
    reduced = channels.sum(1) if built.reduction == "sum" else channels.abs().amax(1)
    torch.testing.assert_close(built(case.images, case.target), reduced)


@DTYPES
def test_captum_integrated_gradients_with_a_baseline_and_trapezoids(dtype: torch.dtype) -> None:
    case = Case("captum_IntegratedGradients_6", dtype)
    options = {"steps": case.args["n_steps"], "method": case.args["method"], "baseline": case.tensor("in/baseline")}
    case.check(build("integrated_gradients", case.explanandum, **options).channels(case.images, case.target), "out/attr")


@DTYPES
@pytest.mark.parametrize("statistic", ["smoothgrad", "smoothgrad_sq", "vargrad"])
@pytest.mark.parametrize("batch_size", [2, 32])
def test_captum_noise_tunnel(statistic: str, batch_size: int, dtype: torch.dtype) -> None:
    case = Case("captum_NoiseTunnel_7", dtype)
    method = build(
        "smooth_grad",
        case.explanandum,
        samples=case.args["nt_samples"],
        stdev=case.args["stdevs"],
        noise=case.tensor("in/noise"),
        statistic=statistic,
        batch_size=batch_size,
    )
    case.check(method.channels(case.images, case.target), f"out/{statistic}")


@DTYPES
@pytest.mark.parametrize("name", ["captum_LayerGradCam_8", "captum_LayerGradCam_9"])
def test_captum_layer_grad_cam(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    options = {"layer": case.args["layer"], "convention": "captum"}
    method = build("grad_cam", case.explanandum, **options)
    raw = method.layer_maps(case.images, case.target)[0]
    case.check(raw, "out/attr_relu0")
    case.check(raw.clamp(min=0), "out/attr_relu1")
    torch.testing.assert_close(method(case.images, case.target), resize_map(raw, case.images.shape[-2:], "nearest"))
    rectified = build("grad_cam", case.explanandum, **options, relu=True)
    case.check(rectified(case.images, case.target), "out/interp_nearest")
    bilinear = build("grad_cam", case.explanandum, **options, relu=True, interpolation="bilinear")
    case.check(bilinear(case.images, case.target), "out/interp_bilinear")


PGC = {
    "pgc_GradCAM_0": ("grad_cam", {"convention": "pytorch_grad_cam"}),
    "pgc_GradCAMPlusPlus_1": ("grad_cam_pp", {}),
    "pgc_ScoreCAM_2": ("score_cam", {}),
    "pgc_AblationCAM_3": ("ablation_cam", {}),
    "pgc_XGradCAM_4": ("x_grad_cam", {}),
    "pgc_LayerCAM_5": ("layer_cam", {}),
    "pgc_HiResCAM_6": ("hires_cam", {}),
    "pgc_GradCAMElementWise_7": ("grad_cam_elementwise", {}),
    "pgc_GradCAMPlusPlus_9": ("grad_cam_pp", {}),
    "pgc_LayerCAM_10": ("layer_cam", {}),
    "pgc_AblationCAM_11": ("ablation_cam", {}),
}


@DTYPES
@pytest.mark.parametrize("name", PGC)
def test_pytorch_grad_cam(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    method, options = PGC[name]
    layers = case.args["target_layers"]
    built = build(method, case.explanandum, layer=layers if len(layers) > 1 else layers[0], **options)
    for n, raw in enumerate(built.layer_maps(case.images, case.target)):
        case.check(raw, f"out/raw_layer{n}")
    case.check(built(case.images, case.target), "out/cam")


@DTYPES
def test_full_grad(dtype: torch.dtype) -> None:
    case = Case("pgc_FullGrad_8", dtype)
    case.check(build("full_grad", case.explanandum)(case.images, case.target), "out/cam")
