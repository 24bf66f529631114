"""A user's own images: class folders and CSV."""

from __future__ import annotations

import functools
import operator
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from explainer.data.csv_table import CsvDataset
from explainer.data.image_folder import ImageFolder, divide
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
    assert len(folder(tmp_path / "a", "val")) == 8, "an empty folder is no class"
    shutil.copy(tmp_path / "a" / "val" / "cat" / "0.png", tmp_path / "a" / "val" / "bird")
    with pytest.raises(ConfigError, match=r"unknown class 'bird'"):
        folder(tmp_path / "a", "val")
    for path in (tmp_path / "a" / "test").rglob("*.png"):
        path.unlink()
    with pytest.raises(DatasetNotFoundError, match=r"the test split of .* is empty: no sample is left. Image files end in"):
        folder(tmp_path / "a", "test")
    make_image_folder(tmp_path / "few", splits=False)
    with pytest.raises(DatasetNotFoundError, match=r"The shares .* of each class's images \(at most 4\) leave none for it: add images"):
        folder(tmp_path / "few", "test")
    with pytest.raises(DatasetNotFoundError, match=r"0\.png is a file, not a folder"):
        folder(tmp_path / "few" / "cat" / "0.png")
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


def test_what_systems_leave_is_neither_image_nor_class(tmp_path: Path) -> None:
    root = tmp_path / ".hidden parents do not matter" / "a"
    make_image_folder(root)
    expected = {s: [r.id for r in folder(root, s).records] for s in ("train", "val", "test")}
    picture = (root / "train" / "cat" / "0.png").read_bytes()
    for junk in (
        "train/cat/.ipynb_checkpoints/0-checkpoint.png",
        "train/cat/@eaDir/0.png",
        "train/cat/._0.png",
        "train/cat/Thumbs.db",
        "train/__MACOSX/0.png",
        "train/@eaDir/x.png",
        "train/.ipynb_checkpoints/x.png",
        "__MACOSX/train/cat/0.png",
        "val/@eaDir/1.png",
        "train/dog/#recycle/0.png",
        "train/dog/lost+found/0.png",
    ):
        (root / junk).parent.mkdir(parents=True, exist_ok=True)
        (root / junk).write_bytes(picture)
    for split, ids in expected.items():
        data = folder(root, split)
        assert data.class_names == ("cat", "dog") and [r.id for r in data.records] == ids


def test_empty_class_folders_are_classes_only_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_image_folder(tmp_path / "a")
    (tmp_path / "a" / "train" / "bird").mkdir()
    (tmp_path / "a" / "train" / "bird" / "notes.txt").write_text("none yet")
    assert folder(tmp_path / "a").class_names == ("cat", "dog") and "folder(s) without images are no classes: bird" in caplog.text
    assert folder(tmp_path / "a", class_names=["bird", "cat", "dog"]).class_names == ("bird", "cat", "dog")


@pytest.mark.parametrize("splits", [True, False])
def test_a_root_of_images_and_masks_is_recognised(tmp_path: Path, splits: bool) -> None:
    make_image_folder(tmp_path / "images", splits=splits, per_class=10)
    data = folder(tmp_path)
    assert data.class_names == ("cat", "dog") and all(r.mask is not None for r in data.records)
    same = folder(tmp_path / "images", mask_root=str(tmp_path / "masks"))
    assert [(r.id, r.mask) for r in data.records] == [(r.id, r.mask) for r in same.records]


def test_a_layout_that_must_not_be_guessed_is_asked_about(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "a", splits=False)
    shutil.move(tmp_path / "masks", tmp_path / "a" / "masks")
    with pytest.raises(ConfigError, match=r"holds the folder 'masks' beside cat, dog. If it holds masks, give mask_root: .*class_names"):
        folder(tmp_path / "a")
    assert folder(tmp_path / "a", class_names=["cat", "dog", "masks"]).num_classes == 3
    (tmp_path / "b" / "JPEGImages").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"holds JPEGImages: that is another layout. Use data.name: voc"):
        folder(tmp_path / "b")


def test_more_classes_than_a_label_map_can_hold(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "a")
    names = ["cat", "dog", *(f"c{i}" for i in range(998))]
    assert folder(tmp_path / "a", class_names=names).num_classes == 1000
    for bad in (["cat", "dog", "cat"], ["cat", "dog", "dog "], ["cat", ""], []):
        with pytest.raises(ConfigError, match=r"class_names must be a list of one or more different names"):
            folder(tmp_path / "a", class_names=bad)


def test_names_that_are_not_utf8_and_links_that_leave(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_image_folder(tmp_path / "a", splits=False, per_class=10)
    odd = os.fsencode(tmp_path / "a" / "cat") + b"/caf\xe9.png"
    Path(os.fsdecode(odd)).write_bytes((tmp_path / "a" / "cat" / "0.png").read_bytes())
    Image.new("RGB", (9, 9)).save(tmp_path / "private.png")
    (tmp_path / "a" / "dog" / "link.png").symlink_to(tmp_path / "private.png")
    (tmp_path / "a" / "dog" / "inside.png").symlink_to(tmp_path / "a" / "dog" / "0.png")
    ids = [data.sample_id(i) for s in ("train", "val", "test") for data in [folder(tmp_path / "a", s)] for i in range(len(data))]
    assert "cat/caf\\xe9.png" in ids and len(ids) == 23
    assert "1 file(s) in" in caplog.text and "link.png -> " in caplog.text and "inside.png" not in caplog.text
    assert all(len(folder(tmp_path / "a", s).fingerprint()) == 16 for s in ("train", "val", "test"))
    for s in ("train", "val", "test"):
        data = folder(tmp_path / "a", s)
        assert all(data[i].image.shape == (3, 16, 16) for i in range(len(data)))


@pytest.mark.parametrize(
    "header", ["filename,label", "image,label", "image_id,labels", "path,class", "File_Name,Category", "\ufeffpath,labels", "path,labels"]
)
def test_known_headers_are_read(tmp_path: Path, header: str) -> None:
    make_csv(tmp_path)
    (tmp_path / "labels.csv").write_text(f"{header}\nphotos/0.png,cat\nphotos/1.png,dog;bird\n", encoding="utf-8")
    data = table(tmp_path, fractions=(1, 0, 0))
    assert data.class_names == ("bird", "cat", "dog") and [r.id for r in data.records] == ["photos/0.png", "photos/1.png"]
    assert [data.target(i).tolist() for i in range(2)] == [[0, 1, 0], [1, 0, 1]]


def test_columns_in_another_order(tmp_path: Path) -> None:
    make_csv(tmp_path)
    (tmp_path / "labels.csv").write_text("split,label,filename\ntrain,cat,photos/0.png\nval,dog,photos/1.png\n")
    assert [r.id for r in table(tmp_path).records] == ["photos/0.png"] and table(tmp_path).class_names == ("cat", "dog")


@pytest.mark.parametrize("header", ["photo,kind", "filename;label", "id,label,width", "filename,label,fold,x", "label"])
def test_unknown_headers_are_refused_with_the_names_to_use(tmp_path: Path, header: str) -> None:
    make_csv(tmp_path)
    (tmp_path / "labels.csv").write_text(f"{header}\nphotos/0.png,cat\nphotos/1.png,dog\n")
    with pytest.raises(ConfigError, match=r"is neither an image nor a known header. Call the columns path and labels"):
        table(tmp_path, fractions=(1, 0, 0))


def test_rows_of_one_image_are_merged(tmp_path: Path) -> None:
    make_csv(tmp_path)
    rows = ["photos/0.png,cat", "./photos/0.png,dog", "photos//0.png,cat", "photos/1.png,dog"]
    (tmp_path / "labels.csv").write_text("path,label\n" + "\n".join(rows))
    data = table(tmp_path, fractions=(1, 0, 0))
    assert [r.id for r in data.records] == ["photos/0.png", "photos/1.png"]
    assert [data.target(i).tolist() for i in range(2)] == [[1, 1], [0, 1]]
    (tmp_path / "labels.csv").write_text("path,label,split\nphotos/0.png,cat,train\n./photos/0.png,dog,val\n")
    with pytest.raises(ConfigError, match=r"row 3 puts 'photos/0.png' into 'val', an earlier row into 'train'"):
        table(tmp_path)


def test_a_folder_of_splits_without_one_of_them(tmp_path: Path) -> None:
    """train and test without val: the advice must not make classes of train and test."""
    make_image_folder(tmp_path)
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(DatasetNotFoundError, match=r"move some of its images to .*val, or take .*train as data\.options\.root"):
        folder(tmp_path, "val")
    with pytest.raises(ConfigError, match=r"takes the folders of .* as classes, and its train holds class folders"):
        folder(tmp_path, "val", layout="flat")
    assert folder(tmp_path / "train", "val").class_names == ("cat", "dog"), "the advice works"
