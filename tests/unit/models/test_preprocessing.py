"""Normalisation and size are the model's own unless they are given."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from explainer.commands.building import sized_options
from explainer.config import ClassifierConfig, DataConfig
from explainer.models.checkpoints import load_explanandum
from explainer.models.preprocessing import normalization, recorded
from explainer.tasks.classify import ClassifyTask

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    ("arch", "options", "expected", "size"),
    [
        ("efficientnet_lite0", {}, HALF, 224),
        ("efficientnet_lite2", {}, HALF, 260),
        ("timm:tf_efficientnet_lite0", {}, HALF, 224),
        ("timm:convnext_tiny", {}, IMAGENET, 224),
        ("timm:resnet10t", {}, IMAGENET, 176),
        ("timm:resnet10t", {"pretrained_cfg_overlay": {"mean": [0.1, 0.2, 0.3]}}, ([0.1, 0.2, 0.3], IMAGENET[1]), 176),
        ("resnet50", {"weights": "IMAGENET1K_V2"}, IMAGENET, 224),
        ("torchvision:regnet_y_400mf", {}, IMAGENET, 224),
        ("vgg16", {"weights": "IMAGENET1K_FEATURES"}, ([0.48235, 0.45882, 0.40784], [1 / 255] * 3), 224),
        ("small_vgg", {}, IMAGENET, None),
        ("timm:no_such_model", {}, IMAGENET, None),
        ("torchvision:fasterrcnn_resnet50_fpn", {}, IMAGENET, None),
        ("mine.nets:build", {}, IMAGENET, None),
    ],
)
def test_what_the_libraries_record(arch: str, options: dict, expected: tuple[list[float], list[float]], size: int | None) -> None:
    mean, std = normalization(arch, options, None, None)
    assert mean == pytest.approx(expected[0]) and std == pytest.approx(expected[1])
    found = recorded(arch, options)
    assert (found and found.size) == size
    assert normalization(arch, options, [0.0], [1.0]) == ([0.0], [1.0]), "what is given wins"


def test_a_wrong_normalisation_of_trained_weights_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        normalization("efficientnet_lite0", {"weights": "imagenet"}, *HALF)
        normalization("efficientnet_lite0", {}, *IMAGENET)  # random weights: any will do
        assert not caplog.records
        normalization("efficientnet_lite0", {"weights": "imagenet"}, *IMAGENET)
    assert "classifier.mean is [0.485, 0.456, 0.406], but the weights were trained with [0.5, 0.5, 0.5]" in caplog.text


def test_explanandum_and_training_take_the_models_own() -> None:
    net = load_explanandum(None, "timm:tf_efficientnet_lite0", {}, 3)
    assert net.normalization == HALF
    task = ClassifyTask(ClassifierConfig(arch="timm:tf_efficientnet_lite0"), 3, "multiclass", ("a", "b", "c"))
    assert task.mean.flatten().tolist() == HALF[0] and task.hparams["classifier"]["std"] == HALF[1]
    assert load_explanandum(None, "small_vgg", {"widths": [4]}, 3).normalization == IMAGENET, "digits as given, not float32's"


def test_fingerprints_of_earlier_versions_stay() -> None:
    """Explicit ImageNet numbers, the default until now, and null give one classifier."""
    torch.manual_seed(0)
    a = load_explanandum(None, "small_vgg", {"widths": [4]}, 3)
    torch.manual_seed(0)
    b = load_explanandum(None, "small_vgg", {"widths": [4]}, 3, mean=IMAGENET[0], std=IMAGENET[1])
    assert a.fingerprint() == b.fingerprint()


def test_a_model_of_fixed_size_resizes_its_input() -> None:
    task = ClassifyTask(ClassifierConfig(arch="timm:vit_tiny_patch16_224"), 3, "multiclass", ("a", "b", "c"), image_size=64).eval()
    assert task.config.input_size == 224 and task(torch.rand(1, 3, 64, 64)).shape == (1, 3)


def test_the_size_of_images_follows_the_classifier(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files, lite = DataConfig(name="image_folder", options={"root": "x"}), ClassifierConfig(arch="efficientnet_lite1")
    assert sized_options(files, lite) == {"root": "x", "size": 240}
    assert sized_options(DataConfig(name="shapes"), lite) == {}, "generated images have their own size"
    assert sized_options(files, ClassifierConfig()) == {"root": "x"}
    with caplog.at_level(logging.WARNING):
        given = DataConfig(name="image_folder", options={"size": 200})
        assert sized_options(given, lite) == {"size": 200} and not caplog.records
        sized_options(DataConfig(name="image_folder", options={"size": 96}), lite)
    assert "data.options.size is 96 px, but timm's tf_efficientnet_lite1 was trained with images of 240 px" in caplog.text
    task = ClassifyTask(ClassifierConfig(options={"widths": [4]}), 3, "multiclass", ("a", "b", "c"), image_size=112)
    torch.save({"hyper_parameters": dict(task.hparams), "state_dict": task.state_dict()}, tmp_path / "c.ckpt")
    trained = ClassifierConfig(checkpoint=str(tmp_path / "c.ckpt"), arch="efficientnet_lite1")
    assert sized_options(files, trained)["size"] == 112, "the checkpoint knows best"
