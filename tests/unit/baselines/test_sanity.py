from __future__ import annotations

import pytest
import torch
from torch import nn

import explainer
from explainer.baselines import build
from explainer.errors import ConfigError, ShapeError


@pytest.fixture
def classifier() -> explainer.Explanandum:
    return explainer.Explanandum(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), 3)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_constant(classifier: explainer.Explanandum, value: float) -> None:
    assert torch.equal(build("constant", classifier, value=value)(torch.rand(2, 3, 4, 5), 0), torch.full((2, 4, 5), value))


def test_centre_peaks_in_the_middle(classifier: explainer.Explanandum) -> None:
    maps = build("centre", classifier, sigma=0.25)(torch.rand(1, 3, 9, 13, dtype=torch.float64), 0)[0]
    assert maps.argmax() == 4 * 13 + 6
    assert maps[4, 6] == 1
    sigma = 0.25 * 9
    torch.testing.assert_close(maps[4, 8].item(), float(torch.exp(torch.tensor(-(2.0**2) / (2 * sigma**2), dtype=torch.float64))))
    torch.testing.assert_close(maps, maps.flip(0, 1))


def test_random_differs_between_images_and_generators_but_not_between_calls(classifier: explainer.Explanandum) -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    method = build("random", classifier)
    first = method(images, 0)
    assert torch.equal(first, method(images, 1))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[1], method(images[1:], 0)[0])
    assert not torch.equal(first, method(images, 0, generator=torch.Generator().manual_seed(1)))
    assert 0.3 < first.mean() < 0.7


def test_edges_of_a_step(classifier: explainer.Explanandum) -> None:
    """A step of height 0.8 between columns 2 and 3: half of it on each side, nothing elsewhere."""
    images = torch.zeros(1, 3, 5, 6)
    images[..., 3:] = 0.8
    expected = torch.zeros(5, 6)
    expected[:, 2:4] = 0.4
    maps = build("edges", classifier)
    torch.testing.assert_close(maps(images, 0)[0], expected)
    torch.testing.assert_close(maps(images.mT.contiguous(), 0)[0], expected.T)


def test_ground_truth_is_the_class_mask(classifier: explainer.Explanandum) -> None:
    masks = (torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    method = build("ground_truth", classifier)
    maps = method(torch.rand(2, 3, 4, 4), [2, 0], masks=masks)
    assert torch.equal(maps, torch.stack([masks[0, 2], masks[1, 0]]))
    with pytest.raises(ConfigError, match="needs ground-truth masks"):
        method(torch.rand(2, 3, 4, 4), 0)
    with pytest.raises(ShapeError, match=r"\(2, 3, 4, 4\)"):
        method(torch.rand(2, 3, 4, 4), 0, masks=masks[:, :2])


@pytest.mark.parametrize(("name", "options"), [("constant", {"value": 2.0}), ("centre", {"sigma": 0.0})])
def test_wrong_options(classifier: explainer.Explanandum, name: str, options: dict) -> None:
    with pytest.raises(ConfigError, match=name):
        build(name, classifier, **options)
