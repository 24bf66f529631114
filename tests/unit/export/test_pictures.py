"""Geometry, memory and NaN on the way from files to masks, with a model whose mask is the image's red channel."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from explainer.errors import CorruptSampleError, NumericalError
from explainer.geometry import GEOMETRIES
from explainer.inference import pictures
from explainer.inference.describe import trained_geometry
from explainer.inference.explaining import explain
from explainer.inference.formats import Array, Runtime
from explainer.inference.pictures import batches, find_pictures, load_picture
from explainer.inference.predictor import Predictor


class Red(Runtime):
    """The mask of class "red" is the red channel, that of "not" the rest."""

    def __init__(self, geometry: str | None = None, bad: bool = False) -> None:
        self.description = {"classes": ["red", "not"], "outputs": ["masks"], "size": None, "image_size": 32, "geometry": geometry}
        self.bad = bad

    def run(self, images: Array) -> dict[str, Array]:
        masks = np.stack([images[:, 0], 1 - images[:, 0]], axis=1)
        return {"masks": masks * np.float32("nan") if self.bad else masks}


def red_box(path: Path, height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """A black picture with one red rectangle; its mask."""
    top, left, h, w = box
    mask = np.zeros((height, width), dtype=bool)
    mask[top : top + h, left : left + w] = True
    array = np.zeros((height, width, 3), dtype=np.uint8)
    array[mask, 0] = 255
    Image.fromarray(array).save(path)
    return mask


@pytest.mark.parametrize("geometry", [*GEOMETRIES, None])
def test_masks_come_back_in_the_pictures_own_pixels(geometry: str | None, tmp_path: Path) -> None:
    truth = red_box(tmp_path / "wide.png", 60, 120, (10, 40, 30, 40))
    found = explain([tmp_path / "wide.png"], Red(geometry), tmp_path / "out")
    row = found["images"][0]
    assert found["geometry"] == (geometry or "squash") and (row["height"], row["width"]) == (60, 120)
    mask = np.asarray(Image.open(tmp_path / "out" / "wide.png" / "mask_000_red.png")) / 255
    assert mask.shape == (60, 120) and ((mask > 0.5) == truth).mean() > 0.98
    # the area is of what was seen of the picture: 1200 of 7200 pixels, or of the middle 60 x 60
    assert row["areas"]["red"] == pytest.approx(1200 / (3600 if geometry == "crop" else 7200), abs=0.02)
    box = np.load(tmp_path / "out" / "wide.png" / "masks.npz")["box"].tolist()
    assert box == ([8, 0, 16, 32] if geometry == "letterbox" else [0, 0, 32, 32])
    predictor = Predictor.__new__(Predictor)
    predictor.description, predictor.size, predictor.classes = Red(geometry).description, None, ["red", "not"]
    predictor.run = Red(geometry).run  # type: ignore[method-assign]
    result = predictor(tmp_path / "wide.png")
    assert result["masks"].shape == (2, 60, 120) and np.abs(result["masks"][0] - mask).max() < 0.15
    assert result["areas"][0] == pytest.approx(row["areas"]["red"], abs=0.02)
    if geometry == "crop":
        assert not mask[:, :30].any() and not result["masks"][:, :, 90:].any(), "nothing is claimed of what was not seen"


def test_a_model_of_images_that_are_not_square_sees_them_so(tmp_path: Path) -> None:
    truth = red_box(tmp_path / "tall.png", 120, 60, (30, 10, 40, 30))
    model = Red()
    model.description["image_size"] = [48, 24]
    found = explain([tmp_path / "tall.png"], model, tmp_path / "out")
    assert found["network_size"] == [48, 24]
    mask = np.asarray(Image.open(tmp_path / "out" / "tall.png" / "mask_000_red.png")) / 255
    assert mask.shape == (120, 60) and ((mask > 0.5) == truth).mean() > 0.98
    predictor = Predictor.__new__(Predictor)
    predictor.description, predictor.size, predictor.classes = model.description, None, ["red", "not"]
    sizes: list[tuple[int, ...]] = []
    predictor.run = lambda images: (sizes.append(images.shape), model.run(images))[1]  # type: ignore[method-assign]
    assert predictor(tmp_path / "tall.png")["masks"].shape == (2, 120, 60) and sizes == [(1, 3, 48, 24)]


def test_the_geometry_of_the_training_is_exported() -> None:
    assert trained_geometry({}) == trained_geometry({"data": {"options": {"geometry": 3}}}) == trained_geometry({"data": 1}) == "squash"
    assert trained_geometry({"data": {"options": {"geometry": "crop"}}}) == "crop"
    assert trained_geometry({"data": {"options": {"geometry": "crop"}, "eval_options": {"geometry": "letterbox"}}}) == "letterbox"


def test_nan_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    red_box(tmp_path / "a.png", 20, 20, (5, 5, 5, 5))
    with pytest.raises(NumericalError, match=r"the model's output 'masks' is NaN or infinite: its weights are damaged"):
        explain([tmp_path / "a.png"], Red(bad=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()

    class Broken:
        task, num_classes, differentiable = "multilabel", 2, False

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(images), 2)

        def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
            return logits * float("nan")

    with pytest.raises(NumericalError, match=r"the classifier's probabilities are NaN or infinite"):
        explain([tmp_path / "a.png"], Red(), tmp_path / "out", explanandum=Broken())  # type: ignore[arg-type]


def test_names_that_are_not_utf8_reach_the_results(tmp_path: Path) -> None:
    import os

    red_box(tmp_path / "a.png", 20, 20, (5, 5, 5, 5))
    (tmp_path / "a.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    found = explain([tmp_path], Red(), tmp_path / "out")
    assert [r["name"] for r in found["images"]] == [r"\xff.png"]
    assert json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["images"][0]["name"] == r"\xff.png"


def test_names_that_results_could_not_have(tmp_path: Path) -> None:
    """Bytes that become four characters each, and a contact sheet of an earlier call."""
    import os

    red_box(tmp_path / "contact_sheet_001.png", 20, 20, (5, 5, 5, 5))
    long = os.fsencode(tmp_path) + b"/" + b"\xe9" * 100 + b".png"
    red_box(tmp_path / "a.png", 20, 20, (5, 5, 5, 5))
    (tmp_path / "a.png").rename(os.fsdecode(long))
    found = explain([tmp_path], Red(), tmp_path / "out")
    names = [r["name"] for r in found["images"]]
    assert len(names) == 2 and "2_contact_sheet_001.png" in names and all(len(n) <= 240 for n in names)
    assert all((tmp_path / "out" / n / "overlay.png").is_file() for n in names) and (tmp_path / "out/contact_sheet_001.png").is_file()


def test_bytes_are_bounded_and_not_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(8):
        red_box(tmp_path / f"{i}.png", 100, 100, (5, 5, 5, 5))  # 30,000 bytes decoded
    (tmp_path / "broken.png").write_bytes(b"no image")
    ahead: list[str] = []
    original = pictures.load_picture
    monkeypatch.setattr(pictures, "load_picture", lambda name, *rest: (ahead.append(name), original(name, *rest))[1])
    monkeypatch.setattr(pictures, "_BYTES", 70_000)
    failed: dict[str, str] = {}
    groups, seen = [], 0
    for group in batches(find_pictures([tmp_path]), (16, 16), 6, on_error="skip", failed=failed):
        groups.append(len(group))
        seen += len(group)
        time.sleep(0.02)
        assert len(ahead) - seen <= 4, "at most two more are decoded, beside the broken one and the one in work"
    assert groups == [3, 3, 2] and list(failed) == ["broken.png"]
    monkeypatch.setattr(pictures, "_BYTES", 2**30)
    assert [len(g) for g in batches(find_pictures([tmp_path]), (16, 16), 6, on_error="skip", failed={})] == [6, 2]


def test_large_pictures_are_reduced_and_their_masks_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = red_box(tmp_path / "a.png", 120, 240, (20, 60, 60, 120))
    monkeypatch.setattr(pictures, "MOST_PIXELS", 8000)
    picture = load_picture("a", tmp_path / "a.png", (32, 32), "letterbox")
    assert picture.pixels.shape == (3, 60, 120) and picture.size == (120, 240)
    explain([tmp_path / "a.png"], Red("letterbox"), tmp_path / "out")
    mask = np.asarray(Image.open(tmp_path / "out" / "a.png" / "mask_000_red.png")) > 127
    assert mask.shape == (120, 240) and (mask == truth).mean() > 0.97
    assert Image.open(tmp_path / "out" / "a.png" / "overlay_000_red.png").size == (120, 60)


@pytest.mark.slow
def test_a_png_of_64_megapixels_stays_below_a_gibibyte(tmp_path: Path) -> None:
    Image.new("RGB", (8000, 8000), (250, 10, 10)).save(tmp_path / "big.png", compress_level=1)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = explain([tmp_path / "big.png"], Red(), tmp_path / "out")
    assert found["images"][0]["height"] == 8000
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert grown < 1 and time.process_time() - start < 30, f"{grown:.2f} GiB, {time.process_time() - start:.1f} s"


def test_a_broken_picture_stops_where_asked(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(CorruptSampleError, match="To leave out such files"):
        list(batches(find_pictures([tmp_path]), (16, 16), 2, on_error="raise", failed={}))
