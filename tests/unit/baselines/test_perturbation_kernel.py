"""Smoothing, pyramids, upsampling and shifts against hand-worked numbers and definitions."""

from __future__ import annotations

import math

import pytest
import torch

from explainer.baselines.kernels.perturbation import Perturbation, gaussian_kernel, imsmooth, pyramid, shift, upsampling_matrix
from explainer.errors import ConfigError, ShapeError


def test_gaussian_kernel_has_the_gaussians_ratios() -> None:
    kernel = gaussian_kernel(1.5, torch.float64)
    assert kernel.shape == (13,)
    assert kernel.sum().item() == pytest.approx(1)
    assert (kernel[8] / kernel[6]).item() == pytest.approx(math.exp(-(2**2) / (2 * 1.5**2)), rel=1e-6)
    assert gaussian_kernel(0.0).tolist() == [1.0]


def test_imsmooth_border_darkens_unless_renormalised() -> None:
    ones = torch.ones(2, 3, 9, 11, dtype=torch.float64)
    dark, even = imsmooth(ones, 2.0), imsmooth(ones, 2.0, renormalize=True)
    inside = gaussian_kernel(2.0, torch.float64)[8:].sum().item()  # the corner sees the centre and one side of the kernel per axis
    assert dark[0, 0, 0, 0].item() == pytest.approx(inside**2)
    torch.testing.assert_close(even, ones)


def test_imsmooth_refuses_negative_sigma() -> None:
    with pytest.raises(ConfigError, match="sigma"):
        imsmooth(torch.ones(1, 1, 4, 4), -1.0)


@pytest.mark.parametrize("kind", ["blur", "fade", "constant", "noise"])
def test_pyramid_ends_at_the_image(kind: str) -> None:
    images = torch.rand(2, 3, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    levels = pyramid(images, kind, levels=3, max_blur=2.0, generator=torch.Generator().manual_seed(0))
    assert levels.shape == (2, 3, 3, 8, 6)
    torch.testing.assert_close(levels[:, -1], images)
    if kind == "fade":
        torch.testing.assert_close(levels[:, 0], torch.zeros_like(images))
        torch.testing.assert_close(levels[:, 1], images / 2)
    if kind == "constant":
        torch.testing.assert_close(levels[1, 0, 2], images[1, 2].mean().expand(8, 6))
    if kind == "noise":  # the same pattern behind every image, so that a batch of two equals two singles
        torch.testing.assert_close(levels[0, 0], levels[1, 0])
    if kind == "blur":
        torch.testing.assert_close(levels[:, 0], imsmooth(images, 2.0))
        torch.testing.assert_close(levels[:, 1], imsmooth(images, 1.0))


def test_origin_is_the_same_as_perturbing_normalised_images() -> None:
    images = torch.rand(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mean, std = torch.tensor([0.2, 0.4, 0.6], dtype=torch.float64), 0.25
    view = mean.view(1, 3, 1, 1)
    for kind in ("blur", "fade"):
        normalized = pyramid((images - view) / std, kind, 4, max_blur=3.0)
        expected = normalized * std + view.unsqueeze(1)
        torch.testing.assert_close(pyramid(images, kind, 4, max_blur=3.0, origin=mean), expected)


def test_pyramid_refuses_unknown_kinds_and_single_levels() -> None:
    with pytest.raises(ConfigError, match="blur, fade"):
        pyramid(torch.ones(1, 1, 4, 4), "melt")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="levels"):
        pyramid(torch.ones(1, 1, 4, 4), "fade", levels=1)


def test_interpolation_by_hand() -> None:
    # three levels of a one-pixel image: 0, 10, 40; a mask of 0.75 lies halfway between the last two
    levels = torch.tensor([0.0, 10.0, 40.0], dtype=torch.float64).view(1, 3, 1, 1, 1)
    mask = torch.tensor([0.0, 0.25, 0.75, 1.0], dtype=torch.float64).view(4, 1, 1).requires_grad_()
    shown = Perturbation(levels).apply(mask)
    assert shown.flatten().tolist() == [0.0, 5.0, 25.0, 40.0]
    (grad,) = torch.autograd.grad(shown.sum(), mask)
    assert grad.flatten().tolist() == [20.0, 20.0, 60.0, 0.0]  # slope = 2 levels x the difference; nothing lies above the last


def test_rows_choose_their_image() -> None:
    images = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    shown = Perturbation(pyramid(images, "fade", 2)).apply(torch.full((3, 2, 2), 0.5), torch.tensor([1, 0, 1]))
    assert shown[:, 0, 0, 0].tolist() == [0.5, 0.0, 0.5]


def test_perturbation_refuses_wrong_masks() -> None:
    perturbation = Perturbation(pyramid(torch.ones(2, 1, 4, 4), "fade", 2))
    with pytest.raises(ShapeError, match=r"H,W = 4,4"):
        perturbation.apply(torch.ones(2, 3, 4))
    with pytest.raises(ShapeError, match="image="):
        perturbation.apply(torch.ones(3, 4, 4))


def test_interpolation_gradient_is_the_finite_difference() -> None:
    images = torch.rand(1, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    perturbation = Perturbation(pyramid(images, "blur", 4, max_blur=2.0))
    mask = (torch.rand(2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 0.9 + 0.01).requires_grad_()
    assert torch.autograd.gradcheck(perturbation.apply, (mask,))


def test_upsampling_matrix_equals_interpolation() -> None:
    mask = torch.rand(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    expected = torch.nn.functional.interpolate(mask[:, None], (23, 16), mode="bilinear", align_corners=False)[:, 0]
    rows, columns = upsampling_matrix(5, 23, dtype=torch.float64), upsampling_matrix(4, 16, dtype=torch.float64)
    torch.testing.assert_close(rows @ mask @ columns.T, expected)
    smooth = upsampling_matrix(5, 23, 2.0, torch.float64)
    torch.testing.assert_close(smooth.sum(1), torch.ones(23, dtype=torch.float64))
    inside = imsmooth(expected[:, None], 2.0, renormalize=True)[:, 0, 8:15, 8:9]
    across = upsampling_matrix(4, 16, 2.0, torch.float64)
    torch.testing.assert_close((smooth @ mask @ across.T)[:, 8:15, 8:9], inside, atol=2e-4, rtol=0)  # imsmooth cuts its tails at 4 sigma


def test_shift_repeats_the_border() -> None:
    image = torch.arange(6.0).view(1, 2, 3)
    assert shift(image, 1, 1).tolist() == [[[0, 0, 1], [0, 0, 1]]]
    assert shift(image, 0, -1).tolist() == [[[1, 2, 2], [4, 5, 5]]]
