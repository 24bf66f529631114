"""Only the classes that are asked for are computed, and their masks are those of the whole network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from explainer.errors import ConfigError, ShapeError
from explainer.models.class_layer import ClassConv2d, check_classes, only_classes, per_image, with_class_layer
from explainer.models.explainer import Explainer


def small(network: str, **options: object) -> Explainer:
    torch.manual_seed(0)
    return Explainer(network, 7, options, image_size=64).eval()


@pytest.mark.parametrize(
    ("network", "options"),
    [
        ("vgg_unet", {"widths": [4, 8, 8], "decoder_channels": [8, 4]}),
        ("vgg_deeplab", {"widths": [4, 8, 8], "decoder_channels": 8}),
        ("deeplabv3plus", {"encoder_name": "resnet18"}),
        ("unet", {"encoder_name": "resnet18", "decoder_channels": [16, 16, 8, 8, 4]}),
    ],
)
def test_chosen_classes_are_columns_of_all(network, options):
    net, images = small(network, **options), torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        every = net(images)
        assert torch.allclose(net(images, [3, 0]), every[:, [3, 0]], atol=1e-6)
        own = torch.tensor([[5, 1, 2], [0, 6, 5]])
        expected = torch.stack([every[0, own[0]], every[1, own[1]]])
        assert torch.allclose(net(images, own), expected, atol=1e-6)
        assert torch.equal(net(images), every), "the choice ends with the call"


def test_per_image_filters_against_one_convolution_an_image():
    torch.manual_seed(0)
    x, w, b = torch.randn(3, 4, 6, 5), torch.randn(3, 2, 4, 3, 3), torch.randn(3, 2)
    expected = torch.cat([nn.functional.conv2d(x[i : i + 1], w[i], b[i], padding=1) for i in range(3)])
    assert torch.allclose(per_image(x, w, b, (1, 1)), expected, atol=1e-5)


def test_a_choice_is_undone_after_an_error_and_nested_choices_come_back():
    layer, x = ClassConv2d(2, 5, 1), torch.rand(1, 2, 3, 3)
    with pytest.raises(RuntimeError), only_classes(torch.tensor([1])):
        raise RuntimeError
    assert layer(x).shape[1] == 5
    with only_classes(torch.tensor([1, 2])):
        with only_classes(None):
            assert layer(x).shape[1] == 5
        assert layer(x).shape[1] == 2


def test_bad_classes_are_refused():
    for wrong in ([], [[0], [1], [2]], [0.5], [True]):
        with pytest.raises(ShapeError, match="class indices"):
            check_classes(wrong, 2, 4)
    for wrong in (["cat"], [[0], [1, 2]], [None]):
        with pytest.raises(ShapeError, match=r"class indices.*net\.class_names"):
            check_classes(wrong, 2, 4)
    for wrong in ([4], [-1]):
        with pytest.raises(ConfigError, match=r"0\.\.3"):
            check_classes(wrong, 2, 4)
    with pytest.raises(ConfigError, match="does not end in a convolution"):
        with_class_layer(nn.Sequential(nn.Conv2d(3, 4, 1)), 5)


def test_images_of_another_precision_are_taken_in_that_of_the_weights():
    net = small("vgg_unet", widths=[4, 8], decoder_channels=[4])
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        masks = net(images)
        for dtype, tolerance in ((torch.float64, 1e-6), (torch.float16, 1e-2)):
            other = net(images.to(dtype))
            assert other.dtype == torch.float32 and torch.allclose(other, masks, atol=tolerance)
        with torch.autocast("cpu", torch.bfloat16):
            assert net(images.bfloat16()).shape == masks.shape


@pytest.mark.parametrize(
    ("shape", "remedy"),
    [((2, 16, 16, 3), r"permute\(0, 3, 1, 2\)"), ((2, 4, 16, 16), r"images\[:, :3\]"), ((2, 1, 16, 16), "grey channel three times")],
)
def test_images_that_are_not_rgb_are_refused_with_what_makes_them_so(shape, remedy):
    with pytest.raises(ShapeError, match=remedy):
        small("vgg_unet", widths=[4, 8], decoder_channels=[4])(torch.rand(shape))


def test_images_that_are_normalised_already_are_refused():
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    normalised = (images - 0.5) / 0.2
    with pytest.raises(ShapeError, match=r"received values -2\.\d* to 2\.\d*.*leave out Normalize"):
        small("vgg_unet", widths=[4, 8], decoder_channels=[4])(normalised)
