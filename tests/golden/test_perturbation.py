"""Smoothing, perturbation pyramids and smooth masks against the public code's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from explainer.baselines.kernels.perturbation import Perturbation, imsmooth, pyramid
from explainer.baselines.kernels.smooth_mask import SmoothMask
from tests.golden.cases import load

MASKS = ["maskgen_0", "maskgen_1", "maskgen_2", "maskgen_3"]
PERTURBATIONS = ["pert_0", "pert_1", "pert_2"]
DTYPES = [torch.float64, torch.float32]


def tensors(arrays: dict[str, np.ndarray], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value).to(dtype) for key, value in arrays.items()}


def close(actual: torch.Tensor, expected: np.ndarray, relative: float) -> None:
    assert tuple(actual.shape) == expected.shape
    error = np.abs(actual.detach().double().numpy() - expected).max()
    assert error <= relative * np.abs(expected).max(), f"off by {error}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_imsmooth(dtype: torch.dtype) -> None:
    entry, arrays, _ = load("imsmooth_0")
    images = torch.from_numpy(arrays["in/x"]).to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for number, options in enumerate(entry["args"]["calls"]):
        close(imsmooth(images, **options), arrays[f"out/s{number}"], tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PERTURBATIONS)
def test_pyramid_and_interpolation(name: str, dtype: torch.dtype) -> None:
    entry, arrays, _ = load(name)
    args, data = entry["args"], tensors(arrays, dtype)
    tolerance = 1e-7 if dtype == torch.float64 else 1e-5
    levels = pyramid(data["in/x"], args["type"], args["num_levels"], max_blur=args["max_blur"])
    close(levels[0], arrays["out/pyramid"], 1e-5 if dtype == torch.float32 else 1e-6)
    mask = data["in/mask"][:, 0].requires_grad_()
    perturbed = Perturbation(levels).apply(mask)
    close(perturbed, arrays["out/perturbed"], tolerance)
    (grad,) = torch.autograd.grad((perturbed * data["in/w"]).sum(), mask)
    # Row 1 lies on the boundaries between levels, where rounding decides which of the two slopes is seen.
    free = [0, 2]
    close(grad[free], arrays["out/grad_mask"][free, 0], tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MASKS)
def test_smooth_masks(name: str, dtype: torch.dtype) -> None:
    entry, arrays, _ = load(name)
    args, data = entry["args"], tensors(arrays, dtype)
    exact = dtype == torch.float64
    for clamp, key in (("block", "out/grad"), ("pass", "out/grad_oldclamp")):
        size, pooling = (*args["shape"], args["step"], args["sigma"]), args["pooling_method"]
        generate = SmoothMask(*size, pooling=pooling, dtype=dtype, clamp_gradient=clamp)
        assert (generate.grid, generate.padded) == (tuple(args["shape_in"]), tuple(args["shape_out"]))
        assert (generate.padding, generate.radius, generate.margin) == (args["padding"], args["radius"], args["margin"])
        parameters = data["in/pmask"][:, 0].requires_grad_()
        full = generate.padded_masks(parameters)
        close(full[:, None], arrays["out/full"], 1e-9 if exact else 2e-5)
        close(generate.crop(full)[:, None], arrays["out/cropped"], 1e-9 if exact else 2e-5)
        if exact or clamp == "pass":  # in float32 rounding decides which pixels are saturated
            (grad,) = torch.autograd.grad((full * data["in/w_full"][:, 0]).sum(), parameters)
            close(grad[:, None], arrays[key], 1e-9 if exact else 2e-5)
