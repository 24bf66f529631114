"""``explainer reproduce`` on a simulated VOC-2007 in the official layout: from the images to the report, with no edit of any file."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from explainer.cli import main
from explainer.data.voc import VOC_CLASSES
from tests.factories import make_voc

ROOT = Path(__file__).parents[2]
SMALL = {
    "classifier": """
classifier: {arch: small_vgg, options: {widths: [4, 8]}}
data: {batch_size: 4, num_workers: 0, options: {root: data/voc, year: 2007, size: 32}}
trainer: {max_epochs: 1, accelerator: cpu, devices: 1, progress_bar: false}
logging: {wandb: "off", images: 0}
""",
    "explainer": """
classifier: {arch: small_vgg}
explainer: {network: vgg_unet, options: {widths: [4, 8], decoder_channels: [8]}, stride: 4}
data: {batch_size: 4, num_workers: 0, options: {root: data/voc, year: 2007, size: 32}}
trainer: {max_epochs: 1, accelerator: cpu, devices: 1, progress_bar: false}
logging: {wandb: "off", images: 0}
""",
    "evaluation": """
classifier: {arch: small_vgg}
data: {num_workers: 0, options: {root: data/voc, year: 2007, size: 32}}
device: cpu
progress: false
bootstrap: 20
limit: 4
""",
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A fresh clone's configurations, a dozen images, and fragments with tiny networks."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    make_voc(tmp_path / "data" / "voc", VOC_CLASSES, (4, 4, 4))
    for name, text in SMALL.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arguments(*more: str) -> list[str]:
    fragments = [part for name in SMALL for part in (f"--with_{name}", f"{name}.yaml")]
    return ["reproduce", "voc2007_vgg16", "--tables", "[explainer_table4]", *fragments, *more]


def test_from_the_images_to_the_report(place, capsys):
    before = {p: p.read_bytes() for p in (place / "configs").rglob("*.yaml")}
    assert main(arguments()) == 0
    assert {p: p.read_bytes() for p in (place / "configs").rglob("*.yaml")} == before
    for run in ("voc2007_vgg16_classifier", "voc2007_vgg16_explainer"):
        assert (place / "runs" / run / "checkpoints" / "best.ckpt").is_file()
    summary = json.loads((place / "results" / "explainer_table4" / "summary.json").read_text())
    assert summary["complete"] and summary["images"] == 4 and set(summary["methods"]) == {"explainer", "grad_cam"}
    page = (place / "results" / "reproduce_voc2007_vgg16.html").read_text()
    assert "Reproduction: voc2007_vgg16" in page and "grad_<wbr>cam" in page
    capsys.readouterr()
    assert main(arguments()) == 0  # a second run trains nothing
    assert capsys.readouterr().out.count("is trained") == 2


def test_the_cost_is_said_before(place, capsys):
    assert main(arguments("--dry_run", "true")) == 0
    out = capsys.readouterr().out
    assert not (place / "runs").exists() and not (place / "results").exists()
    assert re.search(r"train voc2007_vgg16, at most +4 +36 ", out)  # 4 images, once; three networks, forwards and backwards
    assert re.search(r"explainer_table4: grad_cam +4 +12 ", out) and re.search(r"explainer_table4: explainer +4 +4 ", out)
    assert re.search(r"^all .* \d+\.\d\d$", out, re.MULTILINE)


def test_what_is_missing_is_named(place, capsys):
    shutil.rmtree(place / "data")
    assert main(arguments()) == 2
    assert "Get VOC2007 from the PASCAL VOC site" in capsys.readouterr().err
    assert main(["reproduce", "voc2007_vgg17"]) == 2
    assert "voc2007_vgg16" in capsys.readouterr().err
    assert main(["reproduce", "coco2014_vgg16", "--tables", "[explainer_table1]"]) == 2
    assert "Its tables: explainer_table2_coco, explainer_table3_coco, explainer_table4_coco" in capsys.readouterr().err
