"""Masks by area: exact areas, nested by construction, the implicit gradient against finite differences."""

import itertools

import pytest
import torch
from torch import nn

import explainer
from explainer.errors import ConfigError, ShapeError
from explainer.models.area_conditioned import AreaConditioned, area_masks, top_pixels
from explainer.models.explainer import Explainer

AREAS = (0.01, 0.05, 0.1, 0.2, 0.5, 0.9, 0.99)


def logits(scale=3.0, dtype=torch.float64):
    return torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0), dtype=dtype) * scale


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_area_is_met_and_masks_are_nested(temperature, scale):
    masks = [area_masks(logits(scale), a, temperature) for a in AREAS]
    for a, m in zip(AREAS, masks, strict=True):
        torch.testing.assert_close(m.mean((2, 3)), torch.full((2, 3), a, dtype=torch.float64), atol=2e-3 if scale == 30 else 1e-6, rtol=0)
    for small, large in itertools.pairwise(masks):
        assert (small <= large + 1e-12).all()


def test_float32_and_areas_per_image_and_class():
    per_image = torch.tensor([0.1, 0.4])
    torch.testing.assert_close(
        area_masks(logits(dtype=torch.float32), per_image).mean((2, 3)), per_image[:, None].expand(2, 3), atol=1e-5, rtol=0
    )
    both = torch.rand(2, 3, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
    torch.testing.assert_close(area_masks(logits(dtype=torch.float32), both).mean((2, 3)), both, atol=1e-5, rtol=0)


def test_gradient_is_the_implicit_functions():
    s = logits(1.0)[:1, :1].requires_grad_()
    weight = torch.randn(1, 1, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.autograd.gradcheck(lambda x: (area_masks(x, 0.2) * weight).sum(), (s,), eps=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(area_masks(s, 0.2).mean(), s)
    assert grad.abs().max() < 1e-9, "the area cannot be bought"
    (grad,) = torch.autograd.grad(area_masks(s, 0.2)[0, 0, 0, 0], s)
    assert grad[0, 0, 0, 0] > 0 and (grad.flatten()[1:] < 0).all()


def test_top_pixels_are_exact_nested_and_break_ties_in_order():
    s = logits()
    for a in AREAS:
        assert torch.equal(top_pixels(s, a).sum((2, 3)), torch.full((2, 3), max(1, round(a * 72)), dtype=torch.float64))
    for small, large in itertools.pairwise(AREAS):
        assert (top_pixels(s, small) <= top_pixels(s, large)).all()
    flat = torch.zeros(1, 1, 2, 4)
    assert top_pixels(flat, 0.5).flatten().tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert top_pixels(torch.tensor([[[[1.0, 3.0], [2.0, 3.0]]]]), 0.5).flatten().tolist() == [0, 1, 0, 1]


def test_wrapper_is_optional_and_uses_the_nets_logits():
    torch.manual_seed(0)
    net = Explainer("vgg_unet", 2, {"widths": [4, 4], "decoder_channels": [4]}, stride=4).eval()
    images = torch.rand(2, 3, 10, 12)
    wrapped = AreaConditioned(net, 0.5)
    torch.testing.assert_close(wrapped(images), net(images))
    torch.testing.assert_close(wrapped(images, 0.3), area_masks(net.logits(images), 0.3, 0.5))
    assert torch.equal(wrapped(images, 0.3, hard=True), top_pixels(net.logits(images), 0.3))


def test_the_temperature_of_training_is_the_default():
    net = Explainer("vgg_unet", 2, {"widths": [4, 4], "decoder_channels": [4]}, stride=4).eval()
    assert AreaConditioned(net).temperature == 1.0, "an older checkpoint does not say"
    net.metadata = {"area_temperature": 0.25}
    images = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(AreaConditioned(net)(images, 0.3), area_masks(net.logits(images), 0.3, 0.25))
    assert AreaConditioned(net, 0.5).temperature == 0.5
    for wrong in (0.0, float("nan"), "soft"):
        net.metadata = {"area_temperature": wrong}
        with pytest.raises(ConfigError, match="temperature must be a positive number"):
            AreaConditioned(net)


class Ordered(nn.Module):
    """Logits that fall from left to right."""

    num_classes = 1

    def logits(self, images):
        columns = -torch.arange(images.shape[-1], dtype=images.dtype) * 20
        return columns.expand(len(images), 1, *images.shape[-2:])


class LeftHalf(nn.Module):
    """Certain once the left half is visible."""

    def forward(self, x):
        return (x[..., : x.shape[-1] // 2].mean((1, 2, 3)) * 200 - 100)[:, None]


def test_smallest_sufficient_area():
    e = explainer.Explanandum(LeftHalf(), 1, mean=0.0, std=1.0)
    wrapped, images = AreaConditioned(Ordered(), 0.1), torch.ones(2, 3, 8, 8, dtype=torch.float64)
    index = torch.zeros(2, dtype=torch.long)
    area, mask = wrapped.smallest_sufficient(e, images, index, (0.25, 0.5, 0.75), share=0.45)
    # Half the image shows the left half completely; a quarter shows half of it, which scores sigmoid(0) = 0.5 of 1.
    assert area.tolist() == [0.25, 0.25]
    area, mask = wrapped.smallest_sufficient(e, images, index, (0.25, 0.5, 0.75), share=0.9)
    assert area.tolist() == [0.5, 0.5]
    torch.testing.assert_close(mask[0, 0], torch.tensor([1.0] * 4 + [0.0] * 4, dtype=torch.float64), atol=1e-6, rtol=0)
    area, mask = wrapped.smallest_sufficient(e, images, index, (0.05, 0.25), share=1.0)
    assert area.isnan().all() and mask.mean().item() == pytest.approx(0.25, abs=1e-3)


def test_errors():
    for area in (0.0, 1.0, -0.1):
        with pytest.raises(ConfigError, match=r"area must lie in \(0,1\)"):
            area_masks(logits(), area)
    with pytest.raises(ShapeError, match=r"\[B\] or \[B,K\]"):
        area_masks(logits(), torch.full((5,), 0.1))
    with pytest.raises(ConfigError, match="temperature must be positive"):
        area_masks(logits(), 0.1, 0.0)
    with pytest.raises(ConfigError, match="areas is empty"):
        AreaConditioned(Ordered()).smallest_sufficient(
            explainer.Explanandum(LeftHalf(), 1), torch.ones(1, 3, 8, 8), torch.zeros(1, dtype=torch.long), ()
        )
