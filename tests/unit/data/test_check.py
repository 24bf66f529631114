"""``explainer data check``: every kind of fault is found, counted and explained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from explainer.cli import COMMANDS, main
from explainer.commands.data import data_config
from explainer.commands.parsing import parse
from explainer.config import DataConfig
from explainer.data.check import check_split, duplicates, leakage
from explainer.data.datamodule import DataModule
from explainer.data.survey import SplitSurvey, advice, describe, survey
from explainer.errors import ConfigError
from tests.factories import dataset_options, make_image_folder, make_voc

ROOT = Path(__file__).resolve().parents[3]


def broken_folder(root: Path) -> Path:
    """Class folders with: a truncated file, an empty one, a picture in train and test, one twice in train, a hidden copy, a mask of
    another size, a mask without its object, an object that vanishes, a class that only val has.
    """
    images = root / "images"
    make_image_folder(images, names=("crack", "dent"), per_class=4)
    path = images / "train" / "crack" / "0.png"
    path.write_bytes(path.read_bytes()[:60])
    (images / "val" / "dent" / "1.png").write_bytes(b"")
    shutil.copy(images / "train" / "dent" / "0.png", images / "test" / "dent" / "3.png")
    shutil.copy(images / "train" / "dent" / "1.png", images / "train" / "dent" / "2.png")
    (images / "train" / ".thumbs").mkdir()
    shutil.copy(images / "train" / "dent" / "1.png", images / "train" / ".thumbs" / "1.png")
    masks = root / "masks"
    Image.new("L", (5, 5)).save(masks / "train" / "crack" / "1.png")
    Image.new("L", (18, 16)).save(masks / "train" / "crack" / "2.png")
    small = np.zeros((160, 180), dtype=np.uint8)
    small[3, 3] = 255
    Image.fromarray(small).save(masks / "test" / "crack" / "0.png")
    Image.new("RGB", (180, 160)).save(images / "test" / "crack" / "0.png")
    (masks / "val" / "crack" / "0.png").unlink()
    return root


def test_a_broken_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = broken_folder(tmp_path / "mine")
    code = main(["data", "check", str(root), "--data.options.size", "16", "--out", str(tmp_path / "found.json"), "--quiet"])
    out = capsys.readouterr().out
    assert code == 1
    for line in (
        "data: image_folder, 2 classes, one label an image, 16 px (squash)",
        "images          8    8     8",
        "crack           4    4     4",
        "with masks      8    7     8",
        "files: 23 RGB PNG",
        "read: 8 train, 8 val, 8 test",
        "train/crack/0.png: the image is damaged or truncated",
        "train/crack/1.png: the mask is 5 x 5 (height x width)",
        "val/dent/1.png: the image is empty (0 bytes)",
        "leakage: 1 picture of test also in train, e.g. test/dent/3.png = train/dent/0.png. Numbers on test flatter",
        "note   train: labelled, but without a pixel in the masks: crack 1. Such a class has no ground truth there.",
        "note   train: 1 picture more than once, e.g. train/dent/1.png = train/dent/2.png.",
        "note   test: objects too small to have a pixel at 16 px: crack 1. Raise data.options.size.",
        "note   val: 1 of 7 images have no masks: they are left out of what needs them.",
        "- stop at the first broken file it meets (train: train/crack/0.png), because data.on_error is raise",
        "- refuse: 8 training images are fewer than one batch of 16; lower data.batch_size",
        "- choose the best epoch on 7 val images",
        "- be measured on 8 test images",
    ):
        assert line in out, f"{line}\n--- in ---\n{out}"
    assert out.count("WRONG") == 4 and ".thumbs" not in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert (
        len(found["samples"]["train"]) == 8 and found["samples"]["train"][0]["error"] and len(found["samples"]["val"][2]["content"]) == 32
    )
    code = main(["data", "check", str(root), "--data.on_error", "skip", "--data.batch_size=3", "--splits", "train,val", "--quiet"])
    out = capsys.readouterr().out
    assert code == 1 and "- leave out 2 of train, 1 of val and say so at the end" in out
    assert "- see 2 batches of 3 an epoch, and leave 2 other images out of each" in out


def test_the_guide_shows_what_the_command_says(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    broken_folder(Path("data/mine"))
    assert main(["data", "check", "data/mine", "--quiet"]) == 1
    page = (ROOT / "docs/howto/data_check.md").read_text().partition("## A deliberately broken folder")[2]
    assert capsys.readouterr().out.strip() == page.partition("```text\n")[2].partition("```")[0].strip()


def test_data_in_order_end_with_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_voc(tmp_path / "voc", counts=(8, 4, 3))
    config = tmp_path / "run.yaml"
    config.write_text(
        f"task: classify\ndata: {{name: voc, batch_size: 4, options: {{root: '{tmp_path}/voc', class_names: [cat, dog, bird], size: 24}}, "
        "train_options: {masks: false, augment: standard}}\n"
    )
    assert main(["data", "check", str(config), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "data: voc, 3 classes, several labels an image, 24 px (squash)" in out and "WRONG" not in out
    assert "pictures (height x width): median 20 x 30, 20 x 30 to 20 x 30; 0% portrait, 100% landscape" in out
    assert "Half of the pictures are at least 1.50 times as long as wide" in out and "- see 2 batches of 4 an epoch\n" in out
    # the first image has one more object of the last class, difficult, in its box only
    assert "train: labelled, but without a pixel in the masks: bird 1." in out
    assert main(["data", "check", str(config), "--quiet", "--data.options.geometry", "letterbox", "--splits", "val"]) == 0
    assert "Half of the pictures are at least" not in capsys.readouterr().out


def test_generated_data_are_checked_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "data.yaml"
    config.write_text("name: shapes\noptions: {size: 32, length: 12, class_names: [stripes, dots]}\n")
    assert main(["data", "check", str(config), "--quiet", "--splits", "train,val"]) == 0
    out = capsys.readouterr().out
    assert "data: shapes, 2 classes" in out and "read: 12 train, 12 val" in out and "leakage" not in out


def parsed(*argv: str) -> DataConfig:
    return data_config(parse(COMMANDS, ["data", "check", *argv])[2])


def test_what_can_be_wrong_with_the_arguments(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    for text, message in (
        ("[1, 2]", "has no data section"),
        ("data: 3", "has no data section"),
        ("data: {nam: voc}", "data has no key 'nam'. Its keys: name, batch_size"),
        ("data: {name: voc, options: [1]}", r"data.options must be a mapping, received \[1\]"),
        ("a: [", "is not valid YAML"),
        ("\x00", "is not valid YAML"),
    ):
        config.write_text(text)
        with pytest.raises(ConfigError, match=message):
            parsed(str(config))
    with pytest.raises(ConfigError, match=r"does not exist\. Give a YAML file"):
        parsed(str(tmp_path / "none.yaml"))
    config.write_text("data: {name: voc, batch_size: 8, options: {size: 32, root: y}}")
    with pytest.raises(ConfigError, match=r"--outt"):
        parsed(str(config), "--outt", "x")
    given = parsed(str(config), "--data.options.root=x", "--data.options.year", "2012", "--data.batch_size", "16")
    assert given.options == {"size": 32, "root": "x", "year": 2012} and given.batch_size == 16 and parsed(str(config)).batch_size == 8
    assert main(["data", "check", str(config), "--splits", "train,training"]) == 2
    assert main(["data", "check", str(config), "--data.options.root", str(tmp_path / "nowhere")]) == 2, "nothing can be read at all"


def test_splits_with_other_classes_are_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_image_folder(tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "train")
    for split, names in (("val", ("cat", "cow")), ("test", ("cat", "dog"))):
        for old, new in zip(sorted(p.name for p in (tmp_path / "a" / split).iterdir()), names, strict=True):
            if old != new:
                (tmp_path / "a" / split / old).rename(tmp_path / "a" / split / new)
    config = tmp_path / "c.yaml"
    config.write_text(f"name: image_folder\noptions: {{root: '{tmp_path}/a', layout: splits, size: 16}}")
    assert main(["data", "check", str(config), "--quiet"]) == 1
    out = capsys.readouterr().out
    assert (
        "WRONG  train: data set 'image_folder': the folder" in out
        and "WRONG  the splits have different classes: val: ['cat', 'cow']" in out
    )


@pytest.mark.parametrize("name", ["voc", "coco", "cub", "csv", "image_folder"])
def test_surveys_agree_with_the_samples(name: str, tmp_path: Path) -> None:
    data = DataModule(name, options={**dataset_options(name, tmp_path / "data"), "size": 16})
    dataset = data.dataset("train")
    found, samples = survey(dataset), [dataset[i] for i in range(len(dataset))]
    assert found.images == found.counted == len(samples)
    assert found.labels == [int(sum(s.target[k] for s in samples)) for k in range(dataset.num_classes)]
    assert found.masks == sum(s.masks is not None for s in samples) and found.unlabelled == sum(not s.target.any() for s in samples)
    assert set(found.sizes) == {dataset.original_size(i) for i in range(len(dataset))}
    checked = check_split(dataset, workers=1)
    assert [s.id for s in checked.samples] == [s.id for s in samples] and not checked.broken and not duplicates(checked)
    assert not leakage({"train": checked, "val": check_split(data.dataset("val"))})


class Many:
    """Just what a table needs."""

    name, task, size, shape, geometry, no_region, num_classes = "many", "multilabel", 64, (64, 64), "squash", (), 1000
    class_names = tuple(f"c{i}" for i in range(1000))


def test_no_form_is_advised_that_is_the_square_itself(tmp_path: Path) -> None:
    """Sides are multiples of 32: of 64 px, pictures of 4:5 would get 64 x 64."""
    make_image_folder(tmp_path)
    dataset = DataModule("image_folder", options={"root": str(tmp_path), "size": 64}).dataset("train")
    tall = SplitSurvey("train", 4, 4, [2, 2], 0, sizes=[(80, 64)] * 4)
    assert "keeps proportions." in " ".join(advice(dataset, [tall]))
    taller = SplitSurvey("train", 4, 4, [2, 2], 0, sizes=[(160, 64)] * 4)
    assert "keeps proportions, and data.options.size [96, 32]." in " ".join(advice(dataset, [taller]))


def test_tables_of_very_many_classes_stay_small_and_advice_names_what_is_not_set() -> None:
    counts = [1000 - i for i in range(999)] + [0]
    split = SplitSurvey("train", 1000, 1000, counts, 0, None, [(100, 200)] * 3)
    lines = describe(Many(), [split])  # type: ignore[arg-type]
    assert len(lines) == 29 and any(line.startswith("c0 ") for line in lines) and any(line.startswith("c999") for line in lines)
    text = " ".join(advice(Many(), [split]))  # type: ignore[arg-type]
    assert "No training image has 'c999'" in text and "'c0' 1000 to 'c998' 2: data.balance: true" in text and "2.00 times as long" in text
    assert "balance" not in " ".join(advice(Many(), [split], balanced=True))  # type: ignore[arg-type]
    small = SplitSurvey("val", 2, 2, [1] * 1000, 0, None, [(30, 30)])
    assert "smaller than 2/3 of size 64" in " ".join(advice(Many(), [small]))  # type: ignore[arg-type]


def test_fit_says_what_it_trains_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_image_folder(tmp_path / "a", per_class=12)
    for path in (tmp_path / "a" / "train" / "dog").glob("[1-9]*.png"):
        path.unlink()
    config = tmp_path / "run.yaml"
    config.write_text(
        f"{{task: classify, run_dir: '{tmp_path}/run', "
        f"data: {{name: image_folder, batch_size: 4, options: {{root: '{tmp_path}/a', size: 32}}}}, "
        "classifier: {options: {widths: [4, 4]}}, logging: {wandb: 'off'}, trainer: {max_epochs: 1, accelerator: cpu, progress_bar: false}}"
    )
    assert main(["fit", "--config", str(config)]) == 0
    out = capsys.readouterr().out
    head = "data: image_folder, 2 classes, one label an image, 32 px (squash)"
    assert (
        f"{head}\n            train  val\nimages         13   24\ncat            12   12\ndog             1   12\nwith masks      0    0\n"
        in out
    )
    assert "'cat' 12 to 'dog' 1: data.balance: true draws all equally often." in out
