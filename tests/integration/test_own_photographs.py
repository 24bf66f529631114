"""The blocks of docs/tutorials/own_photographs.md, run as they stand, on a few small pictures."""

from __future__ import annotations

import csv
import json
import logging
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from explainer.cli import main
from explainer.models.checkpoints import load_explanandum

ROOT = Path(__file__).parents[2]
CLASSES = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 50, 40)}
#: What makes the runs short; nothing that a user would have to guess.
SHORT = {
    "fit": ["--data.options.size", "64", "--trainer.max_epochs", "2", "--data.batch_size", "8"],
    "test": [],
    "explain": ["--quiet"],
}


def picture(path: Path, color: tuple[int, int, int], seed: int) -> None:
    """A patch of one colour somewhere on grey noise, in portrait format."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(90, 150, (96, 72, 3), dtype=np.uint8)
    top, left = rng.integers(0, 56), rng.integers(0, 32)
    pixels[top : top + 40, left : left + 40] = color
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def blocks() -> list[list[str]]:
    """The tutorial's commands, as lists of arguments."""
    text = (ROOT / "docs/tutorials/own_photographs.md").read_text(encoding="utf-8")
    return [shlex.split(block) for block in re.findall(r"```bash\n(.*?)\n```", text, flags=re.S)]


def test_four_commands_from_photographs_to_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    import timm

    for name, color in CLASSES.items():
        for i in range(20):
            picture(tmp_path / "photos" / name / f"{i:02d}.png", color, i)
    picture(tmp_path / "new_photos" / "one.png", CLASSES["red"], 100)
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "weights.pth")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    commands = blocks()
    assert [command[:3] for command in commands[:3]] == [["python", "train.py", word] for word in ("fit", "test", "fit")]
    assert commands[3][:2] == ["explainer", "explain"] and len(commands) == 4
    printed = []
    with caplog.at_level(logging.WARNING):
        for command in commands:
            arguments = command[2:] if command[1] == "train.py" else command[1:]
            assert main([*arguments, *SHORT[arguments[0]]]) == 0
            printed.append(" ".join(capsys.readouterr().out.split()))
            (tmp_path / "weights.pth").unlink(missing_ok=True)  # nothing needs it after the first
    assert "classifier.init_from: 100 of 102 tensors from weights.pth" in caplog.text and "(1000, 512) there" in caplog.text
    assert "recall" in printed[0] and "recall" in printed[1] and "blue" in printed[1]
    with (tmp_path / "runs/photographs_classifier/classes_test.csv").open() as file:
        assert [row[0] for row in csv.reader(file)] == ["class", *CLASSES]
    net = load_explanandum(tmp_path / "runs/photographs_classifier/checkpoints/best.ckpt")
    assert net.arch == "timm:resnet18" and net.normalization == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert json.loads((tmp_path / "masks/results.json").read_text())
    assert Image.open(next(iter(sorted((tmp_path / "masks").rglob("*.png"))))).height >= 96
