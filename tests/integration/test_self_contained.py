"""What fit has written is enough: its checkpoints open without the files that training began from."""

import timm
import torch
from PIL import Image

import explainer
from explainer.cli import main
from tests.integration.launch import EXPLAINER, QUIET

DATA = ["--data.options", "{size: 32, length: 8}", "--data.batch_size", "4", "--trainer.max_epochs", "1"]


def entries(value, path=""):
    """``(where, text)`` of every text in nested values."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from entries(inner, f"{path}.{key}")
    elif isinstance(value, str):
        yield path, value


def test_checkpoints_outlive_what_they_began_from(tmp_path, capsys):
    start = tmp_path / "start.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=6).state_dict(), start)
    classifier, model = tmp_path / "c/checkpoints/best.ckpt", tmp_path / "e/checkpoints/best.ckpt"
    argv = ["fit", "--task", "classify", "--classifier.arch", "timm:test_resnet", *DATA, *QUIET, "--run_dir", f"{tmp_path}/c"]
    assert main([*argv, "--classifier.options", f"{{checkpoint_path: {start}}}"]) == 0
    argv = [*EXPLAINER[:7], *DATA, *QUIET, "--classifier.checkpoint", str(classifier), "--run_dir", f"{tmp_path}/e"]
    assert main([*argv, "--classifier.arch", "timm:test_resnet", "--classifier.options", f"{{checkpoint_path: {start}}}"]) == 0
    start.unlink()
    for path in (classifier, model):
        content = torch.load(path, weights_only=True)
        kept = {key: content[key] for key in ("hyper_parameters", "run")}
        assert not [entry for entry in entries(kept) if str(tmp_path) in entry[1]], "no path of this machine"
        assert not [where for where, _ in entries(kept) if "checkpoint_path" in where]
    explainer.load(model)
    Image.new("RGB", (32, 32), (200, 40, 80)).save(tmp_path / "p.png")
    picture, out = str(tmp_path / "p.png"), str(tmp_path / "masks")
    assert main(["explain", str(model), picture, "--classifier", str(classifier), "--out", out, "--quiet"]) == 0
    assert main(["overlay", picture, "--classifier", str(classifier), "--size", "32", "--out", f"{tmp_path}/o.html"]) == 0
    assert main(["randomize", str(classifier), "--size", "32", "--out", f"{tmp_path}/random.ckpt"]) == 0
    assert "error" not in capsys.readouterr().err
