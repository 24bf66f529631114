"""The torch-free predictor, and that it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from explainer.data import decoding
from explainer.errors import CheckpointError, CorruptSampleError, ShapeError
from explainer.inference import predictor as predictor_module
from explainer.inference.predictor import Predictor
from explainer.models.explainer import Explainer
from tests.unit.export.alone import alone
from tests.unit.export.conftest import NAMES, colored


def test_it_needs_only_what_it_says(onnx_any: tuple[Path, Any], tmp_path: Path) -> None:
    """In a process in which nothing else can be imported: numpy, Pillow, onnxruntime (with what that needs) and this package's own file."""
    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "a.png")
    code = (
        "from explainer.inference.predictor import Predictor\n"
        "p = Predictor(sys.argv[1], threads=1); r = p(sys.argv[2])\n"
        "print(r['masks'].shape, p.classes[0])"
    )
    done = alone(("numpy", "PIL", "onnxruntime", "explainer"), code, onnx_any[0], tmp_path / "a.png")
    assert done.stdout.strip() == "(3, 40, 50) red", done.stderr[-2000:]
    assert "No module named 'torch'" in alone((), "import torch").stderr


def test_a_batch_equals_the_network(net: Explainer, onnx_any: tuple[Path, Any], images: np.ndarray) -> None:
    predictor = Predictor(onnx_any[0])
    assert predictor.classes == list(NAMES) and predictor.size is None
    with torch.no_grad():
        expected = net(torch.from_numpy(images)).numpy()
    assert np.abs(predictor.run(images)["masks"] - expected).max() < 1e-4


def test_a_photograph_is_found_where_it_lies_at_its_own_resolution(onnx_any: tuple[Path, Any], tmp_path: Path) -> None:
    images, masks = colored(3, 96, 3)
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


def test_a_folder_stands_for_its_model(onnx_fused: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds 0 \.onnx files \(none\), expected model\.onnx or exactly one"):
        Predictor(tmp_path)
    for name in ("other.onnx", "model.onnx", "third.onnx"):
        (tmp_path / name).write_bytes(Path(onnx_fused[0]).read_bytes())
        assert Predictor(tmp_path, threads=1).size == (32, 32)
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"holds 2 \.onnx files \(other\.onnx, third\.onnx\)"):
        Predictor(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        Predictor(tmp_path / "model.onnx")


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


def kinds(folder: Path) -> dict[str, Path]:
    """One file of each kind of pixels that readers treat differently."""
    random = np.random.default_rng(0)
    colors = random.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    deep = random.integers(0, 65536, (6, 9), dtype=np.uint16)
    rgba = np.concatenate([colors, random.integers(0, 256, (6, 9, 1), dtype=np.uint8)], axis=2)
    palette = Image.fromarray(colors).convert("P", palette=Image.Palette.ADAPTIVE)
    turned = Image.Exif()
    turned[0x0112] = 6
    images: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "colours.png": (Image.fromarray(colors), {}),
        "grey.png": (Image.fromarray(colors[..., 0]), {}),
        "grey16.png": (Image.fromarray(deep), {}),
        "grey16.tif": (Image.fromarray(deep), {}),
        "whole.tif": (Image.fromarray(deep.astype(np.int32)), {}),
        "beyond.tif": (Image.fromarray(deep.astype(np.int32) + 70000), {}),
        "negative.tif": (Image.fromarray(deep.astype(np.int32) - 70000), {}),
        "float.tif": (Image.fromarray(deep.astype(np.float32)), {}),
        "alpha.png": (Image.fromarray(rgba), {}),
        "grey_alpha.png": (Image.fromarray(rgba).convert("LA"), {}),
        "palette.png": (palette, {}),
        "clear_palette.png": (palette, {"transparency": 1}),
        "bits.png": (Image.fromarray(colors[..., 0]).convert("1"), {}),
        "cmyk.jpg": (Image.fromarray(colors).convert("CMYK"), {}),
        "turned.jpg": (Image.fromarray(colors), {"exif": turned}),
    }
    for name, (image, options) in images.items():
        image.save(folder / name, **options)
    (folder / "damaged.png").write_bytes((folder / "alpha.png").read_bytes()[:90])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_bytes(b"%PDF-1.7")
    return {name: folder / name for name in [*images, "damaged.png", "empty.png", "text.png", "absent.png"]}


def test_files_are_read_as_in_training(tmp_path: Path) -> None:
    """The torch-free reader and the one of training, file by file: the same pixels, or both refuse."""
    refused = []
    for name, path in kinds(tmp_path).items():
        try:
            expected = decoding.read_image(path).permute(1, 2, 0).numpy()
        except CorruptSampleError:
            refused.append(name)
            with pytest.raises(CorruptSampleError):
                predictor_module._picture(path)
            continue
        assert np.array_equal(np.asarray(predictor_module._picture(path)), expected), name
        with Image.open(path) as opened:
            assert np.array_equal(np.asarray(predictor_module._picture(opened)), expected), name
    assert refused == ["beyond.tif", "negative.tif", "float.tif", "damaged.png", "empty.png", "text.png", "absent.png"]
    module = predictor_module
    assert (module._MAX_PIXELS, module._MAX_SIDE, module._MAX_BYTES) == (decoding.MAX_PIXELS, decoding.MAX_SIDE, decoding.MAX_FILE_BYTES)
    assert module._FORMATS == decoding.FORMATS


def test_arrays_keep_their_meaning() -> None:
    pixels = np.array([[[0, 1, 255], [100, 128, 7]]], np.uint8)
    for same in (
        pixels,
        pixels.astype(np.int64),
        pixels.astype(np.int32),
        pixels.astype(np.uint16) * 257,
        pixels / 255,
        pixels.astype(np.float32) / 255,
    ):
        assert np.array_equal(np.asarray(predictor_module._picture(same)), pixels)
    for wrong in (pixels.astype(float), pixels.astype(np.int64) * 2, pixels.astype(np.int64) - 1, pixels > 3, np.full((1, 2, 3), np.nan)):
        with pytest.raises(ShapeError, match=r"whole numbers in 0\.\.255 or floats in \[0,1\]"):
            predictor_module._picture(wrong)


def test_a_file_without_classes_is_refused(onnx_any: tuple[Path, Any], tmp_path: Path) -> None:
    import onnx

    for stored in ("{}", "[]", "3", '{"classes": "red", "outputs": ["masks"]}'):
        model = onnx.load(onnx_any[0])
        onnx.helper.set_model_props(model, {"explainer": stored})
        onnx.save_model(model, tmp_path / "x.onnx")
        with pytest.raises(CheckpointError, match="no usable description"):
            Predictor(tmp_path / "x.onnx")
