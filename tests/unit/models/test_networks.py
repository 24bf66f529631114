from __future__ import annotations

import copy

import pytest
import torch

from explainer.errors import ConfigError
from explainer.models.classifiers import build_classifier
from explainer.models.encoders import init_encoder
from explainer.models.networks import build_network, drop_unused

OPTIONS = {"encoder_name": "resnet18", "encoder_depth": 3, "decoder_channels": [8, 8, 8]}


def _raw() -> torch.nn.Module:
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    return smp.Unet(classes=3, encoder_weights=None, **OPTIONS)


def test_unused_encoder_stages_are_dropped_and_the_output_stays() -> None:
    raw = _raw().eval()
    images = torch.rand(2, 3, 32, 48)
    lean = drop_unused(copy.deepcopy(raw))
    assert not lean.training and torch.equal(lean(images), raw(images))
    count, before = (sum(p.numel() for p in net.parameters()) for net in (lean, raw))
    # Of ResNet-18, layer3 (2,099,712) and layer4 (8,393,728) lie below depth 3.
    assert before - count == 2_099_712 + 8_393_728
    lean.train()(images).sum().backward()
    assert all(p.grad is not None for p in lean.parameters())


def test_dropping_restores_the_mode_and_the_flags_and_spares_statistics() -> None:
    raw = _raw().train()
    raw.encoder.conv1.requires_grad_(False)
    statistics = raw.encoder.bn1.running_mean.clone()
    random_state = torch.get_rng_state()
    lean = drop_unused(raw)
    assert lean.training and not lean.encoder.conv1.weight.requires_grad and lean.encoder.layer1[0].conv1.weight.requires_grad
    assert torch.equal(lean.encoder.bn1.running_mean, statistics) and torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in lean.parameters())


def test_weights_saved_with_the_unused_stages_still_load_strictly() -> None:
    raw = _raw()
    lean = build_network("unet", 3, **OPTIONS)
    state = raw.state_dict()
    assert not lean.load_state_dict(state).unexpected_keys
    assert any(key.startswith("encoder.layer4") for key in state), "the caller's dictionary must not change"
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(lean.eval()(images), raw.eval()(images))
    state["decoder.typo"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"decoder\.typo"):
        lean.load_state_dict(state)


def test_a_network_that_uses_everything_keeps_everything() -> None:
    net = build_network("deeplabv3plus", 3, encoder_name="resnet18")
    assert not net._load_state_dict_pre_hooks
    assert not any(isinstance(m, torch.nn.Identity) for m in net.encoder.layer4.modules())


def test_options_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match=r"'unet' could not be built with options \{'encoder_name': 'resnet99'\}"):
        build_network("unet", 3, encoder_name="resnet99")


def test_vgg_deeplab_reads_the_two_finest_stages_and_the_classifiers_own_encoder():
    torch.manual_seed(0)
    classifier = build_classifier("small_vgg", 3, widths=[4, 6, 8, 8]).eval()
    net = build_network("vgg_deeplab", 3, widths=[4, 6, 8, 8], decoder_channels=8).eval()
    assert init_encoder(net, classifier) > 20
    x, seen = torch.rand(2, 3, 32, 48), []
    net.decoder.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    assert net(x).shape == (2, 3, 32, 48)
    assert [tuple(f.shape[1:]) for f in seen] == [(4, 32, 48), (6, 16, 24), (8, 4, 6)]
    torch.testing.assert_close(seen[-1], classifier.features(x))
    with pytest.raises(ConfigError, match="widths needs at least 3 entries"):
        build_network("vgg_deeplab", 3, widths=[4, 4])
