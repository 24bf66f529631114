"""COCO: contiguous classes, the reproducible split, crowds, unannotated images, and every error's text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from explainer.data.coco import Coco
from explainer.errors import ConfigError, CorruptSampleError, DatasetNotFoundError
from tests.factories import NAMES, make_coco


def coco(root: Path, split: str = "train", **options: object) -> Coco:
    return Coco(**{"split": split, "size": 24, "root": str(root), **options})


def test_ids_become_contiguous_in_the_order_of_the_ids(tmp_path: Path) -> None:
    drawn = {d.id: d for d in make_coco(tmp_path)}
    for split in ("train", "val", "test"):
        data = coco(tmp_path, split)
        assert data.class_names == NAMES and data.num_classes == 3
        for i in range(len(data)):
            d = drawn[data.sample_id(i)]
            expected = set(d.rectangles) | ({2} if d.id == "101" else set())  # the crowd counts as presence
            assert set(data[i].target.nonzero().flatten().tolist()) == expected


def test_masks_are_the_polygons_and_crowds_are_void(tmp_path: Path) -> None:
    drawn = {d.id: d for d in make_coco(tmp_path)}
    data = coco(tmp_path, "train", val_fraction=0.1)
    seen_crowd = False
    for i in range(len(data)):
        d = drawn[data.sample_id(i)]
        masks, void = data.original_masks(i)
        expected = torch.zeros(3, d.height, d.width, dtype=torch.bool)
        for k, (y0, x0, y1, x1) in d.rectangles.items():
            expected[k, y0:y1, x0:x1] = True
        assert torch.equal(masks, expected)
        if d.id == "101":
            seen_crowd = True
            columns = torch.zeros(d.height, d.width, dtype=torch.bool)
            columns[:, :2] = True
            assert torch.equal(void, columns & ~expected.any(0)) and void.any()
        else:
            assert not void.any()
        s = data[i]
        assert s.masks.shape == (3, 24, 24) and (s.masks.float().mean((1, 2)) - expected.float().mean((1, 2))).abs().max() < 0.03
    assert seen_crowd


def test_overlapping_classes_keep_both_masks(tmp_path: Path) -> None:
    make_coco(tmp_path)
    path = tmp_path / "annotations" / "instances_val2014.json"
    content = json.loads(path.read_text())
    square = [0, 0, 10, 0, 10, 10, 0, 10]
    content["annotations"] = [{"image_id": 900, "category_id": c, "iscrowd": 0, "segmentation": [square]} for c in (3, 90)]
    path.write_text(json.dumps(content))
    masks, _ = coco(tmp_path, "test").original_masks(0)
    assert masks.sum((1, 2)).tolist() == [100, 0, 100]


def test_objects_with_boxes_only_are_undefined_pixels_and_not_background(tmp_path: Path) -> None:
    make_coco(tmp_path)
    square = [0, 0, 10, 0, 10, 10, 0, 10]

    def annotate(*objects: dict[str, object]) -> Coco:
        edit(tmp_path, lambda c: c.update(annotations=[{"image_id": 900, "iscrowd": 0, **o} for o in objects]))
        return coco(tmp_path, "test")

    for missing in ({}, {"segmentation": []}, {"segmentation": None}):
        data = annotate({"category_id": 3, "bbox": [4.5, 2, 3, 5], **missing})
        assert data[0].target.tolist() == [1, 0, 0] and data[0].masks is None and data.original_masks(0) is None
        with pytest.raises(DatasetNotFoundError, match="is empty"):
            coco(tmp_path, "test", require_masks=True)
    data = annotate({"category_id": 3, "segmentation": [square]}, {"category_id": 3, "bbox": [20.5, 2, 3, 5]}, {"category_id": 17})
    assert data.original_masks(0) is None, "of dog nothing at all is known"
    data = annotate({"category_id": 3, "segmentation": [square]}, {"category_id": 3, "bbox": [8.5, 2, 3, 5]})
    masks, void = data.original_masks(0)
    expected = torch.zeros(24, 32, dtype=torch.bool)
    expected[2:7, 10:12] = True  # columns 8 to 11 of the box, without those of the outlined object
    assert masks.sum((1, 2)).tolist() == [100, 0, 0] and torch.equal(void, expected)
    for box in ([1, 2], "abcd", [0, 0, float("nan"), 3]):
        data = annotate({"category_id": 3, "segmentation": [square]}, {"category_id": 3, "bbox": box})
        with pytest.raises(CorruptSampleError, match="segmentation of a 'cat'"):
            data[0]


def test_the_split_is_fixed_and_can_be_saved(tmp_path: Path) -> None:
    make_coco(tmp_path)
    train, val = (coco(tmp_path, s, unannotated="keep") for s in ("train", "val"))
    ids = [{d.sample_id(i) for i in range(len(d))} for d in (train, val)]
    assert len(ids[0]) == 18 and len(ids[1]) == 2 and not ids[0] & ids[1]
    assert val.split_ids() == coco(tmp_path, "val", unannotated="keep").split_ids()
    assert val.split_ids() != coco(tmp_path, "train", split_seed=1).split_ids()
    train.save_split(tmp_path / "split.json")
    read = coco(tmp_path, "val", unannotated="keep", split_seed=99, split_file=str(tmp_path / "split.json"))
    assert {read.sample_id(i) for i in range(len(read))} == ids[1]


def test_unannotated_images_are_dropped_or_kept_without_a_label(tmp_path: Path) -> None:
    make_coco(tmp_path)
    assert len(coco(tmp_path, "test")) == 3
    kept = coco(tmp_path, "test", unannotated="keep")
    assert len(kept) == 4 and kept[3].target.sum() == 0 and kept[3].masks.sum() == 0 and not kept[3].void.any()


def test_the_image_cache_changes_nothing(tmp_path: Path) -> None:
    make_coco(tmp_path)
    plain, cached = coco(tmp_path, "test", augment="standard"), coco(tmp_path, "test", augment="standard", cache="ram")
    for _ in range(2):
        for i in range(3):
            assert torch.equal(plain[i].image, cached[i].image) and torch.equal(plain[i].masks, cached[i].masks)


def edit(root: Path, change: object, part: str = "val2014") -> None:
    path = root / "annotations" / f"instances_{part}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"'coco': the folder .* does not exist. Get train2014.zip"):
        coco(tmp_path / "nowhere")
    make_coco(tmp_path)
    with pytest.raises(ConfigError, match='unannotated must be "drop" or "keep", got \'remove\''):
        coco(tmp_path, unannotated="remove")
    edit(tmp_path, lambda c: c["annotations"].append({"image_id": 900, "category_id": 4, "segmentation": []}))
    with pytest.raises(CorruptSampleError, match=r"has an object of the unknown category id 4; known ids: 3, 17, 90"):
        coco(tmp_path, "test")[0]
    edit(tmp_path, lambda c: c["annotations"][-1].update(category_id=3, segmentation=[[1, 2, 3]]))
    with pytest.raises(
        CorruptSampleError, match=r"segmentation of a 'cat' in COCO_val2014_000000000900.jpg is damaged .*three finite points"
    ):
        coco(tmp_path, "test")[0]
    edit(tmp_path, lambda c: c["annotations"][-1].update(segmentation={"size": [1, 1], "counts": [1]}))
    with pytest.raises(CorruptSampleError, match=r"run-length size"):
        coco(tmp_path, "test")[0]
    edit(tmp_path, lambda c: c["annotations"].pop())
    edit(tmp_path, lambda c: c["images"][1].update(height=99))
    with pytest.raises(CorruptSampleError, match=r"000901.jpg is for 99 x 32 pixels .* the image has 24 x 32"):
        coco(tmp_path, "test")[1]
    edit(tmp_path, lambda c: c["images"][0].update(file_name="../../x.jpg"))
    with pytest.raises(CorruptSampleError, match=r"is not a plain path below"):
        coco(tmp_path, "test")
    edit(tmp_path, lambda c: c["categories"].append({"id": 3, "name": "x"}))
    with pytest.raises(CorruptSampleError, match=r"categories cat, x have the same id 3"):
        coco(tmp_path, "test")
    edit(tmp_path, lambda c: c.pop("categories"))
    with pytest.raises(CorruptSampleError, match=r"not a COCO instances file .*It needs images"):
        coco(tmp_path, "test")
    (tmp_path / "annotations" / "instances_val2014.json").write_text("{")
    with pytest.raises(CorruptSampleError, match=r"not valid JSON"):
        coco(tmp_path, "test")
    (tmp_path / "annotations" / "instances_val2014.json").unlink()
    with pytest.raises(DatasetNotFoundError, match=r"annotation file .* does not exist"):
        coco(tmp_path, "test")


def test_bad_split_files_are_explained(tmp_path: Path) -> None:
    make_coco(tmp_path)
    path = tmp_path / "split.json"
    with pytest.raises(DatasetNotFoundError, match=r"split_file .* does not exist. Write one with save_split"):
        coco(tmp_path, split_file=str(path))
    for content, message in (
        ({"train": [100]}, "'val' is not a list of ids"),
        ({"train": [100], "val": [5]}, "names image id 5 in 'val'"),
        ({"train": [100], "val": [100]}, "image id 100 in train and in val"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=message):
            coco(tmp_path, split_file=str(path))
