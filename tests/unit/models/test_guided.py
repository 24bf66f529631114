"""The guided filter as a layer equals the one of the baselines, which is tested against loops over windows."""

from __future__ import annotations

import torch

from explainer.baselines.kernels.maps import guided_filter
from explainer.models.guided import guided, make_guide, window


def test_it_is_the_guided_filter():
    torch.manual_seed(0)
    images, maps = torch.rand(2, 3, 28, 28, dtype=torch.float64), torch.rand(2, 4, 28, 28, dtype=torch.float64)
    expected = guided_filter(maps, images, 0.25, 3e-4)
    assert torch.allclose(guided(maps, make_guide(images, (28, 28), 0.25, 3e-4)), expected, atol=1e-9)
    single = guided(maps.float(), make_guide(images.float() + 2, (28, 28), 0.25, 3e-4))
    assert torch.allclose(single.double(), expected, atol=2e-3), "an offset of the image changes nothing but rounding"


def test_windows_by_hand():
    third = 1 / 3
    expected = torch.tensor([[0.5, 0.5, 0, 0], [third, third, third, 0], [0, third, third, third], [0, 0, 0.5, 0.5]])
    assert torch.allclose(window(4, 0.25, torch.zeros(1)), expected)


def test_inverse_of_every_position():
    """Against torch's solver, position by position."""
    from explainer.models.guided import _inverse

    torch.manual_seed(0)
    a = torch.randn(2, 3, 3, 4, 5, dtype=torch.float64)
    v = torch.einsum("bikhw,bjkhw->bijhw", a, a)
    expected = torch.linalg.inv(v.permute(0, 3, 4, 1, 2) + 0.1 * torch.eye(3, dtype=torch.float64)).permute(0, 3, 4, 1, 2)
    assert torch.allclose(_inverse(v, 0.1), expected, rtol=1e-9, atol=1e-9)
