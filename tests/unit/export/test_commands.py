"""``explainer explain | export | bench`` from the command line to the files they write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import explainer
from explainer.cli import main
from explainer.commands.measuring import Contestant, bench, contestants, onnx_contestant, table
from explainer.errors import ConfigError, CorruptSampleError, DatasetNotFoundError
from explainer.files import Owner
from explainer.inference import explaining, pictures
from explainer.inference.explaining import ExplainOptions, explain, safe_name, upsample
from explainer.inference.pictures import batches, find_pictures, read_calibration
from explainer.inference.runtime import open_model
from explainer.locks import IN_USE
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum
from tests.unit.export.conftest import colored


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_explain_a_folder_with_a_checkpoint(checkpoint: Path, net: Explainer, folder: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert main(["explain", str(checkpoint), str(folder), "--out", str(out), "--quiet", "--batch_size", "2"]) == 0
    result = read(out / "results.json")
    assert [row["name"] for row in result["images"]] == ["deep/one.png", "one.png"]
    assert list(result["failed"]) == ["broken.png"] and "broken.png" in result["failed"]["broken.png"]
    assert "skipped broken.png" in capsys.readouterr().out
    row = result["images"][1]
    assert (row["height"], row["width"], row["scores"]) == (40, 48, None) and row["chosen"] == ["red"]
    files = sorted(p.name for p in (out / "one.png").iterdir())
    assert files == ["mask_000_red.png", "masks.npz", "overlay.png", "overlay_000_red.png"]
    with Image.open(out / "one.png" / "mask_000_red.png") as mask:
        assert mask.size == (48, 40) and mask.mode == "L"
        written = np.asarray(mask)
    stored = np.load(out / "one.png" / "masks.npz")
    pixels = pictures.load_picture("one", folder / "one.png", (32, 32))
    with torch.no_grad():
        expected = net(torch.from_numpy(pixels.small)[None])[0]
    assert stored["masks"].dtype == np.float32, "float16 would lose the order of pixels near 1"
    assert np.abs(stored["masks"] - expected.numpy()).max() < 1e-5 and list(stored["classes"])[2] == "a/b blue"
    assert row["areas"]["red"] == pytest.approx(float(expected[0].mean()), abs=1e-4)
    assert row["peaks"]["red"] == pytest.approx(float(expected[0].max()), abs=1e-4)
    large = torch.nn.functional.interpolate(expected[None, :1], size=(40, 48), mode="bilinear", align_corners=False)[0, 0]
    assert np.abs(written / 255 - large.numpy()).max() <= 0.5 / 255 + 1e-6
    assert (out / "contact_sheet_001.png").stat().st_size > 1000


def test_explain_with_the_fused_onnx_and_named_classes(onnx_fused: tuple[Path, Any], folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = [str(folder / "one.png"), str(folder / "deep" / "one.png")]
    assert main(["explain", str(onnx_fused[0]), *files, "--out", str(out), "--quiet", "--classes", "a/b blue, red"]) == 0
    result = read(out / "results.json")
    assert [row["name"] for row in result["images"]] == ["one.png", "2_one.png"]
    assert all(row["chosen"] == ["a/b blue", "red"] and 0 <= row["scores"]["green"] <= 1 for row in result["images"])
    assert (out / "2_one.png" / "mask_002_a_b_blue.png").is_file()


def test_the_classifier_chooses_the_classes(
    onnx_any: tuple[Path, Any], classifier: Explanandum, classifier_checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["explain", str(onnx_any[0]), str(folder), "--out", str(out), "--quiet", "--classifier", str(classifier_checkpoint)]
    assert main(arguments) == 0
    for row in read(out / "results.json")["images"]:
        small = torch.from_numpy(pictures.load_picture("x", folder / row["name"], (32, 32)).small)[None]
        with torch.no_grad():
            scores = dict(zip(classifier.class_names, classifier(small).sigmoid()[0].tolist(), strict=True))
        assert row["scores"] == pytest.approx(scores, abs=1e-5)
        assert row["chosen"] == sorted((c for c in scores if scores[c] >= 0.5), key=lambda c: -scores[c])


def test_a_corrupt_image_stops_where_asked(checkpoint: Path, folder: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["explain", str(checkpoint), str(folder), "--out", str(tmp_path / "out"), "--quiet", "--on_error", "raise"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "broken.png" in error and "--on_error skip" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["explain", "{model}", "{folder}", "--out", "{out}", "--classes", "blu"],
            "unknown class 'blu'. This model has: red, green, a/b blue.",
        ),
        (["explain", "{model}", "{folder}/absent", "--out", "{out}"], "absent does not exist"),
        (["explain", "{folder}/absent.ckpt", "{folder}", "--out", "{out}"], "absent.ckpt does not exist"),
        (["explain", "{model}", "{folder}", "--out", "{out}", "--treshold", "0.4"], "Did you mean --threshold?"),
        (["explain", "{model}", "{folder}", "--out", "{out}", "--batch_size", "0"], "whole number of at least 1, received '0'"),
        (["explain", "{model}", "{folder}", "--out", "{out}", "--threshold", "50"], "a probability from 0 to 1, received '50'"),
        (["export", "{model}", "--out", "{out}", "--format", "onxx"], "Did you mean onnx?"),
        (["export", "{model}", "--out", "{out}", "--fused", "--format", "onnx,safetensors"], "safetensors stores the Explainer alone"),
        (["export", "{model}", "--out", "{out}", "--precision", "fp16", "--format", "onnx,torch_export"], "with precision 'fp16'"),
        (["export", "{model}", "--out", "{out}", "--size", "32x"], "expected a side (224) or HEIGHTxWIDTH (240x320)"),
        (["export", "{model}", "--out", "{out}", "--fused", "--format", "onnx"], "needs the classifier: --classifier CHECKPOINT"),
        (["export", "{model}"], "the following arguments are required: --out"),
        (["export", "{model}", "--out", "{out}", "--metrics", "{folder}/notes.txt"], "notes.txt cannot be read"),
        (["bench"], "nothing to measure"),
    ],
)
def test_mistakes_end_in_one_paragraph(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: Any, arguments: list[str], text: str
) -> None:
    filled = [a.format(model=checkpoint, folder=folder, out=tmp_path / "out") for a in arguments]
    assert main(filled) == 2
    error = capsys.readouterr().err
    assert text in error and "Traceback" not in error


def test_all_unreadable_is_an_error_and_no_image_too(net: Explainer, checkpoint: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    with pytest.raises(DatasetNotFoundError, match="no images in"):
        find_pictures([bad])
    (bad / "a.jpg").write_bytes(b"x")
    with pytest.raises(CorruptSampleError, match=r"none of the 1 files could be read.*a\.jpg"):
        explain([bad], open_model(checkpoint), tmp_path / "out")


def test_masks_of_an_earlier_call_are_not_explained(checkpoint: Path, folder: Path, capsys: Any) -> None:
    (folder / "broken.png").unlink()
    argv = ["explain", str(checkpoint), str(folder), "--quiet", "--out"]
    for _ in range(2):
        assert main([*argv, str(folder / "masks")]) == 0
        assert [row["name"] for row in read(folder / "masks" / "results.json")["images"]] == ["deep/one.png", "one.png"]
    assert main(["explain", str(checkpoint), str(folder / "masks" / "one.png" / "overlay.png"), *argv[3:], str(folder / "masks")]) == 0
    assert main([*argv, str(folder)]) == 2
    assert "is the folder of the images" in capsys.readouterr().err


def test_an_explanation_that_was_cut_short_does_not_look_finished(
    checkpoint: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "broken.png").unlink()
    argv = ["explain", str(checkpoint), str(folder), "--quiet", "--out", str(tmp_path / "out"), "--batch_size", "1"]
    assert main(argv) == 0 and (tmp_path / "out" / "results.json").is_file()
    monkeypatch.setattr(explaining, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(argv) == 130
    assert not (tmp_path / "out" / "results.json").exists(), "that of the first call would stand beside masks of the second"


@pytest.mark.parametrize("command", ["explain", "export"])
def test_two_commands_in_one_folder(command: str, checkpoint: Path, folder: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / IN_USE).write_text(f"{Owner(Owner.this().host, os.getppid(), 0)}\n{command}\n")
    argv = {"explain": ["explain", str(checkpoint), str(folder)], "export": ["export", str(checkpoint), "--format", "safetensors"]}[command]
    assert main([*argv, "--out", str(out)]) == 2
    assert f"{command} of process {os.getppid()} on" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == [IN_USE]
    (out / IN_USE).unlink()
    assert main([*argv, "--out", str(out)]) == 0 and not (out / IN_USE).exists()


def test_export_command_writes_and_loads_again(checkpoint: Path, net: Explainer, folder: Path, tmp_path: Path, capsys: Any) -> None:
    (checkpoint.parent.parent / "summary.json").write_text(json.dumps({"val/iou": 0.75}))
    (folder / "broken.png").unlink()
    out = tmp_path / "export"
    assert main(["export", str(checkpoint), "--out", str(out), "--format", "safetensors,torch_export", "--calibration", str(folder)]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "drift.json", "model.pt2", "model.safetensors"]
    printed = capsys.readouterr().out
    assert "largest mask difference" in printed and "IoU at 0.5 against eager" in printed and "file size" in printed
    assert "| val/iou | 0.7500 |" in (out / "README.md").read_text()
    images = colored(2, 32, 5)[0]
    with torch.no_grad():
        assert torch.equal(explainer.load(out)(images), net(images))
    assert np.abs(open_model(out / "model.pt2").run(images.numpy())["masks"] - net(images).numpy()).max() < 1e-5


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from explainer.cli import main\n"
        "for c in ('explain', 'export', 'bench'):\n"
        "    try: main([c, '--help'])\n"
        "    except SystemExit: pass\n"
        "print([m for m in ('torch', 'onnx', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3], check=False)
    assert done.stdout.strip().endswith("[]") and "--calibration" in done.stdout and "--dynamic_size" in done.stdout, done.stderr[-1000:]


def test_bench_command_pairs_files_and_classifier(
    onnx_fused: tuple[Path, Any], classifier_checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "bench.json"
    arguments = ["bench", str(onnx_fused[0]), "--classifier", str(classifier_checkpoint), "--batch", "1", "2", "--repeats", "2"]
    arguments += ["--quiet", "--out", str(out)]
    assert main(arguments) == 0
    report = read(out)
    names = [(row["name"].split("/")[-1], row["batch"]) for row in report["rows"]]
    assert names == [(n, b) for b in (1, 2) for n in ("fused.onnx", "classifier (torch)", "classifier (onnxruntime)")]
    for row in report["rows"]:
        assert row["images_per_s"] == pytest.approx(1000 * row["batch"] / row["wall_ms"]) and row["file_bytes"] > 0
    assert report["rows"][-1]["relative"] == 1.0 and report["threads"] == 1 and report["load"]["before"]
    assert "load" in capsys.readouterr().out


def test_bench_is_interleaved_and_relative_to_the_last() -> None:
    calls: list[tuple[str, int]] = []

    def rival(name: str, seconds: float) -> Contestant:
        def call(images: np.ndarray) -> None:
            import time

            calls.append((name, len(images)))
            time.sleep(seconds)

        return Contestant(name, call, (4, 4))

    report = bench([rival("slow", 0.03), rival("fast", 0.01)], batches=(1, 3), repeats=3)
    assert calls == [("slow", 1), ("fast", 1)] * 4 + [("slow", 3), ("fast", 3)] * 4
    assert report.rows[0].wall_ms >= 30 and 1.2 < report.rows[0].relative < 5 and report.rows[1].relative == 1.0
    assert report.rows[0].cpu_ms < report.rows[0].wall_ms
    rows = table(report)
    assert rows[0][0] == "model" and len(rows) == 5 and rows[1][0] == "slow"
    with pytest.raises(ConfigError, match="repeats and batch sizes"):
        bench([], repeats=0)


def test_models_of_different_sizes_are_not_paired(onnx_fused: tuple[Path, Any], checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"different sizes cannot be paired.*Set --size"):
        contestants([onnx_fused[0], checkpoint], 1, side=48)


def test_prefetching_keeps_order_and_skips(folder: Path) -> None:
    failed: dict[str, str] = {}
    groups = list(batches(find_pictures([folder, folder / "one.png"]), (16, 24), 2, on_error="skip", failed=failed))
    assert [[p.name for p in g] for g in groups] == [["deep/one.png", "one.png"]] and list(failed) == ["broken.png"]
    assert groups[0][0].small.shape == (3, 16, 24) and groups[0][0].small.dtype == np.float32 and groups[0][0].small.max() <= 1
    with pytest.raises(CorruptSampleError, match="--on_error skip"):
        list(batches(find_pictures([folder]), (16, 16), 2, on_error="raise", failed={}))
    (folder / "broken.png").unlink()
    assert read_calibration(folder, (8, 8), limit=1).shape == (1, 3, 8, 8)
    assert read_calibration(folder, (8, 12)).shape == (2, 3, 8, 12)


def test_small_pieces() -> None:
    assert safe_name("a/b: c") == "a_b_c" and safe_name("../..") == "class" and safe_name("Katze-1") == "Katze-1"
    assert upsample(np.zeros((0, 4, 4), np.float32), (9, 7)).shape == (0, 9, 7)
    ramp = upsample(np.array([[[0.0, 1.0]]], np.float32), (1, 4))[0, 0]
    assert torch.allclose(ramp, torch.tensor([0.0, 0.25, 0.75, 1.0]))


def test_more_images_than_a_sheet_holds(checkpoint: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explaining, "ROWS", 1)
    found = explain([folder], open_model(checkpoint), tmp_path / "out", ExplainOptions(side=40))
    assert found["network_size"] == [40, 40]
    assert sorted(p.name for p in (tmp_path / "out").glob("contact*")) == ["contact_sheet_001.png", "contact_sheet_002.png"]
    # What an earlier call wrote for other classes and more images would be taken for an answer of this one.
    explain([folder], open_model(checkpoint), tmp_path / "out", ExplainOptions(classes=["red"], side=40))
    assert sorted(p.name for p in (tmp_path / "out" / "one.png").glob("mask_*")) == ["mask_000_red.png"]
    explain([folder / "one.png"], open_model(checkpoint), tmp_path / "out", ExplainOptions(classes=["a/b blue"], side=40))
    assert sorted(p.name for p in (tmp_path / "out" / "one.png").iterdir()) == [
        "mask_002_a_b_blue.png",
        "masks.npz",
        "overlay.png",
        "overlay_002_a_b_blue.png",
    ]
    assert [p.name for p in (tmp_path / "out").glob("contact*")] == ["contact_sheet_001.png"]


@pytest.mark.slow
def test_any_module_can_be_timed_in_onnxruntime(net: Explainer) -> None:
    from explainer.inference.formats import ExportModel

    rival = onnx_contestant("half", ExportModel(net), (32, 32), 1, "fp16")
    assert rival.call(np.zeros((3, 3, 32, 32), np.float32))["masks"].shape == (3, 3, 32, 32) and rival.file_bytes > 0


def test_masks_of_wanted_areas_are_nested(
    checkpoint: Path, net: Explainer, folder: Path, tmp_path: Path, capsys: Any, onnx_any: Any
) -> None:
    out = tmp_path / "out"
    arguments = ["explain", str(checkpoint), str(folder), "--out", str(out), "--quiet", "--classes", "red", "--area", "0.2,0.05,0.1"]
    assert main(arguments) == 0
    before = np.zeros((3, 32, 32))
    for share in ("0.05", "0.1", "0.2"):
        inside = out / "one.png" / f"area_{share}"
        assert sorted(p.name for p in inside.iterdir()) == ["mask_000_red.png", "masks.npz", "overlay.png", "overlay_000_red.png"]
        masks = np.load(inside / "masks.npz")["masks"].astype(np.float64)
        assert np.allclose(masks.mean(axis=(1, 2)), float(share), atol=1e-3) and (masks >= before - 2e-3).all()
        before = masks
    assert (out / "one.png" / "mask_000_red.png").is_file()
    again = ["--out", str(tmp_path / "x"), "--quiet"]
    for options, words in (
        ([str(onnx_any[0]), str(folder), "--area", "0.1"], "--area needs the network's logits"),
        ([str(checkpoint), str(folder), "--area", "0.1,1"], "expected shares of the image between 0 and 1"),
        ([str(checkpoint), str(folder), "--refine_budget", "3"], "--refine_budget belongs to --refine"),
        (
            [str(checkpoint), str(folder), "--selector", "s.json", "--refine_iterations", "3"],
            "a selector refines exactly as it was calibrated",
        ),
    ):
        assert main(["explain", *options, *again]) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "x" / "results.json").exists()


@pytest.mark.slow
def test_bench_takes_models_that_are_not_square(net: Explainer, classifier_checkpoint: Path, tmp_path: Path) -> None:
    from explainer.export.exporting import export

    path, _ = export(net, "torch_export", tmp_path / "wide", size=(24, 40))
    rivals = contestants([path], 1, explainer_classifier(classifier_checkpoint))
    assert {rival.size for rival in rivals} == {(24, 40)} and len(rivals) == 3


def explainer_classifier(path: Path) -> Explanandum:
    from explainer.models.checkpoints import load_explanandum

    return load_explanandum(path)


def test_masks_are_refined_with_the_fill_of_the_training(classifier: Explanandum) -> None:
    from explainer.commands import explain
    from explainer.commands.parsing import command_parser

    args = command_parser(explain.COMMAND, "explainer explain").parse_args(
        ["m", "i", "--out", "o", "--refine", "igos_pp", "--refine_iterations", "3"]
    )
    made = explain.treatment_of(args, classifier, {"fill": "white"}, 0.5)
    assert made.fill == "white" and made.iterations == 3 and made.budget_s is None
    assert explain.treatment_of(args, classifier, {}, 0.5).fill == "mean"
