"""Which classifiers ``explain``, ``export`` and ``bench`` take: this project's, plain state_dicts, and ONNX files that give scores only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from explainer.cli import main
from explainer.errors import CheckpointError, ConfigError
from explainer.inference.classifier import described, open_classifier
from explainer.inference.describe import describe
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum
from tests.unit.export.conftest import NAMES

BUILT = {"arch": "small_vgg", "options": {"widths": [8, 8]}, "input_size": 32, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
OPTIONS = "{arch: small_vgg, options: {widths: [8, 8]}, input_size: 32}"


@pytest.fixture
def state_dict(classifier: Explanandum, tmp_path: Path) -> Path:
    torch.save(classifier.classifier.state_dict(), tmp_path / "plain.pth")
    return tmp_path / "plain.pth"


@pytest.fixture(scope="session")
def onnx_classifier(classifier: Explanandum, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("black_box") / "classifier.onnx"
    torch.onnx.export(
        torch.nn.Sequential(classifier.classifier).eval(),
        (torch.zeros(2, 3, 32, 32),),
        file,
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
    )
    return file


def knowing(checkpoint: Path, built: Any) -> Path:
    """The same Explainer, which knows how its classifier was built."""
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["classifier"] = built
    path = checkpoint.with_name("knows.ckpt")
    torch.save(content, path)
    return path


def scores(out: Path) -> list[dict[str, float]]:
    return [row["scores"] for row in json.loads((out / "results.json").read_text())["images"]]


def test_explain_takes_every_kind_of_classifier(
    checkpoint: Path, classifier_checkpoint: Path, state_dict: Path, onnx_classifier: Path, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    def explained(model: Path, name: str, *options: str) -> list[dict[str, float]]:
        assert main(["explain", str(model), str(folder), "--out", str(tmp_path / name), "--quiet", *options]) == 0, capsys.readouterr().err
        return scores(tmp_path / name)

    wanted = explained(checkpoint, "own", "--classifier", str(classifier_checkpoint))
    assert explained(checkpoint, "plain", "--classifier", str(state_dict), "--classifier_options", OPTIONS) == wanted
    assert explained(knowing(checkpoint, BUILT), "known", "--classifier", str(state_dict)) == wanted
    found = explained(
        checkpoint, "onnx", "--classifier", str(onnx_classifier), "--classifier_options", "{options: {normalize: true}, input_size: 32}"
    )
    assert "cannot be checked" in capsys.readouterr().err
    for row, expected in zip(found, wanted, strict=True):
        assert row == pytest.approx(expected, abs=1e-5)


def test_selection_needs_scores_only(checkpoint: Path, onnx_classifier: Path, folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "s.json").write_text(json.dumps({"threshold": 2 / 3, "alpha": 0.1, "kind": "marginal", "delta": None, "images": 30}))
    common = [
        "explain",
        str(checkpoint),
        str(folder),
        "--quiet",
        "--classifier",
        str(onnx_classifier),
        "--classifier_options",
        "{options: {normalize: true}, input_size: 32}",
        "--classes",
        "red",
    ]
    assert main([*common, "--out", str(tmp_path / "out"), "--selector", str(tmp_path / "s.json")]) == 0
    row = json.loads((tmp_path / "out" / "results.json").read_text())["images"][0]
    assert row["withheld"] == [name for name, fact in row["treatment"].items() if fact["quality"] <= 2 / 3] and row["treatment"]
    capsys.readouterr()
    assert main([*common, "--out", str(tmp_path / "out"), "--refine", "igos_pp"]) == 2
    assert "igos_pp needs gradients" in capsys.readouterr().err
    assert main([*common, "--out", str(tmp_path / "out"), "--refine", "guided_filter", "--refine_iterations", "3"]) == 2
    assert "--refine_iterations belongs to --refine; name a search" in capsys.readouterr().err
    assert main([*common, "--out", str(tmp_path / "out"), "--refine", "guided_filter"]) == 0
    facts = [row["treatment"] for row in json.loads((tmp_path / "out" / "results.json").read_text())["images"]]
    assert facts and all(set(f["red"]) == {"quality", "refined", "accepted"} for f in facts)


def test_bench_and_export_take_them_too(checkpoint: Path, state_dict: Path, onnx_classifier: Path, tmp_path: Path, capsys: Any) -> None:
    plain = ["--classifier", str(state_dict), "--classifier_options", OPTIONS]
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "e"), "--format", "torch_export", "--fused", *plain]) == 0
    black = ["--classifier", str(onnx_classifier), "--classifier_options", "{options: {normalize: true}, input_size: 32}"]
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "s"), *black]) == 0
    assert json.loads((tmp_path / "s" / "drift.json").read_text())["model.safetensors"]["faithfulness"]["change"] == pytest.approx(
        0, abs=1e-6
    )
    capsys.readouterr()
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "f"), "--format", "onnx", "--fused", *black]) == 2
    assert "gives scores only" in capsys.readouterr().err and not (tmp_path / "f").exists()
    out = tmp_path / "bench.json"
    assert main(["bench", str(checkpoint), "--batch", "1", "--repeats", "2", "--quiet", "--out", str(out), *black]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"].split("/")[-1] for row in rows] == ["best.ckpt", "classifier (scores only)"]


def test_what_a_model_says_of_its_classifier_runs_nothing(
    checkpoint: Path, state_dict: Path, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    """A name of foreign code in the Explainer's file is neither imported nor taken for the user's own wish."""
    mark = tmp_path / "mark"
    (tmp_path / "foreign.py").write_text(f"open({str(mark)!r}, 'w').close()\ndef build(*a, **k): raise SystemExit\n")
    import sys

    sys.path.insert(0, str(tmp_path))
    try:
        for arch in ("foreign:build", "callable:foreign:build", "timm:../x", 3):
            model = knowing(checkpoint, {**BUILT, "arch": arch})
            arguments = ["explain", str(model), str(folder), "--out", str(tmp_path / "out"), "--quiet", "--classifier", str(state_dict)]
            assert main(arguments) == 2
            assert "does not fit small_vgg" in capsys.readouterr().err and not mark.exists()
    finally:
        sys.path.remove(str(tmp_path))


def test_descriptions_hold_no_folders(net: Explainer) -> None:
    assert described({"arch": "onnx:/home/someone/c.onnx", "options": {"cache_file": "/home/x", "normalize": True}, "mean": [0.5]}) == {
        "arch": "onnx:c.onnx",
        "options": {"normalize": True},
        "mean": [0.5],
        "std": None,
        "input_size": None,
    }
    assert described(None) is None and described({"arch": 3}) is None
    assert describe(net)["classifier"] is None


def test_options_win_over_what_the_model_knows(state_dict: Path) -> None:
    known = {"classes": list(NAMES), "task": "multilabel", "classifier": {**BUILT, "mean": [0.1, 0.1, 0.1]}}
    opened = open_classifier(str(state_dict), "{mean: [0.2, 0.2, 0.2], task: multiclass}", known)
    assert np.allclose(opened.mean, 0.2) and opened.task == "multiclass" and opened.class_names == NAMES and opened.input_size == 32
    assert np.allclose(open_classifier(str(state_dict), None, known).mean, 0.1)
    for options, words in (("{mean: {a: 1}}", "another kind|mean"), ("{arch: [1]}", "arch|another kind")):
        with pytest.raises((ConfigError, CheckpointError), match=words):
            open_classifier(str(state_dict), options, known)


def test_the_size_of_the_training_is_the_default(classifier_checkpoint: Path, tmp_path: Path) -> None:
    from explainer.inference.classifier import classifier_size

    content = torch.load(classifier_checkpoint, weights_only=True)
    assert classifier_size(str(classifier_checkpoint)) is None
    content["hyper_parameters"]["image_size"] = 48
    torch.save(content, tmp_path / "c.ckpt")
    assert classifier_size(str(tmp_path / "c.ckpt")) == 48
    torch.save(content["state_dict"], tmp_path / "plain.pt")
    assert classifier_size(str(tmp_path / "plain.pt"), "{arch: 'torchvision:resnet18'}") is not None
    assert classifier_size("x.onnx") is None and classifier_size(None) is None
