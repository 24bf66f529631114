"""What replaces removed pixels: the Gaussian, axis by axis."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.transforms.v2 import functional as tvf

from explainer.fills import gaussian_blur, make_fill


def test_an_impulse_becomes_the_product_of_two_gaussians_by_hand() -> None:
    image = torch.zeros(1, 1, 5, 7, dtype=torch.float64)
    image[0, 0, 2, 3] = 1
    weight = [math.exp(-(d**2) / 2 / 0.8**2) for d in (-1, 0, 1)]
    expected = torch.zeros(5, 7, dtype=torch.float64)
    expected[1:4, 2:5] = torch.tensor([[a * b for b in weight] for a in weight], dtype=torch.float64) / sum(weight) ** 2
    torch.testing.assert_close(gaussian_blur(image, 1, 0.8)[0, 0], expected)


@pytest.mark.parametrize(("height", "width"), [(20, 33), (24, 24)])
def test_both_axes_at_once_give_the_same(height: int, width: int) -> None:
    images = torch.rand(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = 0.09 * min(height, width)
    length = 2 * int(3 * sigma + 0.5) + 1
    torch.testing.assert_close(make_fill(images, "blur"), tvf.gaussian_blur(images, [length, length], [sigma, sigma]))
