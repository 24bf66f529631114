"""BRODEN's layout, written by hand for three small images: numbers above 255, several maps, scenes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from explainer.data.broden import Broden
from explainer.errors import ConfigError, CorruptSampleError, DatasetNotFoundError
from tests.factories import make_broden


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_broden(tmp_path)
    return tmp_path


def test_classes_pixels_and_scenes(root):
    data = Broden("train", 8, str(root))
    assert data.class_names == ("wall", "red-c", "abbey-s", "wheel", "banded") and len(data) == 3
    assert data.categories == {"wall": "object", "red-c": "color", "abbey-s": "scene", "wheel": "part", "banded": "texture"}
    sample = data[0]
    assert sample.target.tolist() == [1, 1, 1, 1, 0]
    expected = torch.zeros(5, 8, 8, dtype=torch.bool)  # maps of 4 x 4 pixels on an image of 8 x 8
    expected[0, :4] = True
    expected[1, :, :4] = True
    expected[2] = True  # a scene is everywhere
    expected[3, 6:, 6:] = True  # number 300 = 44 red + 256 green
    assert torch.equal(sample.masks, expected) and not sample.void.any()
    assert data.target(1).tolist() == [1, 1, 0, 1, 0]
    assert data.target(2).tolist() == [0, 0, 1, 0, 1] and data[2].masks[4].all()  # two image-level labels, no maps
    assert len(Broden("val", 8, str(root))) == len(Broden("test", 8, str(root))) == 1


def test_some_categories_or_classes(root):
    parts = Broden("train", 8, str(root), categories=["part", "texture"])
    assert parts.class_names == ("wheel", "banded") and parts[0].masks.shape == (2, 8, 8)
    kept = Broden("train", 8, str(root), keep=["wheel", "wall"])
    assert kept.class_names == ("wheel", "wall") and kept.target(0).tolist() == [1, 1] and kept[0].masks[1, :4].all()
    with pytest.raises(ConfigError, match="'roof'"):
        Broden("train", 8, str(root), keep=["roof"])
    with pytest.raises(ConfigError, match="categories must be some of"):
        Broden("train", 8, str(root), categories=["things"])


def test_what_is_missing_or_broken_is_named(root):
    labels = (root / "label.csv").read_text()
    fingerprint = Broden("train", 8, str(root)).fingerprint()
    shutil.copy(root / "images" / "ade20k" / "0_part_0.png", root / "images" / "ade20k" / "0_color.png")
    assert Broden("train", 8, str(root)).fingerprint() != fingerprint
    (root / "label.csv").write_text(labels.replace("part(12)", "thing(12)"))
    with pytest.raises(CorruptSampleError, match=r"'wheel' has the number '300' and the category 'thing\(12\)'"):
        Broden("train", 8, str(root))
    (root / "label.csv").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"label\.csv does not exist"):
        Broden("train", 8, str(root))
    (root / "index.csv").write_text("image,split\na.jpg,train\n")
    (root / "label.csv").write_text(labels)
    with pytest.raises(CorruptSampleError, match="the column 'color' is missing"):
        Broden("train", 8, str(root))
