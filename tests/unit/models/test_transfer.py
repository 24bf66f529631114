"""A classifier starts from the user's own weights: what fits is taken, the rest is said or refused."""

from __future__ import annotations

import argparse
import logging
import os
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from explainer.config import ClassifierConfig, OptimizerConfig
from explainer.errors import CheckpointError, ConfigError, UnknownNameError
from explainer.models.checkpoints import load_explanandum, read_weights
from explainer.models.classifiers import build_classifier
from explainer.models.transfer import freeze, head_of, init_from
from explainer.tasks.classify import ClassifyTask

WIDTHS = {"widths": [4, 8]}
HEAD = ["head.weight", "head.bias"]


def trained(num_classes: int = 7) -> dict[str, torch.Tensor]:
    """A state_dict whose every number is its own."""
    torch.manual_seed(1)
    state = build_classifier("small_vgg", num_classes, **WIDTHS).state_dict()
    return {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in state.items()}


def task(K: int = 3, **config: object) -> ClassifyTask:
    names = tuple("abcdefghij"[:K])
    return ClassifyTask(ClassifierConfig(options=WIDTHS, **config), K, "multiclass", names, image_size=16)  # type: ignore[arg-type]


WRAPPED = {
    "plain": lambda s: s,
    "module": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "twice": lambda s: {f"module._orig_mod.model.{k}": v for k, v in s.items()},
    "backbone": lambda s: {f"backbone.{k}" if not k.startswith("head") else k: v for k, v in s.items()},
    "net": lambda s: {f"net.{k}": v for k, v in s.items()},
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer": {"lr": 0.1}},
    "model": lambda s: {"model": s, "args": {"lr": 0.1}},
    "ema": lambda s: {"ema": s},
    "lightning": lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "pytorch-lightning_version": "2.0"},
    "model in model": lambda s: {"model": {"state_dict": s}},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_and_prefixes_are_recognised_and_the_head_is_left_out(tmp_path: Path, kind: str) -> None:
    source = trained(7)
    torch.save(WRAPPED[kind](source), tmp_path / "w.pth")
    net = build_classifier("small_vgg", 3, **WIDTHS)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    result = init_from(net, tmp_path / "w.pth", 3)
    after = net.state_dict()
    assert all(torch.equal(after[k], source[k]) for k in after if k not in HEAD)
    shrunk = before["head.weight"] * 0.01 / before["head.weight"].std()  # its own draw, made small
    torch.testing.assert_close(after["head.weight"], shrunk)
    assert not after["head.bias"].any() and list(result.kept) == HEAD
    # 4 convolutions and 4 BatchNorms with 4 tensors each (num_batches_tracked is not counted), and the head's 2.
    assert "20 of 22 tensors" in result.description and "\n" not in result.description
    assert "head.weight (3, 8), (7, 8) there; head.bias (3,), (7,) there" in result.description


def test_a_head_of_the_same_size_is_loaded_too(tmp_path: Path) -> None:
    save_file(trained(3), tmp_path / "w.safetensors")
    net = build_classifier("small_vgg", 3, **WIDTHS)
    result = init_from(net, tmp_path / "w.safetensors", 3)
    assert result.kept == () and torch.equal(net.state_dict()["head.weight"], trained(3)["head.weight"])
    assert result.description.endswith(f"22 of 22 tensors from {tmp_path / 'w.safetensors'}.")


def test_the_same_network_under_other_names_is_paired_by_its_order(tmp_path: Path) -> None:
    renamed = {f"layer{i}.{k.rpartition('.')[2]}": v for i, (k, v) in enumerate(trained(7).items())}
    torch.save(renamed, tmp_path / "w.pth")
    net = build_classifier("small_vgg", 3, **WIDTHS)
    init_from(net, tmp_path / "w.pth", 3)
    assert torch.equal(net.state_dict()["features.1.running_var"], trained(7)["features.1.running_var"])


def test_less_than_nine_tenths_of_the_body_is_refused(tmp_path: Path) -> None:
    source = trained(3)
    del source["features.0.weight"], source["features.1.weight"]  # 18 of 20: exactly 90 %, taken
    torch.save(source, tmp_path / "enough.pth")
    net = build_classifier("small_vgg", 3, **WIDTHS)
    assert "features.0.weight" in init_from(net, tmp_path / "enough.pth", 3).description
    del source["features.1.bias"]  # 17 of 20
    torch.save(source, tmp_path / "little.pth")
    with pytest.raises(CheckpointError, match=r"only 17 of the 20 tensors .* features.0.weight \(4, 3, 3, 3\) is not there.*arch"):
        init_from(net, tmp_path / "little.pth", 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ({"epoch": 3}, "holds no tensors"),
        ({"hyper_parameters": {"kind": "explainer"}}, "expected one of a classifier"),
        ({**{f"net.{k}": v for k, v in trained().items()}, **{f"model.{k}": v for k, v in trained().items()}}, "two tensors for features"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, content: dict[str, object] | None, message: str) -> None:
    if content is not None:
        torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=message):
        task(init_from=str(tmp_path / "w.pth")).start()


def test_checkpoint_is_loaded_or_refused_and_never_ignored(tmp_path: Path) -> None:
    torch.save(trained(3), tmp_path / "w.pth")
    mine = task(checkpoint=str(tmp_path / "w.pth"))
    mine.start()
    assert torch.equal(mine.classifier.state_dict()["head.bias"], trained(3)["head.bias"])
    with pytest.raises(CheckpointError, match=r"nowhere\.pth does not exist"):
        task(checkpoint=str(tmp_path / "nowhere.pth")).start()
    with pytest.raises(CheckpointError, match=r"does not fit small_vgg with 5 classes.*classifier.init_from takes what fits"):
        task(5, checkpoint=str(tmp_path / "w.pth")).start()
    with pytest.raises(ConfigError, match="both say what training starts from"):
        task(checkpoint="a", init_from="b")


def test_a_checkpoint_of_this_project_brings_its_normalisation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = task(7, mean=[0.1, 0.2, 0.3], std=[0.4, 0.4, 0.4])
    state = {f"classifier.{k}": v for k, v in trained(7).items()}
    torch.save({"hyper_parameters": dict(first.hparams), "state_dict": state}, tmp_path / "c.ckpt")
    second = task(3, init_from=str(tmp_path / "c.ckpt"))
    second.start()
    torch.testing.assert_close(second.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    assert second.hparams["classifier"]["std"] == [0.4, 0.4, 0.4]
    with caplog.at_level(logging.WARNING):
        third = task(3, init_from=str(tmp_path / "c.ckpt"), mean=[0.5, 0.5, 0.5])
        third.start()
    assert "classifier.mean is [0.5, 0.5, 0.5]" in caplog.text and float(third.mean[0, 0]) == 0.5
    # What results is resumed with the same normalisation, and is an Explanandum without the first file.
    torch.save({"hyper_parameters": dict(second.hparams), "state_dict": second.state_dict()}, tmp_path / "d.ckpt")
    (tmp_path / "c.ckpt").unlink()
    again = task(3, init_from=str(tmp_path / "c.ckpt"))
    again.on_load_checkpoint(torch.load(tmp_path / "d.ckpt", weights_only=True))
    again.load_state_dict(torch.load(tmp_path / "d.ckpt", weights_only=True)["state_dict"])
    images = torch.rand(2, 3, 16, 16)
    expected = load_explanandum(tmp_path / "d.ckpt")(images)
    torch.testing.assert_close(again.eval()(images), expected)
    torch.testing.assert_close(second.eval()(images), expected)


def test_weights_by_timms_own_road_leave_a_checkpoint_that_needs_no_file(tmp_path: Path) -> None:
    source = build_classifier("timm:resnet10t", 4)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "w.pth"), "num_classes": 4}}
    config = ClassifierConfig(arch="timm:resnet10t", options=options)
    mine = ClassifyTask(config, 4, "multiclass", ("a", "b", "c", "d"))
    assert torch.equal(mine.classifier.state_dict()["fc.weight"], source.state_dict()["fc.weight"])
    saved = {"hyper_parameters": dict(mine.hparams), "state_dict": mine.state_dict()}
    torch.save(saved, tmp_path / "c.ckpt")
    (tmp_path / "w.pth").unlink()
    loaded = load_explanandum(tmp_path / "c.ckpt")
    assert torch.equal(loaded.classifier.state_dict()["fc.weight"], source.state_dict()["fc.weight"])
    # A checkpoint written before names the file: it loads where the user's configuration names the same arch and options.
    saved["hyper_parameters"]["classifier"]["options"] = options
    torch.save(saved, tmp_path / "old.ckpt")
    with pytest.raises(CheckpointError, match="makes a library read another file"):
        load_explanandum(tmp_path / "old.ckpt")
    load_explanandum(tmp_path / "old.ckpt", "timm:resnet10t", options)


HEADS = {
    "small_vgg": "head",
    "resnet50": "fc",
    "torchvision:mobilenet_v3_small": "classifier.3",
    "torchvision:convnext_tiny": "classifier.2",
    "timm:tf_efficientnet_lite0": "classifier",
    "timm:vit_tiny_patch16_224": "head",
}


@pytest.mark.parametrize(("arch", "head"), HEADS.items())
def test_the_head_is_found(arch: str, head: str) -> None:
    with torch.device("meta"):
        net = build_classifier(arch, 11)
    assert head_of(net, 11) == head


def test_freezing_stops_gradients_and_statistics(tmp_path: Path) -> None:
    mine = task(3, freeze="body")
    assert [n for n, p in mine.classifier.named_parameters() if p.requires_grad] == HEAD
    mine.train()
    norm = mine.classifier.features[1]
    assert mine.training and not norm.training, "the statistics of a frozen BatchNorm must not move"
    before = norm.running_mean.clone()
    mine(torch.rand(4, 3, 16, 16)).sum().backward()
    assert torch.equal(norm.running_mean, before) and mine.classifier.head.weight.grad is not None
    some = task(3, freeze=["features.0", "features.1"])
    frozen = [n for n, p in some.classifier.named_parameters() if not p.requires_grad]
    assert frozen == ["features.0.weight", "features.1.weight", "features.1.bias"]
    some.train()
    assert not some.classifier.features[1].training and some.classifier.features[4].training


def test_a_fresh_head_on_trained_features_is_small(tmp_path: Path) -> None:
    """timm's own draw for an EfficientNet is +-0.29 for 12 classes: logits of several units before the first step."""
    names = tuple(str(k) for k in range(12))
    config = ClassifierConfig(arch="efficientnet_lite0", options={"weights": "imagenet"})
    trained_body = ClassifyTask(config, 12, "multilabel", names, image_size=32)
    head = trained_body.classifier.classifier
    assert float(head.weight.std()) == pytest.approx(0.01, rel=1e-3) and not head.bias.any()
    save_file(trained(), tmp_path / "w.safetensors")
    mine = task(3, init_from=str(tmp_path / "w.safetensors"))
    mine.start()
    assert float(mine.classifier.head.weight.std()) <= 0.0101 and not mine.classifier.head.bias.any()
    whole = task(7, init_from=str(tmp_path / "w.safetensors"))
    whole.start()
    assert torch.equal(whole.classifier.head.weight, trained()["head.weight"]), "a head that the file holds is taken as it is"


def test_kept_statistics_do_not_move_and_scale_and_shift_are_trained() -> None:
    mine = task(3, batch_norm="keep").train()
    norms = [m for m in mine.classifier.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [m.running_mean.clone() for m in norms]
    mine(torch.rand(4, 3, 16, 16)).sum().backward()
    assert mine.training and mine.classifier.training and not any(m.training for m in norms)
    assert all(torch.equal(m.running_mean, mean) and m.weight.grad.abs().sum() > 0 for m, mean in zip(norms, before, strict=True))


def test_wrong_freezing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"names 'layer1'.*features, avgpool, head"):
        task(3, freeze=["layer1"])
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        task(3, freeze=["features", "head"])
    with pytest.raises(ConfigError, match="no head with 3 outputs"):
        freeze(nn.Sequential(nn.Conv2d(3, 4, 3)), "body", 3)


def test_the_body_learns_at_its_own_rate() -> None:
    mine = ClassifyTask(
        ClassifierConfig(options=WIDTHS), 3, "multiclass", ("a", "b", "c"), optimizer=OptimizerConfig(lr=0.1, encoder_lr=0.2)
    )
    head, body = mine.configure_optimizers()["optimizer"].param_groups
    assert head["lr"] == 0.1 and body["lr"] == pytest.approx(0.02)
    assert {id(p) for p in head["params"]} == {id(p) for p in mine.classifier.head.parameters()}


def test_a_larger_networks_file_is_refused(tmp_path: Path) -> None:
    """ResNet-34 has every tensor of ResNet-18 with the same shape, and blocks between them."""
    torch.save(build_classifier("timm:resnet34", 3).state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(CheckpointError, match=r"holds \d+ more tensors inside the parts .*layer1\.2.*larger network.*classifier\.arch"):
        init_from(build_classifier("timm:resnet18", 3), tmp_path / "resnet34.pth", 3)


def test_what_lies_beside_the_body_may_stay_behind(tmp_path: Path) -> None:
    """A segmentation network's file: the encoder is taken, the decoder has no place, however large it is."""
    net = build_classifier("timm:resnet18", 3)
    state = {f"encoder.{k}": v for k, v in net.state_dict().items()}
    decoder = {f"decoder.blocks.{i}.conv.weight": torch.rand(2, 2) for i in range(80)}
    torch.save({"state_dict": {**{k.removeprefix("encoder."): v for k, v in state.items()}, **decoder}}, tmp_path / "both.pth")
    assert len(init_from(net, tmp_path / "both.pth", 3).unused) == 80


def test_arguments_and_numbers_beside_the_weights_are_plain_values(tmp_path: Path) -> None:
    """timm's training script stores its arguments and its best metric; code in their place is refused as before."""
    content = {
        "state_dict": build_classifier("small_vgg", 3).state_dict(),
        "args": argparse.Namespace(lr=0.1, model="x"),
        "metric": np.float64(71.5),
        "epoch": np.int64(3),
    }
    torch.save(content, tmp_path / "timm.pth")
    found = read_weights(tmp_path / "timm.pth")
    assert found["metric"] == 71.5 and found["args"].model == "x"
    init_from(build_classifier("small_vgg", 3), tmp_path / "timm.pth", 3)

    class Runs:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"args": argparse.Namespace(lr=Runs())}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="more than tensors and plain values"):
        read_weights(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


def test_torchvisions_weights_come_with_a_fresh_head_for_other_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torchvision.models.resnet18(num_classes=1000)
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", lambda self, **_: whole.state_dict())
    net = build_classifier("torchvision:resnet18", 3, weights="DEFAULT")
    assert net.fc.out_features == 3 and float(net.fc.weight.std()) < 0.02
    assert torch.equal(net.layer4[1].conv2.weight, whole.layer4[1].conv2.weight)
    assert torch.equal(build_classifier("torchvision:resnet18", 1000, weights="IMAGENET1K_V1").fc.weight, whole.fc.weight)
    with pytest.raises(UnknownNameError, match=r"no weights 'IMAGENET1K_V9' of resnet18\. It has IMAGENET1K_V1, DEFAULT"):
        build_classifier("torchvision:resnet18", 3, weights="IMAGENET1K_V9")


def test_without_network_trained_weights_are_an_error_with_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(self: object, **_: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.models.MobileNet_V3_Small_Weights, "get_state_dict", offline)
    with pytest.raises(CheckpointError, match="Without network, download the file"):
        build_classifier("torchvision:mobilenet_v3_small", 3, weights="DEFAULT")
