"""The way to an Explainer of a random classifier: the command, and (slow) randomise, train and evaluate as the configuration says."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from explainer.cli import main
from explainer.config import ClassifierConfig
from explainer.models.checkpoints import load_explanandum
from explainer.models.classifiers import build_classifier

ROOT = Path(__file__).resolve().parents[3]


def write_classifier(path: Path) -> Path:
    """A checkpoint as train.py writes it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build_classifier("small_vgg", 3, widths=[4, 8])
    config = ClassifierConfig(options={"widths": [4, 8]}, input_size=16)
    saved = {"kind": "classifier", "classifier": asdict(config), "num_classes": 3, "task": "multilabel", "class_names": ["a", "b", "c"]}
    torch.save({"state_dict": {f"classifier.{k}": v for k, v in net.state_dict().items()}, "hyper_parameters": saved}, path)
    return path


def test_the_command_writes_a_checkpoint_that_training_takes(tmp_path, capsys):
    original = write_classifier(tmp_path / "best.ckpt")
    out = tmp_path / "new" / "random.ckpt"
    assert main(["randomize", str(original), "--out", str(out), "--seed", "3"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    first, copy = load_explanandum(original), load_explanandum(out)
    assert copy.class_names == first.class_names == ("a", "b", "c") and copy.input_size == 16
    assert copy.fingerprint() != first.fingerprint(), "an Explainer of one is not taken for one of the other"
    for (name, a), b in zip(first.classifier.named_parameters(), copy.classifier.parameters(), strict=True):
        assert a.shape == b.shape and (a.std() == 0 or not torch.equal(a, b)), name
    assert main(["randomize", str(original), "--out", str(tmp_path / "again.ckpt"), "--seed", "3"]) == 0
    assert load_explanandum(tmp_path / "again.ckpt").fingerprint() == copy.fingerprint()
    assert main(["randomize", str(original), "--out", str(tmp_path / "other.ckpt"), "--seed", "4"]) == 0
    assert load_explanandum(tmp_path / "other.ckpt").fingerprint() != copy.fingerprint()


def test_what_the_command_refuses(tmp_path, capsys):
    original = write_classifier(tmp_path / "best.ckpt")
    plain = tmp_path / "plain.pt"
    torch.save({"weight": torch.zeros(1)}, plain)
    for arguments, words in (
        ([str(original), "--out", str(original)], "exists: an Explainer may have been trained against it"),
        ([str(original), "--out", str(tmp_path / "x.onnx")], "must end in .ckpt"),
        ([str(original)], "--out"),
        ([str(tmp_path / "no.ckpt"), "--out", str(tmp_path / "x.ckpt")], "does not exist"),
        ([str(plain), "--out", str(tmp_path / "x.ckpt")], "was not written by train.py"),
        ([str(original), "--out", str(tmp_path / "x.ckpt"), "--size", "2"], "at least 8 pixels"),
    ):
        assert main(["randomize", *arguments]) == 2
        assert words in capsys.readouterr().err, arguments
    assert not (tmp_path / "x.ckpt").exists()


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_disk_that_cannot_be_written_is_said_in_words(when, tmp_path, capsys, monkeypatch):
    """Before the work, where it can be known; a disk may also become read-only meanwhile."""
    original, out = write_classifier(tmp_path / "best.ckpt"), tmp_path / "x.ckpt"

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse) if when == "before" else monkeypatch.setattr(torch, "save", refuse)
    assert main(["randomize", str(original), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Read-only file system" in said and "Choose a" in said and said.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.ckpt"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_from_a_classifier_to_the_verdict(tmp_path):
    """Two epochs on 400 small images: too little to explain anything, enough to go all the way."""
    data = ["--data.options", '{"size": 32, "length": 400}', "--data.eval_batch_size", "50"]
    quiet = ["--trainer.progress_bar", "false", "--trainer.max_epochs", "2", "--trainer.precision", "32"]
    classifier, random, run = (str(tmp_path / name) for name in ("c", "random.ckpt", "e"))
    assert main(["fit", "--config", f"{ROOT}/configs/classifier/shapes.yaml", "--run_dir", classifier, *data, *quiet]) == 0
    trained = f"{classifier}/checkpoints/best.ckpt"
    assert main(["randomize", trained, "--out", random]) == 0
    fit = ["fit", "--config", f"{ROOT}/configs/explainer/shapes_quickstart.yaml", "--run_dir", run, "--classifier.checkpoint", random]
    assert main([*fit, *data, *quiet, "--evaluate_with", "null", "--logging.images_every_n_epochs", "0"]) == 0
    config = ["--config", f"{ROOT}/configs/evaluate/randomised.yaml", *data[:2], "--progress", "false", "--limit", "60"]
    method = ["--methods.explainer.checkpoint", f"{run}/checkpoints/best.ckpt"]
    assert main(["evaluate", *config, *method, "--classifier.checkpoint", random, "--out", str(tmp_path / "results")]) == 0
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    verdicts = {v["method"]: v for v in summary["verdicts"]}
    assert set(verdicts) == {"explainer", "grad_cam", "one", "centre", "random", "ground_truth"} and summary["complete"]
    assert verdicts["ground_truth"]["passed"] is False and verdicts["random"]["passed"] and verdicts["one"]["passed"]
    assert isinstance(verdicts["explainer"]["passed"], bool) and verdicts["explainer"]["details"]["ranked"] < 0.7
    assert main(["evaluate", *config, *method, "--classifier.checkpoint", trained, "--out", str(tmp_path / "wrong")]) == 2
