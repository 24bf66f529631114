"""A user's own images: class folders and CSV."""

from __future__ import annotations

import functools
import operator
from pathlib import Path

import pytest
import torch

from explainer.data.image_folder import CsvDataset, ImageFolder, divide
from explainer.errors import ConfigError, CorruptSampleError, DatasetNotFoundError
from tests.factories import NAMES, make_csv, make_image_folder


def folder(root: Path, split: str = "train", **options: object) -> ImageFolder:
    return ImageFolder(**{"split": split, "size": 16, "root": str(root), **options})


def table(root: Path, split: str = "train", **options: object) -> CsvDataset:
    return CsvDataset(**{"split": split, "size": 16, "root": str(root), **options})


def test_folders_are_classes_in_both_layouts(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "a")
    make_image_folder(tmp_path / "b", splits=False, per_class=10)
    for split in ("train", "val", "test"):
        data = folder(tmp_path / "a", split)
        assert data.class_names == ("cat", "dog") and len(data) == 8
        assert all(data.sample_id(i).split("/")[:2] == [split, data.class_names[int(data.target(i).argmax())]] for i in range(8))
        assert all(data.target(i).sum() == 1 for i in range(8))
    flat = {s: folder(tmp_path / "b", s) for s in ("train", "val", "test")}
    assert [len(d) for d in flat.values()] == [16, 2, 2]
    assert len({r.id for d in flat.values() for r in d.records}) == 20
    assert [int(d.target(i).argmax()) for d in flat.values() for i in range(len(d))].count(0) == 10
    assert folder(tmp_path / "a", class_names=["dog", "cat"]).target(0).tolist() == [0, 1]


def test_folder_masks_with_void(tmp_path: Path) -> None:
    drawn = {d.id: d for d in make_image_folder(tmp_path / "a")}
    data = folder(tmp_path / "a", mask_root=str(tmp_path / "masks"), mask_void=128)
    for i in range(len(data)):
        ((label, (y0, x0, y1, x1)),) = drawn[data.sample_id(i)].rectangles.items()
        masks, void = data.original_masks(i)
        expected, border = torch.zeros(2, 16, 18, dtype=torch.bool), torch.zeros(16, 18, dtype=torch.bool)
        expected[label, y0 + 1 : y1, x0:x1] = True
        border[y0, x0:x1] = True
        assert torch.equal(masks, expected) and torch.equal(void, border)
    whole = folder(tmp_path / "a", mask_root=str(tmp_path / "masks")).original_masks(0)
    assert not whole[1].any() and torch.equal(whole[0].any(0), data.original_masks(0)[0].any(0) | data.original_masks(0)[1])


def test_division_depends_on_names_and_seed_only() -> None:
    names = [f"{i}.jpg" for i in range(20)]
    parts = divide(names, (0.5, 0.25, 0.25))
    assert [len(p) for p in parts.values()] == [10, 5, 5] and sorted(functools.reduce(operator.iadd, parts.values(), [])) == sorted(names)
    assert divide(reversed(names), (0.5, 0.25, 0.25)) == parts != divide(names, (0.5, 0.25, 0.25), seed=1)
    with pytest.raises(ConfigError, match=r"three shares .* that add up to 1"):
        divide(names, (0.5, 0.1, 0.1))


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"'image_folder': the folder .* does not exist. Put one folder per class there"):
        folder(tmp_path / "none")
    with pytest.raises(DatasetNotFoundError, match=r"has no class folders"):
        folder(tmp_path)
    make_image_folder(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"unknown class 'dog'. Known: cat, cow"):
        folder(tmp_path / "a", class_names=["cat", "cow"])
    with pytest.raises(ConfigError, match=r"layout must be auto, splits or flat"):
        folder(tmp_path / "a", layout="deep")
    (tmp_path / "a" / "val" / "bird").mkdir()
    with pytest.raises(ConfigError, match=r"unknown class 'bird'"):
        folder(tmp_path / "a", "val")
    for path in (tmp_path / "a" / "test").rglob("*.png"):
        path.unlink()
    with pytest.raises(DatasetNotFoundError, match=r"the test split of .* is empty: no sample is left. Image files end in"):
        folder(tmp_path / "a", "test")
    with pytest.raises(DatasetNotFoundError, match=r"It is given as mask_root"):
        folder(tmp_path / "a", mask_root=str(tmp_path / "no"))
    (tmp_path / "a" / "train" / "cat" / "0.png").write_bytes(b"GIF89a")
    with pytest.raises(CorruptSampleError, match=r"cat/0\.png: the image"):
        folder(tmp_path / "a")[0]


def test_csv_rows_labels_and_masks(tmp_path: Path) -> None:
    drawn = {d.id: d for d in make_csv(tmp_path)}
    sets = {s: table(tmp_path, s, mask_folder="masks") for s in ("train", "val", "test")}
    assert [len(d) for d in sets.values()] == [6, 2, 2] and {r.id for d in sets.values() for r in d.records} == set(drawn)
    for data in sets.values():
        assert data.class_names == ("bird", "cat", "dog") and data.task == "multilabel"
        for i in range(len(data)):
            d = drawn[data.sample_id(i)]
            assert {data.class_names[k] for k in data.target(i).nonzero().flatten()} == {NAMES[k] for k in d.rectangles}
            masks, _ = data.original_masks(i)
            for k, (y0, x0, y1, x1) in d.rectangles.items():
                mask = masks[data.class_names.index(NAMES[k])]
                assert mask.sum() == (y1 - y0) * (x1 - x0) and mask[y0:y1, x0:x1].all()
    assert table(tmp_path)[0].masks is None


def test_csv_without_header_or_split_and_with_a_file_per_split(tmp_path: Path) -> None:
    make_csv(tmp_path, split_column=False)
    assert sum(len(table(tmp_path, s)) for s in ("train", "val", "test")) == 10
    (tmp_path / "labels.csv").write_text("photos/0.png,cat|dog\nphotos/1.png,\nphotos/2.png\n")
    data = table(tmp_path, separator="|", fractions=(1, 0, 0))
    assert [data.target(i).tolist() for i in range(3)] == [[1, 1], [0, 0], [0, 0]]
    for split, label in (("train", "cat"), ("val", "dog"), ("test", "dog")):
        (tmp_path / f"{split}.csv").write_text(f"path,labels\nphotos/0.png,{label}\n")
    assert table(tmp_path, "val", labels="{split}.csv").target(0).tolist() == [0, 1]


def test_csv_errors(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"labels\.csv does not exist. Write lines like: photo\.jpg,cat;dog"):
        table(tmp_path)
    for text, error, message in (
        ("../x.png,cat", CorruptSampleError, r"labels\.csv: the file name '../x.png' is not a plain path"),
        ("a.png,cat,train,extra", CorruptSampleError, "row 1 has 4 cells, expected path, labels, split"),
        ("a.png,cat,training", ConfigError, "row 1 has the unknown split 'training'"),
        ("a.png,cat,train\nb.png,dog", ConfigError, "the row of 'b.png' has no split"),
        ("a.png,\n", ConfigError, "no row has a label"),
        ("", ConfigError, "no row has a label"),
        ("a.png,cat,val", DatasetNotFoundError, "the train split of .* is empty"),
    ):
        (tmp_path / "labels.csv").write_text(text)
        with pytest.raises(error, match=message):
            table(tmp_path, fractions=(1, 0, 0))
    (tmp_path / "labels.csv").write_text("a.png,cow")
    with pytest.raises(ConfigError, match=r"a.png has the unknown class 'cow'. class_names: cat, dog"):
        table(tmp_path, class_names=["cat", "dog"], fractions=(1, 0, 0))
    with pytest.raises(CorruptSampleError, match=r"a\.png: the image is missing"):
        table(tmp_path, fractions=(1, 0, 0))[0]
