"""Every table of a paper on a miniature of its data in the official layout: the real command line, from the images to the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from explainer.cli import main
from explainer.data.voc import VOC_CLASSES
from explainer.inference.loading import CONFIG, WEIGHTS
from explainer.models.explainer import Explainer
from tests.factories import make_boxes, make_coco, make_image_folder, make_voc
from tests.unit.evaluation.test_cli_evaluate import FEWER, FEWER_PROTOCOL

ROOT = Path(__file__).parents[2]
TABLES = sorted(p for p in (ROOT / "configs" / "evaluate").glob("*.yaml") if yaml.safe_load(p.read_text()).get("mode") is not None)
#: One a paper and data set by default; all of them with -m slow.
FAST = {"explainer_table1", "explainer_table2_coco_resnet50", "agf_table3", "srd_table1_vgg13", "ep_pointing_game"}
IMAGES = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with ``data`` as the configurations expect it."""
    base = tmp_path_factory.mktemp("place")
    data = base / "data"
    make_voc(data / "voc", VOC_CLASSES, (2, 2, 20))
    make_voc(data / "voc", VOC_CLASSES, (2, 6, 2), year=2012)
    make_coco(data / "coco", val=8)
    drawn = make_image_folder(data / "imagenet")
    (data / "masks").rename(data / "imagenet_masks")
    make_boxes(data / "imagenet_boxes", drawn)
    make_image_folder(data / "cifar100")
    return base


def explainer_for(names: tuple[str, ...], folder: Path) -> str:
    torch.manual_seed(0)
    options = {"encoder_name": "resnet18", "encoder_depth": 3, "decoder_channels": [8, 8, 8]}
    net = Explainer("unet", len(names), options, class_names=names, stride=8)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), str(folder / WEIGHTS))
    (folder / CONFIG).write_text(json.dumps({"explainer": net.config}))
    return str(folder)


CLASSES = {"voc": VOC_CLASSES, "coco": ("cat", "dog", "bird"), "image_folder": ("cat", "dog")}


def command(path: Path, place: Path) -> list[str]:
    """The command of the table's head with a small network, few images and few iterations; rows, data, protocols stay."""
    table = yaml.safe_load(path.read_text())
    arguments = [
        "evaluate",
        "--config",
        str(path),
        "--data.options.size",
        "32",
        "--data.num_workers",
        "0",
        "--device",
        "cpu",
        "--progress",
        "false",
        "--bootstrap",
        "20",
        "--classifier.arch",
        "small_vgg",
        "--classifier.options",
        "{widths: [4, 8]}",
        "--classifier.checkpoint",
        "null",
        "--limit",
        str(20 if "masking_matrix" in str(table["protocols"]) else IMAGES),
        "--threads",
        "1",
    ]
    if "cache" in table:
        arguments += ["--cache.folder", f"results/maps_{path.stem}"]
    for label, method in table["methods"].items():
        name = method.get("name", label)
        if "checkpoint" in method:
            arguments += [f"--methods.{label}.checkpoint", explainer_for(CLASSES[table["data"]["name"]], place / table["data"]["name"])]
        options = {k: v for k, v in method.get("options", {}).items() if k not in ("layer", "layers")} | FEWER.get(name, {})
        if options or {"layer", "layers"} & set(method.get("options", {})):
            arguments += [f"--methods.{label}.options", json.dumps(options)]
    return arguments


def shortened(path: Path) -> str:
    """``protocols`` with few iterations."""
    entries = [e if isinstance(e, dict) else {e: {}} for e in yaml.safe_load(path.read_text())["protocols"]]
    return json.dumps([{k: {**o, **FEWER_PROTOCOL.get(o.get("protocol", k), {})} for k, o in entry.items()} for entry in entries])


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem, marks=() if p.stem in FAST else pytest.mark.slow) for p in TABLES])
@pytest.mark.timeout(600)
def test_table_runs_from_the_images_to_the_report(path, place, monkeypatch):
    monkeypatch.chdir(place)
    table = yaml.safe_load(path.read_text())
    assert main([*command(path, place), "--protocols", shortened(path)]) == 0
    summary = json.loads(Path(f"results/{path.stem}/summary.json").read_text())
    assert summary["complete"] and summary["failures"] == {}
    # A number, or rows on which it is undefined (an untrained network gives some methods constant maps).
    shown = {(x["method"], x["protocol"]) for x in summary["results"] if x["value"] is not None or x["excluded"]}
    assert any(x["value"] is not None for x in summary["results"])
    skipped = {(x["method"], x["protocol"]) for x in summary["skipped"]}
    for protocol in summary["protocols"]:
        for method in table["methods"] or ["classifier"]:
            assert (method, protocol) in shown | skipped, f"{method}, {protocol}: no number"
    if "ground_truth" in table["methods"] and "segmentation" in summary["protocols"]:
        value = {(x["method"], x["protocol"], x["column"]): x["value"] for x in summary["results"]}
        found = [value["ground_truth", "segmentation", column] for column in ("acc", "iou", "mae")]
        assert found == pytest.approx([1, 1, 0], abs=1e-6), "100 / 100 / 0, void pixels included"
        assert value["half", "segmentation", "area"] == 0.5 and value["one", "segmentation", "area"] == 1
    assert main(["report", f"results/{path.stem}", "--out", "report.html", "--bootstrap", "20"]) == 0
    page = Path("report.html").read_text()
    assert all(label.replace("_", "_<wbr>") in page for label, p in shown)


def test_one_data_folder_for_every_configuration():
    """The classifier, the Explainer and the evaluation of a data set look in the same place, where configs/data says it goes."""
    roots: dict[str, set[str]] = {}
    for folder in ("classifier", "explainer", "evaluate", "data"):
        for path in (ROOT / "configs" / folder).glob("*.yaml"):
            content = yaml.safe_load(path.read_text())
            data = content.get("data", content) if folder != "data" else content
            name, options = data.get("name"), data.get("options", {})
            if name == "coco" or (name == "voc" and "year" in options):
                roots.setdefault(name, set()).add(options["root"])
    assert roots == {"voc": {"data/voc"}, "coco": {"data/coco"}}


def test_headers_refer_to_nothing_outside_the_repository():
    for path in (ROOT / "configs").rglob("*.yaml"):
        head = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert not any(word in line for line in head for word in ("specification", "/work", "../")), path
