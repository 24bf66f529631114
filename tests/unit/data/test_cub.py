"""The CUB layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from explainer.data.cub import Cub
from explainer.errors import ConfigError, CorruptSampleError, DatasetNotFoundError
from tests.factories import make_cub


def cub(root: Path, split: str = "train", **options: object) -> Cub:
    return Cub(**{"split": split, "size": 16, "root": str(root), "val_fraction": 0.25, **options})


def test_splits_labels_and_masks(tmp_path: Path) -> None:
    drawn = {d.id: d for d in make_cub(tmp_path)}
    sets = {s: cub(tmp_path, s) for s in ("train", "val", "test")}
    assert [len(sets[s]) for s in ("train", "val", "test")] == [6, 2, 4]
    ids = [r.id for data in sets.values() for r in data.records]
    assert sorted(ids, key=int) == list(drawn) and {r.id for r in sets["test"].records} == {"5", "6", "11", "12"}
    for data in sets.values():
        assert data.class_names == ("Black_footed_Albatross", "Laysan_Albatross") and data.task == "multiclass"
        for i, record in enumerate(data.records):
            ((label, (y0, x0, y1, x1)),) = drawn[record.id].rectangles.items()
            assert data[i].target.tolist() == [float(label == 0), float(label == 1)]
            masks, void = data.original_masks(i)
            expected = torch.zeros(2, 20, 26, dtype=torch.bool)
            expected[label, y0 : y1 - 1, x0:x1] = True  # the last row had two votes of five
            assert torch.equal(masks, expected) and not void.any()


def test_without_segmentations_there_are_no_masks(tmp_path: Path) -> None:
    make_cub(tmp_path)
    (tmp_path / "segmentations").rename(tmp_path / "CUB_200_2011" / "segmentations")
    assert cub(tmp_path, require_masks=True)[0].masks is not None
    shutil.rmtree(tmp_path / "CUB_200_2011" / "segmentations")
    assert cub(tmp_path)[0].masks is None
    with pytest.raises(DatasetNotFoundError, match=r"require_masks is on, but .*segmentations does not exist"):
        cub(tmp_path, require_masks=True)


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"CUB_200_2011 does not exist. Get CUB_200_2011.tgz"):
        cub(tmp_path)
    make_cub(tmp_path)
    base = tmp_path / "CUB_200_2011"
    for bad, error, message in (
        ("1 9", ConfigError, r"image 1 \(.*0000.jpg\) has the unknown class '9'; classes are 1 to 2"),
        ("nonsense", CorruptSampleError, "every line must be '<id> <value>', found 'nonsense'"),
    ):
        (base / "image_class_labels.txt").write_text(bad)
        with pytest.raises(error, match=message):
            cub(tmp_path, "test" if error is CorruptSampleError else "train", val_fraction=0.01)
    make_cub(tmp_path)
    (base / "train_test_split.txt").write_text("\n".join(f"{i} 1" for i in range(1, 13)))
    with pytest.raises(DatasetNotFoundError, match=r"the test split of .* is empty"):
        cub(tmp_path, "test")
    (base / "images.txt").write_text("1 ../../../x.jpg")
    with pytest.raises(CorruptSampleError, match=r"not a plain path"):
        cub(tmp_path, val_fraction=0.01)
    (base / "classes.txt").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"classes.txt does not exist"):
        cub(tmp_path)
    with pytest.raises(ConfigError, match=r"held-out fraction must lie strictly between 0 and 1"):
        make_cub(tmp_path)
        cub(tmp_path, val_fraction=1)


def test_two_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    make_cub(tmp_path)
    path = tmp_path / "CUB_200_2011" / "classes.txt"
    path.write_text("1 001.Auk\n2 002.Auk\n")
    with pytest.raises(ConfigError, match=r"classes\.txt must be a list of one or more different names"):
        cub(tmp_path)
