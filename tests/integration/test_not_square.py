"""Portraits: the real command line on images that are not squares, from the classifier to masks and the exported file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

import explainer
from explainer.cli import main
from tests.factories import NAMES, make_voc

TRAINER = ["--trainer.max_epochs", "1", "--trainer.progress_bar", "false", "--trainer.accelerator", "cpu", "--logging.wandb", "off"]


def test_portraits_go_through_every_command(tmp_path: Path) -> None:
    make_voc(tmp_path / "data", height=60, width=40)
    options = f"{{root: {tmp_path}/data, class_names: [{', '.join(NAMES)}]"
    data = ["--data.name", "voc", "--data.batch_size", "4", "--data.eval_batch_size", "4", "--data.options"]
    classifier, net = (f"{tmp_path}/{run}/checkpoints/best.ckpt" for run in "ce")
    fit = ["fit", "--task", "classify", "--run_dir", f"{tmp_path}/c", "--classifier.options", "{widths: [8, 8]}"]
    assert main([*fit, *data, options + ", size: [48, 32]}", *TRAINER, "--data.train_options", "{augment: standard}"]) == 0
    # The Explainer's images take the classifier's size.
    small = ["--explainer.network", "vgg_unet", "--explainer.options", "{widths: [4, 8], decoder_channels: [4]}"]
    assert main(["fit", "--run_dir", f"{tmp_path}/e", "--classifier.checkpoint", classifier, *small, *data, options + "}", *TRAINER]) == 0
    assert explainer.load(net).image_size == (48, 32)

    methods = f"{{explainer: {{checkpoint: {net}}}, grad_cam: {{}}, ground_truth: {{}}}}"
    evaluate = ["evaluate", "--out", f"{tmp_path}/results", "--classifier.checkpoint", classifier, "--methods", methods]
    protocols = ["--protocols", "[segmentation, pointing_game, insertion_deletion]", "--progress", "false"]
    assert main([*evaluate, *protocols, *data[:2], "--data.options", options + ", size: [48, 32]}"]) == 0
    assert "| ground_truth | 100.00" in (tmp_path / "results/table.md").read_text()

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 60, 3), dtype=np.uint8)).save(tmp_path / "one.png")
    asked = ["--classifier", classifier, "--out", f"{tmp_path}/masks", "--quiet"]
    assert main(["explain", net, f"{tmp_path}/one.png", *asked]) == 0
    found = json.loads((tmp_path / "masks/results.json").read_text())
    assert found["network_size"] == [48, 32] and Image.open(tmp_path / "masks/one.png/overlay.png").size == (60, 90)
