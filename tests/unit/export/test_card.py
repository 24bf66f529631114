"""The model card: what the Hub reads in it, what it says, and what outside text cannot do to it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from explainer.export.card import card, examples_name, write_card
from explainer.export.exporting import export
from explainer.inference.describe import describe
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum

HOSTILE = "---\nlicense: stolen\n---\n<img src=x> | [a](b)"


@pytest.fixture
def description(net: Explainer) -> dict[str, Any]:
    return describe(net)


def test_the_hub_reads_its_metadata(description: dict[str, Any]) -> None:
    data = ModelCard(card(description, {}, None, "MIT")).data
    assert (data.library_name, data.pipeline_tag, data.license, data.license_name) == ("explainer", "image-segmentation", "mit", None)
    assert data.tags == ["explainability", "saliency", "class-masks"]
    data = ModelCard(card(description, {}, None, "for research: ask\nus")).data
    assert (data.license, data.license_name) == ("other", "for research: ask us")
    assert ModelCard(card(description, {})).data.license is None


def test_it_says_what_it_is_for_and_what_not(description: dict[str, Any]) -> None:
    text = card(description, {})
    order = [text.index(f"## {title}\n") for title in ("Use", "What it is", "Intended use", "Limits", "Examples", "Metrics", "Licence")]
    assert order == sorted(order) and "audit the classifier" in text and "Not for decisions about people" in text


def test_names_from_outside_stay_text(description: dict[str, Any]) -> None:
    own = {**description, "classes": [HOSTILE], "fill": HOSTILE, "data": {"name": HOSTILE}, "versions": {"torch": HOSTILE}}
    own["explainer"] = {"network": HOSTILE, "options": {"encoder_name": HOSTILE}}
    text = card(own, {}, {HOSTILE: 0.5})
    read = ModelCard(text)
    assert read.data.license is None and not re.search(r"(?<!\\)<img|(?<!\\)\](?<!\\)\(b", text)
    assert text.count("\n---\n") == 1, "the metadata ends once"
    assert len([line for line in text.splitlines() if "0.5000" in line]) == 1 and text.count("\n## ") == 8


def test_metrics_are_numbers_of_the_evaluation(description: dict[str, Any], tmp_path: Path) -> None:
    values = {"val/target_iou": 0.75, "train/loss": 2.0, "done": True, "name": "x", "broken": float("nan")}
    write_card(tmp_path, description, values, "MIT")
    text = (tmp_path / "README.md").read_text()
    assert r"| val/target\_iou | 0.7500 |" in text and text.count("| 0.7500 |") == 1
    for name in ("train/loss", "done", "broken"):
        assert name not in text
    write_card(tmp_path, description)
    assert (tmp_path / "README.md").read_text() == text, "taken over from the card of the same weights, as they were"


def test_examples_are_shown_with_the_masks_of_their_classes(
    net: Explainer, classifier: Explanandum, images: np.ndarray, description: dict[str, Any], tmp_path: Path
) -> None:
    export(net, "safetensors", tmp_path, explanandum=classifier, examples=images[:2])
    name = examples_name(description["weights"])
    assert f"]({name})" in (tmp_path / "README.md").read_text() and f"`{description['weights']}`" in (tmp_path / "README.md").read_text()
    with Image.open(tmp_path / name) as sheet:
        assert sheet.width > sheet.height > 100 and len(sheet.convert("L").getcolors()) > 50
    write_card(tmp_path, description)
    assert f"]({name})" in (tmp_path / "README.md").read_text(), "kept by later cards of the same weights"
    other = card({**description, "weights": "0123"}, {}, files=[name])
    assert "--examples FOLDER" in other and f"]({name})" not in other
