"""``calibrate`` and the refining options of ``explain`` through the real command line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import explainer as package
from explainer.cli import main
from tests.integration.test_objectives import NET
from tests.integration.test_train import TINY


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    assert main(["fit", "--task", "classify", "--run_dir", f"{folder}/c", "--classifier.options", "{widths: [8, 8]}", *TINY]) == 0
    classifier = f"{folder}/c/checkpoints/best.ckpt"
    assert main(["fit", "--run_dir", f"{folder}/e", "--classifier.checkpoint", classifier, *TINY, *NET]) == 0
    pictures = folder / "pictures"
    pictures.mkdir()
    random = np.random.default_rng(0)
    for n in range(2):
        Image.fromarray(random.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(pictures / f"{n}.png")
    return folder, classifier, f"{folder}/e/checkpoints/best.ckpt"


def explain(runs, out, *options):
    folder, classifier, model = runs
    return main(
        [
            "explain",
            model,
            str(folder / "pictures"),
            "--out",
            str(out),
            "--classifier",
            classifier,
            "--classes",
            "stripes,dots",
            "--quiet",
            *options,
        ]
    )


def test_refined_masks_are_written(runs, tmp_path, capsys):
    assert explain(runs, tmp_path / "plain") == 0
    assert explain(runs, tmp_path / "fine", "--refine", "extremal_perturbation", "--refine_iterations", "3", "--refine_budget", "5") == 0
    plain, fine = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("plain", "fine"))
    assert "treatment" not in plain["images"][0]
    facts = fine["images"][0]["treatment"]
    assert set(facts) == {"stripes", "dots"} and fine["images"][0]["withheld"] == []
    for name in ("stripes", "dots"):
        differs = plain["images"][0]["areas"][name] != fine["images"][0]["areas"][name]
        assert differs == facts[name]["refined"] and facts[name]["accepted"] is None
    assert main(["explain", runs[2], str(runs[0] / "pictures"), "--out", str(tmp_path / "x"), "--refine", "igos_pp", "--quiet"]) == 2
    assert "--classifier" in capsys.readouterr().err


def test_a_plain_state_dict_does_not_hide_another_order_of_classes(runs, tmp_path, capsys):
    """Its fingerprint is the trained one's, and its names are the data's."""
    _, classifier, model = runs
    state = torch.load(classifier, weights_only=True)["state_dict"]
    torch.save({k.removeprefix("classifier."): v for k, v in state.items()}, tmp_path / "plain.pt")
    swapped = ["--data.options", "{size: 32, length: 24, class_names: [checks, stripes, dots, rings, grid, wedges]}"]
    swapped += ["--classifier.checkpoint", f"{tmp_path}/plain.pt", "--classifier.options", "{widths: [8, 8]}"]
    swapped += ["--classifier.mean", "[0.485, 0.456, 0.406]", "--classifier.std", "[0.229, 0.224, 0.225]"]
    assert main(["calibrate", "--model", model, "--out", str(tmp_path / "s.json"), *swapped]) == 2
    assert "was trained for the classes stripes, checks, dots" in (error := capsys.readouterr().err) and "(in another order)" in error
    method = ["--methods", f"{{explainer: {{checkpoint: {model}}}}}", "--protocols", "[segmentation]", "--out", str(tmp_path / "r")]
    assert main(["evaluate", *method, *swapped]) == 2
    assert "explains the classes stripes, checks, dots" in capsys.readouterr().err


def test_calibrate_then_withhold(runs, tmp_path, capsys):
    _, classifier, model = runs
    command = [
        "calibrate",
        "--model",
        model,
        "--out",
        str(tmp_path / "s.json"),
        "--classifier.checkpoint",
        classifier,
        "--data.options",
        "{size: 32, length: 24}",
    ]
    # Of a classifier trained for a moment, every class is predicted from probability 0.
    command += ["--predicted_from", "0"]
    assert main([*command, "--alpha", "0.2", "--least_iou", "null", "--fallback", "refine", "--iterations", "2"]) == 0
    assert "from 24 of 24 images (one of their predicted classes each)" in capsys.readouterr().out
    stored = json.loads((tmp_path / "s.json").read_text())
    assert stored["classes"] == "predicted" and stored["fill"] == "mean"
    assert stored["classifier"] == package.load(model).metadata["fingerprint"]
    assert stored["fallback"] == "refine" and stored["refinement"] == {"method": "extremal_perturbation", "iterations": 2}
    content = torch.load(model, weights_only=True)
    content["hyper_parameters"]["fill"] = "white"
    torch.save(content, tmp_path / "white.ckpt")
    again = [*command, "--alpha", "0.2", "--model", str(tmp_path / "white.ckpt"), "--out", str(tmp_path / "white.json")]
    assert main(again) == 0 and json.loads((tmp_path / "white.json").read_text())["fill"] == "white"
    (tmp_path / "strict.json").write_text(json.dumps({**stored, "threshold": 0.999, "fallback": "abstain"}))
    assert explain(runs, tmp_path / "out", "--selector", str(tmp_path / "strict.json")) == 2
    assert "--threshold 0, or calibrate with --predicted_from 0.5" in capsys.readouterr().err
    assert explain(runs, tmp_path / "out", "--selector", str(tmp_path / "strict.json"), "--threshold", "0") == 0
    row = json.loads((tmp_path / "out/results.json").read_text())["images"][0]
    assert row["withheld"] == ["stripes", "dots"] and row["chosen"] == []
    (tmp_path / "lax.json").write_text(json.dumps({**stored, "threshold": -2.0}))
    assert explain(runs, tmp_path / "all", "--selector", str(tmp_path / "lax.json"), "--threshold", "0") == 0
    row = json.loads((tmp_path / "all/results.json").read_text())["images"][0]
    assert all(f["covered"] for f in row["treatment"].values())
    assert row["withheld"] == [] and all(f["accepted"] and not f["refined"] for f in row["treatment"].values())
    assert main([*command, "--alpha", "0.01"]) == 2
    assert "too few for alpha" in capsys.readouterr().err
    assert explain(runs, tmp_path / "both", "--selector", str(tmp_path / "lax.json"), "--refine", "igos_pp") == 2
    assert "choose one" in capsys.readouterr().err
    (tmp_path / "half.json").write_text(json.dumps({**stored, "threshold": -2.0, "predicted_from": 1.0}))
    assert explain(runs, tmp_path / "apart", "--selector", str(tmp_path / "half.json"), "--threshold", "1") == 0
    row = json.loads((tmp_path / "apart/results.json").read_text())["images"][0]
    assert [f["covered"] for f in row["treatment"].values()] == [False, False] and "4 of the masks are of named" in capsys.readouterr().err
    (tmp_path / "other.json").write_text(json.dumps({**stored, "explainer": "0123456789abcdef"}))
    assert explain(runs, tmp_path / "x", "--selector", str(tmp_path / "other.json"), "--threshold", "0") == 2
    assert "calibrated for the Explainer with fingerprint 0123456789abcdef" in capsys.readouterr().err
