"""The drift report against numbers worked out by hand, with a network and a runtime that are constants."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from explainer.errors import ConfigError, ExportError
from explainer.export.card import add_report, card
from explainer.export.exporting import split_calibration
from explainer.export.parity import LIMITS, DriftReport, interleaved, measure, probe, violations
from explainer.inference.formats import Array, ExportModel, Runtime
from explainer.models.explanandum import Explanandum

SHAPES = [(1, 4, 4), (2, 4, 4)]


class Constant(torch.nn.Module):
    """The left half of class 0 is 0.9, all else 0.1; class 1 is 0 everywhere."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        masks = torch.full((len(images), 2, *images.shape[-2:]), 0.1)
        masks[:, 0, :, : images.shape[-1] // 2] = 0.9
        masks[:, 1] = 0
        return masks


class Drifting(Runtime):
    """The same, one column of class 0 (a quarter of a 4 x 4 image) changed by ``amount``."""

    def __init__(self, amount: float) -> None:
        self.amount, self.description = amount, {"classes": ["a", "b"]}

    def run(self, images: Array) -> dict[str, Array]:
        masks = Constant()(torch.from_numpy(images)).numpy()
        masks[:, 0, :, 0] += self.amount
        return {"masks": masks}


class Brightness(torch.nn.Module):
    """Logits: 4 x the mean, and 0."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean = images.mean(dim=(1, 2, 3))
        return torch.stack([4 * mean, 0 * mean], dim=1)


def run(amount: float, tmp_path: Path, precision: str = "fp32", **options: Any) -> DriftReport:
    file = tmp_path / "x.onnx"
    file.write_bytes(b"12345")
    return measure(ExportModel(Constant()), Drifting(amount), file=file, format_name="onnx", precision=precision, shapes=SHAPES, **options)


def test_differences_and_iou_by_hand(tmp_path: Path) -> None:
    report = run(-0.5, tmp_path)
    assert report.max_difference == pytest.approx(0.5) and report.file_bytes == 5
    # 4 of the 32 values of an image's two masks change by 0.5.
    assert report.mean_difference == pytest.approx(0.5 * 4 / 32)
    # Class 0 keeps one of its two columns; class 1 is empty in both and does not count.
    assert report.iou == pytest.approx(0.5)
    assert report.violations == ["max difference 0.5 is above the limit 0.0001"]


@pytest.mark.parametrize(("amount", "exceeded"), [(0.0, False), (5e-5, False), (2e-4, True), (-2e-4, True)])
def test_fp32_limit(tmp_path: Path, amount: float, exceeded: bool) -> None:
    assert bool(run(amount, tmp_path).violations) is exceeded


def test_int8_is_judged_by_iou_alone(tmp_path: Path) -> None:
    assert {k: v for k, v in LIMITS["int8"].items() if k != "iou"} == {"probability_difference": 0.15, "changed_predictions": 0.05}
    assert run(-0.3, tmp_path, "int8").violations == []
    assert run(-0.5, tmp_path, "int8").violations == ["iou 0.5 is below the limit 0.97"]


def test_a_tolerance_replaces_the_limits(tmp_path: Path) -> None:
    assert run(-0.5, tmp_path, "int8", tolerance=0.6).violations == []
    assert run(-0.5, tmp_path, "int8", tolerance=0.4).violations == ["max difference 0.5 is above the limit 0.4"]


def test_faithfulness_change_by_hand(tmp_path: Path) -> None:
    explanandum = Explanandum(Brightness(), 2, mean=0.0, std=1.0)
    images = np.full((1, 3, 4, 4), 0.5, np.float32)
    report = run(-0.5, tmp_path, images=images, explanandum=explanandum)
    # Class 0 (logit 2) is the most probable. Its mask averages 0.5, exported 0.375, on a fill of 0.
    expected = [1 / (1 + np.exp(-4 * 0.5 * mean)) for mean in (0.5, 0.375)]
    assert report.faithfulness == pytest.approx({"eager": expected[0], "exported": expected[1], "change": expected[1] - expected[0]})
    assert report.real_images and run(0, tmp_path).faithfulness is None


def test_other_outputs_count_and_merged_masks_only_where_the_classes_agree(tmp_path: Path) -> None:
    class Both(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            masks = Constant()(images)
            return torch.tensor([[0.6, 0.4]]).expand(len(images), 2), masks, masks[:, 0]

    class Other(Runtime):
        def __init__(self, probability: float) -> None:
            self.p, self.description = probability, {"classes": ["a", "b"]}

        def run(self, images: Array) -> dict[str, Array]:
            p, masks, merged = (t.numpy().copy() for t in Both()(torch.from_numpy(images)))
            p[:, 0] = self.p
            return {"probabilities": p, "masks": masks, "merged": merged * 0}

    file = tmp_path / "x.onnx"
    file.write_bytes(b"")
    model = ExportModel(Both(), ("probabilities", "masks", "merged"))
    same = measure(model, Other(0.55), file=file, format_name="onnx", precision="fp32", shapes=SHAPES)
    assert same.outputs == pytest.approx({"merged": 0.9}) and same.violations
    assert same.probability_difference == pytest.approx(0.05) and same.changed_predictions == 0 and same.threshold == 0.5
    turned = measure(model, Other(0.45), file=file, format_name="onnx", precision="fp32", shapes=SHAPES)
    assert turned.outputs == pytest.approx({"merged": 0.0}) and turned.probability_difference == pytest.approx(0.15)
    assert turned.changed_predictions == pytest.approx(0.5)  # class 0 of two
    # The threshold that is baked in decides, not 0.5; and at it, merged masks are compared where it agrees.
    model.description = {"threshold": 0.57}
    lower = measure(model, Other(0.55), file=file, format_name="onnx", precision="int8", shapes=SHAPES)
    assert lower.changed_predictions == pytest.approx(0.5) and lower.outputs == pytest.approx({"merged": 0.0}) and lower.threshold == 0.57
    assert lower.violations == ["changed predictions 0.5 is above the limit 0.05"]
    assert any(label == "changed predictions (predicted from 0.57)" and value == "50.00%" for label, value in lower.rows())
    model.description = {"threshold": 0.2}
    assert measure(model, Other(0.4), file=file, format_name="onnx", precision="int8", shapes=SHAPES).violations == [
        "probability difference 0.2 is above the limit 0.15"
    ]
    model.description = {"task": "multiclass"}
    assert measure(model, Other(0.45), file=file, format_name="onnx", precision="fp16", shapes=SHAPES).changed_predictions == 0.0
    assert measure(model, Other(0.35), file=file, format_name="onnx", precision="fp16", shapes=SHAPES, tolerance=1.0).violations == [
        "changed predictions 1 is above the limit 0.02"
    ]


def test_faithfulness_is_measured_with_the_fill_of_the_training(tmp_path: Path) -> None:
    explanandum = Explanandum(Brightness(), 2, mean=0.0, std=1.0)
    file = tmp_path / "x.onnx"
    file.write_bytes(b"")
    images = np.full((1, 3, 4, 4), 0.5, np.float32)
    model = ExportModel(Constant(), description={"fill": "white"})
    report = measure(
        model, Drifting(0), file=file, format_name="onnx", precision="fp32", shapes=SHAPES, images=images, explanandum=explanandum
    )
    # The mask averages 0.5 and the rest is 1.
    assert report.faithfulness is not None and report.faithfulness["eager"] == pytest.approx(1 / (1 + np.exp(-4 * 0.75)))


def test_one_batch_size_and_wrong_shapes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least two batch sizes"):
        measure(ExportModel(Constant()), Drifting(0), file=tmp_path, format_name="onnx", precision="fp32", shapes=[(2, 4, 4), (2, 8, 8)])
    with pytest.raises(ExportError, match="finite"):
        run(float("nan"), tmp_path)


def test_probe_is_deterministic_bounded_and_uses_given_images() -> None:
    a, b = probe((3, 20, 31), None), probe((3, 20, 31), None)
    assert np.array_equal(a, b) and a.shape == (3, 3, 20, 31) and a.min() >= 0 and a.max() <= 1 and a.std() > 0.1
    given = np.stack([np.full((3, 8, 8), v, np.float32) for v in (0.2, 0.7)])
    assert np.allclose(probe((3, 5, 9), given).mean(axis=(1, 2, 3)), [0.2, 0.7, 0.2])


def test_interleaved_calls_in_turn() -> None:
    calls: list[str] = []
    times = interleaved([lambda: calls.append("a"), lambda: calls.append("b")], repeats=2)
    assert calls == ["a", "b"] * 3 and len(times) == 2 and min(times) >= 0


def test_violations_name_every_limit() -> None:
    report = DriftReport("f", "onnx", "fp16", [], False, 0.1, 0.01, 0.9, limits=dict(LIMITS["fp16"]))
    assert violations(report) == [
        "max difference 0.1 is above the limit 0.05",
        "mean difference 0.01 is above the limit 0.002",
        "iou 0.9 is below the limit 0.98",
    ]


def test_reports_of_several_files_accumulate(tmp_path: Path) -> None:
    first, second = run(0.0, tmp_path).as_dict(), {**run(-0.5, tmp_path).as_dict(), "file": "y.onnx"}
    (tmp_path / "drift.json").write_text("damaged")
    add_report(tmp_path, first)
    add_report(tmp_path, second)
    import json

    reports = json.loads((tmp_path / "drift.json").read_text())
    assert set(reports) == {"x.onnx", "y.onnx"}
    description = {
        "classes": ["a"],
        "explainer": {"network": "unet", "options": {}},
        "parameters": 1234,
        "image_size": None,
        "weights": "w",
        "explained_classifier": None,
        "data": None,
        "versions": {},
    }
    text = card(description, reports, {"iou": 0.81, "note": "left out"}, None)
    assert "| iou | 0.8100 |" in text and "note" not in text and "max difference 0.5 is above" in text and "1,234" in text
    assert "Not stated by whoever exported it" in text and "fingerprint `unknown`" in text


def test_int8_is_measured_on_images_it_was_not_fitted_to() -> None:
    images = np.arange(10, dtype=np.float32).reshape(10, 1, 1, 1)
    used, seen = split_calibration(images, "int8")
    assert used is not None and seen is not None
    assert used.flatten().tolist() == [0, 1, 2, 4, 5, 6, 8, 9] and seen.flatten().tolist() == [3, 7]
    assert all(part is images for part in split_calibration(images, "fp32"))
    assert split_calibration(None, "int8") == (None, None)
    assert [len(part) for part in split_calibration(images[:7], "int8") if part is not None] == [7, 7]


def test_names_cannot_write_the_card() -> None:
    from explainer.export.card import plain

    hostile = "<script>alert(1)</script> | [x](http://y)\n## Licence\n`code` ![i](j) *b*"
    assert "\n" not in plain(hostile) and plain("cat/dog 3.5") == "cat/dog 3.5"
    assert not re.search(r"(?<!\\)[<>|\[\]`*!#]", plain(hostile)), "every mark is escaped"
    description = {"classes": [hostile], "explainer": {"network": "unet", "options": {}}, "parameters": 1, "image_size": 8, "weights": "w"}
    description |= {"explained_classifier": None, "data": {"name": hostile}, "versions": {}}
    text = card(description, {}, None, "CC0")
    assert "<script>" not in text and text.count("## Licence") == 1
