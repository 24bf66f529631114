"""The torch-free predictor, and that it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from explainer.errors import CheckpointError, CorruptSampleError, ShapeError
from explainer.export.predictor import Predictor
from explainer.models.explainer import Explainer
from tests.unit.export.conftest import NAMES, coloured


def test_no_torch_is_imported(onnx_any: tuple[Path, Any], tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "a.png")
    code = (
        "import sys; from explainer.export.predictor import Predictor;"
        "p = Predictor(sys.argv[1], threads=1); r = p(sys.argv[2]);"
        "print(r['masks'].shape, p.classes[0], [m for m in ('torch', 'torchvision', 'pytorch_lightning') if m in sys.modules])"
    )
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", code, str(onnx_any[0]), str(tmp_path / "a.png")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.stdout.strip() == "(3, 40, 50) red []", done.stderr[-2000:]


def test_a_batch_equals_the_network(net: Explainer, onnx_any: tuple[Path, Any], images: np.ndarray) -> None:
    predictor = Predictor(onnx_any[0])
    assert predictor.classes == list(NAMES) and predictor.size is None
    with torch.no_grad():
        expected = net(torch.from_numpy(images)).numpy()
    assert np.abs(predictor.run(images)["masks"] - expected).max() < 1e-4


def test_a_photograph_is_found_where_it_lies_at_its_own_resolution(onnx_any: tuple[Path, Any], tmp_path: Path) -> None:
    images, masks = coloured(3, 96, 3)
    predictor = Predictor(onnx_any[0])
    for k in range(3):
        pixels = (images[k] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        path = tmp_path / f"{k}.png"
        Image.fromarray(pixels).save(path)
        result = predictor(path)
        found, truth = result["masks"][k] > 0.5, masks[k, k].numpy() > 0.5
        assert found.shape == (96, 96) and (found & truth).sum() / (found | truth).sum() > 0.6
        for other in (pixels, Image.open(path), pixels.astype(np.float32) / 255):
            assert np.allclose(predictor(other)["masks"], result["masks"], atol=1e-5)
        assert result["areas"].shape == (3,) and result["areas"].argmax() == k


def test_fused_and_fixed_size(onnx_fused: tuple[Path, Any]) -> None:
    predictor = Predictor(onnx_fused[0])
    assert predictor.size == (32, 32)
    result = predictor(np.full((21, 60, 3), 128, np.uint8))
    assert result["merged"].shape == (21, 60) and result["masks"].shape == (3, 21, 60)
    assert result["probabilities"].shape == result["areas"].shape == (3,)


def test_transparency_rotation_and_grey(onnx_any: tuple[Path, Any], tmp_path: Path) -> None:
    predictor = Predictor(onnx_any[0])
    clear = Image.new("RGBA", (30, 20), (255, 0, 0, 0))
    white = np.full((20, 30, 3), 255, np.uint8)
    assert np.array_equal(predictor(clear)["masks"], predictor(white)["masks"])
    turned = Image.new("L", (30, 20), 90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "t.jpg", exif=exif)
    assert predictor(tmp_path / "t.jpg")["masks"].shape == (3, 30, 20)


def test_errors_say_what_to_do(onnx_any: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist. Write it with `explainer export MODEL --format onnx"):
        Predictor(tmp_path / "absent.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="not a model written by"):
        Predictor(tmp_path / "bad.onnx")
    predictor = Predictor(onnx_any[0])
    (tmp_path / "a.png").write_bytes(b"nonsense")
    with pytest.raises(CorruptSampleError, match="not a readable image"):
        predictor(tmp_path / "a.png")
    with pytest.raises(ShapeError, match=r"must be \[H,W,3\]"):
        predictor(np.zeros((4, 4), np.uint8))
