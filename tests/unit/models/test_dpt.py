"""DPT: an Explainer for vision transformers, whose encoder is the classifier's own network."""

from __future__ import annotations

import pytest
import torch
from timm import create_model
from torch import Tensor, nn

import explainer
from explainer.errors import ConfigError
from explainer.models.encoders import init_encoder
from explainer.models.explainer import Explainer
from explainer.models.networks import build_network, encoder_of

VIT = {"embed_dim": 24, "num_heads": 2}
OPTIONS = {
    "encoder_name": "tu-vit_tiny_patch16_224",
    "decoder_intermediate_channels": (8, 8, 8, 8),
    "decoder_fusion_channels": 8,
    "img_size": 64,
    **VIT,
}


def last_block(network: nn.Module, images: Tensor, run: nn.Module) -> Tensor:
    """Tokens that leave the last block of ``network`` while ``run`` sees the images."""
    seen: list[Tensor] = []
    handle = network.blocks[-1].register_forward_hook(lambda m, i, out: seen.append(out))
    with torch.no_grad():
        run(images)
    handle.remove()
    return seen[-1]


def test_the_encoder_computes_the_classifiers_features() -> None:
    torch.manual_seed(0)
    network = build_network("dpt", 3, **OPTIONS).eval()
    classifier = create_model("vit_tiny_patch16_224", num_classes=3, img_size=64, **VIT).eval()
    encoder, images = encoder_of(network), torch.rand(2, 3, 64, 64)
    assert (last_block(encoder, images, network) - last_block(classifier, images, classifier)).abs().max() > 0.1
    assert init_encoder(network, classifier) == len(encoder.state_dict())
    torch.testing.assert_close(last_block(encoder, images, network), last_block(classifier, images, classifier))


def test_masks_of_any_image_size_and_all_weights_learn() -> None:
    net = Explainer("dpt", 3, {**OPTIONS})
    for height, width in ((64, 64), (48, 80), (50, 33)):
        masks = net(torch.rand(2, 3, height, width))
        assert masks.shape == (2, 3, height, width)
        assert masks.min() >= 0 and masks.max() <= 1
    net.train()
    net(torch.rand(2, 3, 64, 64)).square().mean().backward()
    assert not [name for name, p in net.network.named_parameters() if p.grad is None], "they would stop DistributedDataParallel"


def test_a_saved_one_is_rebuilt(tmp_path) -> None:
    net = Explainer("dpt", 3, {**OPTIONS, "decoder_intermediate_channels": [8, 8, 8, 8]}).eval()
    twin = Explainer.from_config(net.config).eval()
    twin.load_state_dict(net.state_dict())
    images = torch.rand(1, 3, 32, 48)
    assert torch.equal(twin(images), net(images))
    assert isinstance(twin, explainer.models.explainer.Explainer)


def test_an_encoder_that_is_no_vision_transformer_is_refused() -> None:
    with pytest.raises(ConfigError, match="dpt"):
        build_network("dpt", 3, encoder_name="resnet18")
