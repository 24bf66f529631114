"""The VOC layout: labels, masks, boxes, lists, and every error's text."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from explainer.data.voc import VOC_CLASSES, Voc
from explainer.errors import ConfigError, CorruptSampleError, DatasetNotFoundError
from tests.factories import COLORS, NAMES, make_voc


def voc(root: Path, split: str = "train", **options: object) -> Voc:
    return Voc(**{"split": split, "size": 16, "root": str(root), "class_names": NAMES, **options})


def test_labels_masks_and_void_are_what_was_drawn(tmp_path: Path) -> None:
    drawn = make_voc(tmp_path, height=16, width=16)  # no resize: pixel-exact
    data = voc(tmp_path, difficult="exclude")
    assert len(data) == 6 and [data.sample_id(i) for i in range(6)] == [d.id for d in drawn[:6]]
    for i, d in enumerate(drawn[:6]):
        s = data[i]
        assert s.target.tolist() == [float(k in d.rectangles) for k in range(3)] and torch.equal(data.target(i), s.target)
        expected, void = torch.zeros(3, 16, 16, dtype=torch.bool), torch.zeros(16, 16, dtype=torch.bool)
        for k, (y0, x0, y1, x1) in d.rectangles.items():
            expected[k, y0 + 1 : y1, x0:x1] = True
            void[y0, x0:x1] = True
            center = s.image[:, (y0 + y1) // 2, (x0 + x1) // 2]
            assert (center - torch.tensor(COLORS[k]) / 255).abs().max() < 0.1
        assert torch.equal(s.masks, expected) and torch.equal(s.void, void)


def test_boxes_count_from_zero_and_difficult_is_an_option(tmp_path: Path) -> None:
    drawn = make_voc(tmp_path)
    included, excluded = voc(tmp_path), voc(tmp_path, difficult="exclude")
    *easy, hard = included.boxes(0)
    assert hard.difficult and hard.label == 2 and (hard.y0, hard.x0, hard.y1, hard.x1) == (0, 0, 2, 2)
    assert {b.label: (b.y0, b.x0, b.y1, b.x1) for b in easy} == drawn[0].rectangles
    assert included.target(0)[2] == 1 and (2 not in drawn[0].rectangles) and excluded.target(0)[2] == 0
    assert excluded.boxes(0) == included.boxes(0)
    assert included.original_size(0) == (20, 30)
    masks, void = included.original_masks(0)
    assert masks.shape == (3, 20, 30) and void.shape == (20, 30) and void.any()
    assert included.fingerprint() != excluded.fingerprint()


def test_only_some_classes_can_be_kept_in_any_order(tmp_path: Path) -> None:
    make_voc(tmp_path)
    whole, part = voc(tmp_path, difficult="exclude"), voc(tmp_path, difficult="exclude", keep=["bird", "cat"])
    assert part.class_names == ("bird", "cat") and part.num_classes == 2
    for i in range(len(whole)):
        assert torch.equal(part[i].masks, whole[i].masks[[2, 0]]) and torch.equal(part[i].target, whole[i].target[[2, 0]])
        assert torch.equal(part[i].void, whole[i].void)
    with pytest.raises(ConfigError, match=r"keep names 'cow', which is not one of class_names: cat, dog, bird"):
        voc(tmp_path, keep=["cow"])


def test_segmentation_is_used_where_it_exists(tmp_path: Path) -> None:
    make_voc(tmp_path, segmented="even")
    data = voc(tmp_path)
    assert [data[i].masks is not None for i in range(6)] == [False, True] * 3
    required = voc(tmp_path, require_masks=True)
    assert [required.sample_id(i) for i in range(len(required))] == ["000002", "000004", "000006"]
    assert voc(tmp_path, masks=False)[1].masks is None
    assert data.original_masks(0) is None


def test_lists_can_be_chosen_and_one_list_is_shared_by_train_and_val(tmp_path: Path) -> None:
    make_voc(tmp_path, counts=(10, 4, 3), year=2012)
    ids = {s: {r.id for r in voc(tmp_path, s, year=2012, holdout=0.3).records} for s in ("train", "val", "test")}
    assert len(ids["train"]) == 7 and len(ids["val"]) == 3 and not ids["train"] & ids["val"]
    assert ids["test"] == {f"{i:06d}" for i in range(11, 15)}  # the official val list
    again = {r.id for r in voc(tmp_path, "val", year=2012, holdout=0.3).records}
    other = {r.id for r in voc(tmp_path, "val", year=2012, holdout=0.3, split_seed=1).records}
    assert again == ids["val"] != other
    official = voc(tmp_path, "val", year=2012, lists={"val": "val"})
    assert {r.id for r in official.records} == ids["test"]


def test_defaults_are_the_twenty_classes(tmp_path: Path) -> None:
    make_voc(tmp_path, names=("cat", "dog", "bird"))
    data = voc(tmp_path, class_names=None, masks=False)
    assert data.class_names == VOC_CLASSES and len(VOC_CLASSES) == 20
    assert data.target(1).nonzero().flatten().tolist() == sorted(VOC_CLASSES.index(NAMES[k]) for k in make_voc(tmp_path)[1].rectangles)


@pytest.mark.parametrize("augment", [None, "standard"])
def test_the_cache_changes_nothing(tmp_path: Path, augment: str | None) -> None:
    make_voc(tmp_path)
    plain, cached = voc(tmp_path, augment=augment), voc(tmp_path, augment=augment, cache="ram")
    for epoch in (0, 1):
        for data in (plain, cached):
            data.set_epoch(epoch)
        for i in range(len(plain)):
            a, b = plain[i], cached[i]
            assert torch.equal(a.image, b.image) and torch.equal(a.masks, b.masks) and torch.equal(a.void, b.void)
    before = cached[2]
    for path in tmp_path.rglob("*.jpg"):
        path.unlink()
    assert torch.equal(cached[2].image, before.image) and torch.equal(cached[2].masks, before.masks)  # served from memory
    with pytest.raises(CorruptSampleError, match=r"is missing"):
        plain[2]


def test_a_cache_that_cannot_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_voc(tmp_path)
    monkeypatch.setattr(os, "sysconf", lambda name: 10)
    with pytest.raises(ConfigError, match=r'cache="ram" would need 0.0 GB for 6 decoded images'):
        voc(tmp_path, cache="ram")
    with pytest.raises(ConfigError, match='cache must be "none" or "ram", got \'disk\''):
        voc(tmp_path, cache="disk")


def test_missing_things_say_where_they_belong(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetNotFoundError, match=r"VOCdevkit.VOC2007 does not exist. Get VOC2007 from the PASCAL VOC site.*download: true"
    ):
        voc(tmp_path)
    drawn = make_voc(tmp_path)
    with pytest.raises(DatasetNotFoundError, match=r"trainval\.txt does not exist.*Lists there: test, train, val"):
        voc(tmp_path, lists={"train": "trainval"})
    with pytest.raises(ConfigError, match=r"lists has the unknown split 'valid'"):
        voc(tmp_path, lists={"valid": "val"})
    with pytest.raises(CorruptSampleError, match=r"not a plain path"):
        voc(tmp_path, lists={"train": "../../../secret"})
    base = tmp_path / "VOCdevkit" / "VOC2007"
    (base / "ImageSets" / "Main" / "val.txt").write_text("\n")
    with pytest.raises(DatasetNotFoundError, match=r"the val split of .*VOC2007 is empty"):
        voc(tmp_path, "val")
    drawn[0].path.unlink()
    with pytest.raises(CorruptSampleError, match=r"000001\.jpg: the image is missing"):
        voc(tmp_path)[0]
    (base / "Annotations" / "000002.xml").unlink()
    with pytest.raises(CorruptSampleError, match=r"000002\.xml: the annotation is missing"):
        voc(tmp_path)[1]
    (base / "Annotations" / "000003.xml").write_text("<annotation><object><name>cat</name></object></annotation>")
    with pytest.raises(CorruptSampleError, match=r"000003\.xml: an object of class 'cat' has no bndbox"):
        voc(tmp_path)[2]
    (base / "Annotations" / "000004.xml").write_text("<annotation>")
    with pytest.raises(CorruptSampleError, match=r"000004\.xml: not valid XML"):
        voc(tmp_path)[3]
    assert len(voc(tmp_path)) == 6 and voc(tmp_path)[4].image.shape == (3, 16, 16)  # the others are still served


def test_classes_and_masks_that_do_not_fit_are_named(tmp_path: Path) -> None:
    make_voc(tmp_path)
    with pytest.raises(ConfigError, match=r"00000\d\.xml: unknown class 'bird'. class_names has 2: cat, dog"):
        voc(tmp_path, class_names=["cat", "dog"])
    with pytest.raises(ConfigError, match=r"class_names must be a list of 1 to 254 different names"):
        voc(tmp_path, class_names=["cat", "cat"])
    with pytest.raises(ConfigError, match='difficult must be "include" or "exclude", got True'):
        voc(tmp_path, difficult=True)
    path = tmp_path / "VOCdevkit" / "VOC2007" / "SegmentationClass" / "000001.png"
    Image.fromarray(np.full((20, 30), 9, dtype=np.uint8)).save(path)
    with pytest.raises(CorruptSampleError, match=r"000001\.png: the mask holds the value 9; expected 0 \(background\), 1 to 3"):
        voc(tmp_path)[0]
    Image.fromarray(np.zeros((30, 20), dtype=np.uint8)).save(path)
    with pytest.raises(CorruptSampleError, match=r"000001\.png: the mask is 30 x 20 .*000001\.jpg is 20 x 30"):
        voc(tmp_path)[0]


def test_names_in_lists_cannot_leave_the_folder(tmp_path: Path) -> None:
    make_voc(tmp_path)
    (tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / "train.txt").write_text("../../../../etc/passwd\n")
    with pytest.raises(CorruptSampleError, match=r"is not a plain path below"):
        voc(tmp_path)


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "VOCDetection", offline)
    with pytest.raises(DatasetNotFoundError, match=r"VOC2007 could not be downloaded .*no route to host.* by hand"):
        voc(tmp_path, download=True)


@pytest.mark.data
def test_street_photographs_load_with_their_classes() -> None:
    root = os.environ.get("STREET_ROOT")
    assert root, "set STREET_ROOT to the folder that holds VOCdevkit"
    names = ["sky", "building", "road", "pavement", "tree", "car", "fence", "person"]
    for split, count in (("train", 2569), ("val", 404), ("test", 580)):
        data = Voc(split=split, size=96, root=root, class_names=names)
        assert len(data) == count and data.num_classes == 8
        for i in range(0, count, count // 20):
            s = data[i]
            area = data.original_masks(i)[0].float().mean((1, 2))
            # the set's rule: a class is labelled where it covers at least 5 % and covers at most 0.8 % elsewhere
            assert ((area >= 0.045) == (s.target > 0)).all(), s.id
            assert ((s.masks.float().mean((1, 2)) - area).abs() < 0.02).all()
            assert {b.label for b in data.boxes(i)} == set(s.target.nonzero().flatten().tolist())


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_images_need_not_be_squares(cache: str, tmp_path: Path) -> None:
    make_voc(tmp_path, height=30, width=20)
    tall = voc(tmp_path, size=[30, 20], difficult="exclude", cache=cache)
    assert tall.size == (30, 20) and tall.shape == (30, 20) and tall.identity()["size"] == [30, 20]
    sample, (masks, void) = tall[0], tall.original_masks(0)
    assert sample.image.shape == (3, 30, 20) and torch.equal(sample.masks, masks) and torch.equal(sample.void, void)
    assert tall.original_maps(0, torch.rand(2, 30, 20)).shape == (2, 30, 20)
    augmented = voc(tmp_path, size=(32, 24), augment="standard", cache=cache)[1]
    assert augmented.image.shape == (3, 32, 24) and augmented.masks.shape == (3, 32, 24)
    wide = voc(tmp_path, size=[20, 30], geometry="letterbox")[0]
    assert wide.void[:, :8].all() and not wide.void[:, 10:20].all(), "a portrait in the middle of a landscape"
    # A square said in either way is the same data set.
    assert voc(tmp_path, size=[16, 16]).fingerprint() == voc(tmp_path, size=16).fingerprint() != tall.fingerprint()


@pytest.mark.parametrize("size", [7, 5000, 24.0, True, [32], [32, 4], [32, 24, 3], "32", None])
def test_a_size_that_is_none_is_refused(size: object, tmp_path: Path) -> None:
    make_voc(tmp_path)
    with pytest.raises(ConfigError, match=r"size must be a whole number of pixels in \[8, 4096\], or two: \[height, width\]; got"):
        voc(tmp_path, size=size)
