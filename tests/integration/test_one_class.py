"""One class, multi-label: the real command line from a CSV with one class name to masks of one photograph."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import explainer
from explainer.cli import main

TRAINER = ["--trainer.max_epochs", "1", "--trainer.progress_bar", "false", "--trainer.accelerator", "cpu", "--logging.wandb", "off"]
SMALL_NET = [
    "--explainer.network",
    "unet",
    "--explainer.options",
    "{encoder_name: resnet18, encoder_depth: 3, decoder_channels: [16, 8, 8]}",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 32 px, half of them with a red patch and its mask, half with an empty label."""
    root = tmp_path_factory.mktemp("one_class")
    rng = np.random.default_rng(0)
    (root / "masks").mkdir()
    lines = []
    for split, count in (("train", 8), ("val", 4), ("test", 4)):
        for i in range(count):
            name, scratched = f"{split}{i}", i % 2 == 0
            pixels = rng.integers(90, 150, (32, 32, 3), dtype=np.uint8)
            mask = np.zeros((32, 32), dtype=np.uint8)
            if scratched:
                pixels[8:24, 4:20], mask[8:24, 4:20] = (220, 50, 40), 1
            Image.fromarray(pixels).save(root / f"{name}.png")
            Image.fromarray(mask).save(root / "masks" / f"{name}.png")
            lines.append(f"{name}.png,{'scratch' if scratched else ''},{split}")
    (root / "labels.csv").write_text("\n".join(lines), encoding="utf-8")
    return root


@pytest.mark.slow
def test_one_class_goes_through_every_command(folder: Path) -> None:
    options = f"{{root: {folder}, size: 32, class_names: [scratch], mask_folder: masks}}"
    data = ["--data.name", "csv", "--data.options", options, "--data.batch_size", "4", "--data.eval_batch_size", "4"]
    classifier, net = (f"{folder}/{run}/checkpoints/best.ckpt" for run in "ce")
    fit = ["fit", "--task", "classify", "--run_dir", f"{folder}/c", "--classifier.options", "{widths: [8, 8]}"]
    assert main([*fit, *data, *TRAINER]) == 0
    assert main(["test", "--config", f"{folder}/c/config.yaml"]) == 0
    assert (folder / "c/classes_test.csv").read_text().splitlines()[1].startswith("scratch,2,")
    assert 0 <= json.loads((folder / "c/summary.json").read_text())["val/map"] <= 1
    assert main(["fit", "--run_dir", f"{folder}/e", "--classifier.checkpoint", classifier, *SMALL_NET, *data, *TRAINER]) == 0
    assert math.isfinite(json.loads((folder / "e/summary.json").read_text())["val/loss"])

    protocols = ["segmentation", "segmentation_per_class", "masking_matrix", "classification_kept", "inverse_mask", "pointing_game"]
    methods = f"{{explainer: {{checkpoint: {net}}}, grad_cam: {{}}, centre: {{}}, ground_truth: {{}}}}"
    evaluate = ["evaluate", "--out", f"{folder}/results", "--classifier.checkpoint", classifier, "--methods", methods]
    assert main([*evaluate, "--protocols", f"[{', '.join(protocols)}]", *data[:4], "--progress", "false"]) == 0
    summary = json.loads((folder / "results/summary.json").read_text())
    assert summary["complete"] and summary["class_names"] == ["scratch"] and list(summary["protocols"]) == protocols
    assert "| ground_truth | 100.00" in (folder / "results/table.md").read_text()
    assert main(["report", f"{folder}/results", "--out", f"{folder}/report.html"]) == 0
    out = folder / "photograph"
    assert main(["explain", net, f"{folder}/test0.png", "--classifier", classifier, "--out", str(out), "--quiet"]) == 0
    assert json.loads((out / "results.json").read_text())["classes"] == ["scratch"]
    assert list(explainer.load(net).class_names) == ["scratch"]
