"""A model of a thousand classes: only the chosen classes' masks are computed, written and shown."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from explainer.errors import ConfigError
from explainer.export.safetensors import EagerRuntime
from explainer.inference.explaining import MANY, ExplainOptions, explain
from explainer.models.classifiers import build_classifier
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum

K = MANY + 20


@pytest.fixture(scope="module")
def model() -> EagerRuntime:
    torch.manual_seed(0)
    classifier = build_classifier("timm:resnet10t", K)
    classifier.fc.weight.data.mul_(20)
    e = Explanandum(classifier, K, "multiclass", mean=[0.5] * 3, std=[0.5] * 3)
    net = Explainer("fpn", K, {"width": 8}, image_size=64, mean=[0.5] * 3, std=[0.5] * 3, encoder="shared", explanandum=e)
    return EagerRuntime(net.eval())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return tmp_path


def test_the_most_probable_classes_are_explained(model, folder, monkeypatch):
    monkeypatch.setattr(model, "run", lambda images: pytest.fail("all classes were computed"))
    found = explain([folder], model, folder / "out", ExplainOptions(top=5, batch_size=2))
    assert len(found["images"]) == 3
    for row in found["images"]:
        assert len(row["chosen"]) == 5 and list(row["areas"]) == row["chosen"] == list(row["scores"])
        scores = list(row["scores"].values())
        assert scores == sorted(scores, reverse=True)
        stored = np.load(folder / "out" / row["name"] / "masks.npz")
        assert stored["masks"].shape == (5, 64, 64) and stored["classes"].tolist() == row["chosen"]
        # the same masks as from the whole network, class by class
        side = torch.from_numpy(np.array(Image.open(folder / row["name"]).convert("RGB"))).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            every = model.net(torch.nn.functional.interpolate(side, (64, 64), mode="bilinear", antialias=True))[0]
        for mask, name in zip(stored["masks"], row["chosen"], strict=True):
            assert np.abs(mask - every[int(name)].numpy()).max() < 0.05, "up to the picture's resizing"
    assert (folder / "out" / "contact_sheet_001.png").is_file()
    assert json.loads((folder / "out" / "results.json").read_text())["images"][0]["chosen"] == found["images"][0]["chosen"]


def test_named_classes_and_what_cannot_be_asked(model, folder):
    found = explain([folder], model, folder / "out", ExplainOptions(classes=["7", "110"]))
    assert all(row["chosen"] == ["7", "110"] for row in found["images"])
    with pytest.raises(ConfigError, match="--area"):
        explain([folder], model, folder / "out", ExplainOptions(areas=[0.1]))
    other = EagerRuntime(model.net)
    other.explanandum = None
    with pytest.raises(ConfigError, match="--classifier FILE"):
        explain([folder], other, folder / "out")
