import pytest
import torch

from explainer.errors import ConfigError, UnknownNameError
from explainer.models.classifiers import SmallVGG, build_classifier
from explainer.models.explainer import Explainer
from explainer.models.networks import build_network, init_encoder


def test_vgg_unet_starts_from_the_classifier():
    torch.manual_seed(0)
    net, classifier = build_network("vgg_unet", 3, widths=[8, 12, 16], decoder_channels=[8, 8]), SmallVGG(3, (8, 12, 16))
    assert init_encoder(net, classifier) == len(classifier.features.state_dict())
    for a, b in zip(net.encoder.features.parameters(), classifier.features.parameters(), strict=True):
        assert torch.equal(a, b) and a is not b
    assert net(torch.rand(2, 3, 16, 24)).shape == (2, 3, 16, 24)


def test_smp_encoder_starts_from_a_torchvision_classifier():
    classifier = build_classifier("torchvision:resnet18", 4)
    net = build_network("deeplabv3plus", 4, encoder_name="resnet18")
    assert init_encoder(net, classifier) >= 120
    assert torch.equal(net.encoder.layer3[0].conv1.weight, classifier.layer3[0].conv1.weight)


def test_another_architecture_is_refused():
    with pytest.raises(ConfigError, match="Choose an encoder of the classifier's own architecture"):
        init_encoder(build_network("unet", 3, encoder_name="resnet18"), SmallVGG(3))


def test_explainer_accepts_any_size_and_is_a_function_of_the_image():
    torch.manual_seed(0)
    net = Explainer("vgg_unet", 3, {"widths": [8, 8], "decoder_channels": [8]}, stride=8).eval()
    for size in ((32, 32), (17, 41), (8, 8)):
        masks = net(torch.rand(1, 3, *size))
        assert masks.shape == (1, 3, *size) and masks.min() >= 0 and masks.max() <= 1
    x = torch.rand(2, 3, 24, 24)
    torch.testing.assert_close(net(x)[1:], net(x[1:]))
    half = Explainer("vgg_unet", 3, {"widths": [8, 8], "decoder_channels": [8]}, stride=8, downscale=2).eval()
    assert half(torch.rand(1, 3, 30, 50)).shape == (1, 3, 30, 50)


def test_names_are_answered():
    with pytest.raises(UnknownNameError, match="Known: deeplabv3"):
        build_network("deeplab", 2)
    with pytest.raises(ConfigError, match="could not be built with options"):
        build_network("unet", 2, encoder_name="resnet18", depth=3)
    with pytest.raises(UnknownNameError, match="timm:<model>"):
        build_classifier("vgg", 2)
    with pytest.raises(UnknownNameError, match="cannot be imported"):
        build_classifier("no.such.module:net", 2)
