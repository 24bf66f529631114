"""An Explainer's encoder starts as its classifier, whichever library built the two."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from explainer.errors import ConfigError
from explainer.models.classifiers import build_classifier
from explainer.models.encoders import encoder_for, init_encoder
from explainer.models.networks import build_network, encoder_of

#: classifier, encoder that `auto` chooses for it (or another that is the same), name of the classifier's module whose output the
#: encoder's last features are.
PAIRS = [
    ("resnet50", "resnet50", "layer4"),
    ("torchvision:resnet18", "resnet18", "layer4"),
    ("torchvision:resnet18", "tu-resnet18", "layer4"),
    ("timm:resnet10t", "tu-resnet10t", "layer4"),
    ("timm:resnet18", "resnet18", "layer4"),
    ("efficientnet_lite0", "tu-tf_efficientnet_lite0", "blocks.6"),
    ("timm:efficientnet_b0", "tu-efficientnet_b0", "blocks.6"),
    ("torchvision:efficientnet_b0", "tu-efficientnet_b0", "features.7"),
    ("timm:mobilenetv3_small_100", "tu-mobilenetv3_small_100", "blocks.5"),
    ("torchvision:mobilenet_v3_small", "tu-mobilenetv3_small_100", "features.12"),
    ("torchvision:mobilenet_v3_large", "tu-mobilenetv3_large_100", "features.16"),
    ("torchvision:mobilenet_v2", "mobilenet_v2", "features"),
    ("timm:regnety_002", "tu-regnety_002", "s4"),
    ("torchvision:regnet_y_400mf", "tu-regnety_004", "trunk_output"),
    ("torchvision:regnet_x_400mf", "tu-regnetx_004_tv", "trunk_output"),
    ("timm:convnext_atto", "tu-convnext_atto", "stages"),
    ("torchvision:convnext_tiny", "tu-convnext_tiny", "features"),
    ("torchvision:vgg11_bn", "vgg11_bn", "features"),
]


def randomized(net: nn.Module) -> nn.Module:
    """Weights under which every layer matters: library starts leave residual branches at zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.ndim >= 2 and not name.endswith("layer_scale"):
                value.copy_(torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5)
            elif value.is_floating_point():
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    return net.eval()


def features(classifier: nn.Module, module: str, images: torch.Tensor) -> torch.Tensor:
    """Output of a module of the classifier, channels second."""
    kept: list[torch.Tensor] = []
    with classifier.get_submodule(module).register_forward_hook(lambda m, x, y: kept.append(y)), torch.no_grad():
        classifier(images)
    return kept[0]


HEAVY = ("resnet50", "torchvision:efficientnet_b0", "torchvision:mobilenet_v3_large", "torchvision:convnext_tiny", "torchvision:vgg11_bn")


@pytest.mark.parametrize(
    ("arch", "encoder", "module"), [pytest.param(*pair, marks=[pytest.mark.slow] if pair[0] in HEAVY else []) for pair in PAIRS]
)
def test_encoder_computes_the_classifiers_features(arch: str, encoder: str, module: str) -> None:
    classifier = randomized(build_classifier(arch, 5))
    network = build_network("unet", 5, encoder_name=encoder, decoder_channels=[8] * 5).eval()
    assert init_encoder(network, classifier) == len(encoder_of(network).state_dict())
    images = torch.rand(1, 3, 64, 64)
    expected = features(classifier, module, images)
    with torch.no_grad():
        found = network.encoder(images)[-1]
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("arch", "encoder"),
    [
        *[
            (arch, encoder)
            for arch, encoder, _ in PAIRS
            if (arch, encoder) not in [("torchvision:resnet18", "tu-resnet18"), ("timm:resnet18", "resnet18")]
        ],
        ("efficientnet_lite2", "tu-tf_efficientnet_lite2"),
        ("vgg16", "vgg16"),
        ("timm:tf_efficientnet_lite0.in1k", "tu-tf_efficientnet_lite0.in1k"),
    ],
)
def test_auto_is_the_classifiers_own(arch: str, encoder: str) -> None:
    assert encoder_for(arch) == encoder


@pytest.mark.parametrize(("arch", "hint"), [("small_vgg", "vgg_unet"), (None, "encoder_name"), ("timm:resnet18x", "mean resnet18")])
def test_auto_without_an_encoder_is_refused(arch: str | None, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        encoder_for(arch)


def test_dilation_does_not_hide_the_counterparts() -> None:
    classifier = randomized(build_classifier("torchvision:mobilenet_v3_small", 5))
    network = build_network("deeplabv3plus", 5, encoder_name="tu-mobilenetv3_small_100", encoder_output_stride=16)
    init_encoder(network, classifier)
    state = network.encoder.state_dict()
    assert torch.equal(state["model.conv_stem.weight"], classifier.state_dict()["features.0.0.weight"])
    # The two libraries' BatchNorms differ in epsilon (1e-3 and 1e-5): the weight makes up for it.
    var = classifier.state_dict()["features.0.1.running_var"]
    expected = classifier.state_dict()["features.0.1.weight"] * ((var + 1e-5) / (var + 1e-3)).sqrt()
    torch.testing.assert_close(state["model.bn1.weight"], expected)


def test_another_network_is_refused() -> None:
    network = build_network("unet", 3, encoder_name="tu-regnety_002")
    with pytest.raises(ConfigError, match=r"layer model\.stem\.conv .* could not be paired: .*encoder_name: auto"):
        init_encoder(network, build_classifier("torchvision:mobilenet_v3_small", 3))


def test_layers_that_cannot_be_told_apart_are_refused() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.one(x) - self.two(x)).mean((2, 3))

    from explainer.models.flow import copy_by_flow

    with pytest.raises(ConfigError, match=r"2 layers of the classifier have the same shapes and input \(one, two\)"):
        copy_by_flow(Twins(), Twins(), "here")


def test_the_same_names_with_another_padding_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """smp's own EfficientNet-Lite pads evenly where TensorFlow's, which the weights are of, does not."""
    classifier = randomized(build_classifier("efficientnet_lite0", 3))
    with caplog.at_level(logging.WARNING):
        init_encoder(build_network("unet", 3, encoder_name="tu-tf_efficientnet_lite0"), classifier)
        assert not caplog.records
        init_encoder(build_network("unet", 3, encoder_name="timm-tf_efficientnet_lite0"), classifier)
    assert "computes other features from the layer bn1 on" in caplog.text and "encoder_name auto" in caplog.text
