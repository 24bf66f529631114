"""Hostile and unusual files: decoded right, or refused with the file's name."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from explainer.data import decoding
from explainer.errors import CorruptSampleError, DatasetNotFoundError


def picture(height: int = 6, width: int = 9) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_rgb_pixels_come_back_as_they_are(tmp_path: Path) -> None:
    array = picture()
    decoded = decoding.read_image(save(tmp_path / "a.png", Image.fromarray(array)))
    assert decoded.dtype == torch.uint8 and torch.equal(decoded, torch.from_numpy(array).permute(2, 0, 1))
    assert decoding.image_size(tmp_path / "a.png") == (6, 9)


def test_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    decoded = decoding.read_image(save(tmp_path / "a.png", Image.fromarray(picture()[..., 0])))
    assert torch.equal(decoded, torch.from_numpy(picture()[..., 0]).expand(3, -1, -1))


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path) -> None:
    values = np.array([[0, 257, 65535], [128 * 257, 100, 200]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        decoded = decoding.read_image(save(tmp_path / name, Image.fromarray(values)))
        assert decoded[0].tolist() == [[0, 1, 255], [128, 0, 1]]


def test_alpha_is_composed_on_white(tmp_path: Path) -> None:
    array = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    decoded = decoding.read_image(save(tmp_path / "a.png", Image.fromarray(array)))
    assert decoded[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255], [204, 204, 204]]


def test_palette_and_its_transparency(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    image.putpalette([9, 8, 7, 1, 2, 3] + [0] * 762)
    assert decoding.read_image(save(tmp_path / "a.png", image))[:, 0].T.tolist() == [[9, 8, 7], [1, 2, 3]]
    assert decoding.read_image(save(tmp_path / "b.png", image, transparency=1))[:, 0].T.tolist() == [[9, 8, 7], [255, 255, 255]]


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100)
    red = decoding.read_image(path)[:, 4, 4].tolist()
    assert red[0] > 245 and max(red[1:]) < 10


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(("orientation", "turn"), [(3, 2), (6, 3), (8, 1)])
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int, turn: int, suffix: str) -> None:
    """To the size that the header gives, too: a TIFF's is turned already in newer versions of Pillow."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    array = picture()
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(array), exif=exif)
    assert torch.equal(decoding.read_image(path).permute(1, 2, 0), torch.from_numpy(np.rot90(array, turn).copy()))
    size = np.rot90(array, turn).shape[:2]
    assert decoding.image_size(path) == size == decoding.read_scaled(path)[1] == decoding.image_facts(path)[:2]


def png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def test_bad_images_are_refused_by_name(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.jpg", Image.fromarray(picture(64, 64))).read_bytes()
    cases = {
        "empty.jpg": (b"", "is empty"),
        "truncated.jpg": (whole[: len(whole) // 2], "damaged or truncated"),
        "text.jpg": (b"this is not an image", "not a readable image"),
        "program.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a readable image"),
        "bomb.png": (png(60_000, 60_000), "more pixels than the limit"),
        "warned.png": (png(10_000, 10_000), "over the limit of 64000000 pixels"),
        "long.png": (png(40_000, 1), "over the limit"),
        "short.png": (png(20, 20, b"\0" * 10), "damaged or truncated"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(CorruptSampleError, match=message) as caught:
            decoding.read_image(path)
        assert str(path) in str(caught.value)
    with pytest.raises(CorruptSampleError, match=r"gone\.jpg: the image is missing"):
        decoding.read_image(tmp_path / "gone.jpg")
    with pytest.raises(CorruptSampleError, match=r"the image is missing"):
        decoding.read_image(tmp_path)


def test_float_and_wide_grey_images_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", Image.fromarray(np.ones((2, 2), dtype=np.float32)))
    with pytest.raises(CorruptSampleError, match=r"float pixels"):
        decoding.read_image(path)
    path = save(tmp_path / "b.tif", Image.fromarray(np.full((2, 2), 70_000, dtype=np.int32)))
    with pytest.raises(CorruptSampleError, match=r"exceed 16 bits"):
        decoding.read_image(path)


def test_label_maps_are_indices_whatever_the_mode(tmp_path: Path) -> None:
    values = np.array([[0, 1], [255, 7]], dtype=np.uint8)
    palette = Image.fromarray(values).convert("P")
    palette.putdata(values.ravel().tolist())
    palette.putpalette([200] * 768)
    for name, image in (("p.png", palette), ("l.png", Image.fromarray(values)), ("i.png", Image.fromarray(values.astype(np.uint16)))):
        assert decoding.read_label_map(save(tmp_path / name, image), (2, 2)).tolist() == values.tolist()
    bits = Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("1")
    assert decoding.read_label_map(save(tmp_path / "1.png", bits)).tolist() == [[0, 1]]


def test_bad_label_maps_are_refused_by_name(tmp_path: Path) -> None:
    mask = save(tmp_path / "m.png", Image.new("L", (9, 6)))
    with pytest.raises(CorruptSampleError, match=r"m\.png: the mask is 6 x 9 \(height x width\), its image .*x\.jpg is 9 x 6"):
        decoding.read_label_map(mask, (9, 6), tmp_path / "x.jpg")
    with pytest.raises(CorruptSampleError, match=r"c\.png: the mask has mode RGB"):
        decoding.read_label_map(save(tmp_path / "c.png", Image.new("RGB", (2, 2))))
    with pytest.raises(CorruptSampleError, match=r"w\.png: mask values must lie in 0..255"):
        decoding.read_label_map(save(tmp_path / "w.png", Image.fromarray(np.array([[300]], dtype=np.uint16))))


@pytest.mark.parametrize("name", ["../x.jpg", "a/../../x", "/etc/passwd", "~/x", "..", "", "a\\b", "c:x", "a\0b", "a\nb", "a" * 2000])
def test_names_that_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptSampleError, match=r"list\.txt: the file name .* is not a plain path below"):
        decoding.join_inside(tmp_path, name, "list.txt")
    assert decoding.join_inside(tmp_path, "a/b..c.jpg", "list.txt") == tmp_path / "a" / "b..c.jpg"


def test_xml_refuses_entities_depth_and_nonsense(tmp_path: Path) -> None:
    cases = {
        "laughs.xml": ('<!DOCTYPE a [<!ENTITY b "' + "c" * 99 + '">]><a>&b;&b;</a>', "document type"),
        "file.xml": ('<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>', "document type"),
        "deep.xml": ("<a>" * 100 + "</a>" * 100, "nested deeper than 32"),
        "broken.xml": ("<a><b></a>", "not valid XML"),
        "nothing.xml": ("", "not valid XML"),
        "coding.xml": ('<?xml version="1.0" encoding="nonsense"?><a/>', "not valid XML"),
    }
    for name, (text, message) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(CorruptSampleError, match=message) as caught:
            decoding.read_xml(tmp_path / name)
        assert name in str(caught.value)
    wide = '<?xml version="1.0" encoding="UTF-16"?><!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'
    (tmp_path / "wide.xml").write_text(wide, encoding="utf-16")
    with pytest.raises(CorruptSampleError, match=r"document type"):
        decoding.read_xml(tmp_path / "wide.xml")
    (tmp_path / "good.xml").write_text("<a><b>x &amp; y</b></a>")
    assert decoding.read_xml(tmp_path / "good.xml").findtext("b") == "x & y"


def test_text_files_are_bounded_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\n two \n")
    assert decoding.read_lines(path) == ["one", "two"]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CorruptSampleError, match=r"list\.txt: not UTF-8"):
        decoding.read_lines(path)
    monkeypatch.setattr(decoding, "MAX_TEXT_BYTES", 2)
    with pytest.raises(CorruptSampleError, match=r"3 bytes exceed the limit of 2"):
        decoding.read_lines(path)
    with pytest.raises(DatasetNotFoundError, match=r"does not exist"):
        decoding.read_lines(tmp_path / "gone.txt")
    (tmp_path / "a.json").write_text("[" * 200_000)
    with pytest.raises(CorruptSampleError, match=r"a\.json: not valid JSON"):
        decoding.read_json(tmp_path / "a.json")
    os.mkfifo(tmp_path / "pipe.csv")
    for endless in (tmp_path / "pipe.csv", Path("/dev/zero")):
        with pytest.raises(CorruptSampleError, match=r"is no file but a pipe, a socket or a device"):
            decoding.read_lines(endless)
    with pytest.raises(DatasetNotFoundError, match=r"~no-such-user/data: .*Write the path in full"):
        decoding.home_path("~no-such-user/data")
    monkeypatch.setattr(decoding, "MAX_FILE_BYTES", 1)
    with pytest.raises(CorruptSampleError, match=r"more than the limit of 1"):
        decoding.read_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_mutated_images_never_raise_anything_else(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    sources = []
    for name, options in (("a.jpg", {}), ("b.png", {}), ("c.gif", {}), ("d.tif", {}), ("e.webp", {}), ("f.bmp", {}), ("g.ppm", {})):
        sources.append(np.frombuffer(save(tmp_path / name, Image.fromarray(picture(12, 10)), **options).read_bytes(), dtype=np.uint8))
    outcomes = {"read": 0, "refused": 0}
    path = tmp_path / "x"
    for trial in range(350):
        data = sources[trial % len(sources)].copy()
        for _ in range(random.integers(1, 8)):
            data[random.integers(len(data) if trial % 3 else min(64, len(data)))] = random.integers(256)
        path.write_bytes(data[: random.integers(1, len(data) + 1)].tobytes() if trial % 4 == 0 else data.tobytes())
        try:
            decoded = decoding.read_image(path)
            assert decoded.dtype == torch.uint8 and decoded.ndim == 3
            outcomes["read"] += 1
        except CorruptSampleError as error:
            assert str(path) in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 30, outcomes


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_large_images_are_decoded_at_a_fraction_of_their_size(suffix: str, tmp_path: Path) -> None:
    rows, columns = np.mgrid[0:400, 0:640]
    smooth = np.stack([columns * 255 // 640, rows * 255 // 400, (rows + columns) * 255 // 1040], axis=2).astype(np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(smooth).save(path, quality=95)
    full = decoding.read_image(path).float()
    assert full.shape == (3, 400, 640)
    for at_least, most, height in (
        (400, None, 400),
        (201, None, 400),
        (200, None, 200),
        (99, None, 100),
        (None, 64_000, 200),
        (None, 256_000, 400),
    ):
        small, own = decoding.read_scaled(path, at_least, most)
        assert own == (400, 640) and abs(small.shape[1] - height) <= 1 and small.shape[2] == small.shape[1] * 640 // 400
        expected = torch.nn.functional.interpolate(full[None], size=tuple(small.shape[1:]), mode="area")[0]
        assert (small.float() - expected).abs().mean() < 1.5 and (small.float() - expected).abs().max() < 12
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(smooth).save(path, quality=95, exif=exif)
    small, own = decoding.read_scaled(path, 100)
    assert own == (640, 400) == decoding.image_size(path) and small.shape == (3, 160, 100)


@pytest.mark.parametrize(
    ("at_least", "most", "decoded"), [(50, None, (100, 200)), (None, 6_000, (100, 200)), (300, None, (400, 800)), (None, None, (800, 1600))]
)
def test_jpegs_are_decoded_small(
    at_least: int | None, most: int | None, decoded: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A JPEG decodes to a half, a quarter or an eighth: at no time are all of its pixels in memory."""
    path = tmp_path / "a.jpg"
    Image.new("RGB", (1600, 800), (200, 60, 90)).save(path)
    sizes, load = [], JpegImageFile.load

    def watched(image: JpegImageFile) -> object:
        result = load(image)
        sizes.append((image.height, image.width))
        return result

    monkeypatch.setattr(JpegImageFile, "load", watched)
    pixels, own = decoding.read_scaled(path, at_least, most)
    assert own == (800, 1600) and set(sizes) == {decoded}
    assert pixels.shape[1] * pixels.shape[2] <= decoded[0] * decoded[1] and (pixels[0].float() - 200).abs().max() <= 3


def test_sixteen_bits_and_palettes_are_reduced_too(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16)[None], (600, 1))
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    small, own = decoding.read_scaled(tmp_path / "grey.png", 32)
    assert own == (600, 64) and small.shape == (3, 300, 32) and (small[0, 0].float() - torch.linspace(2, 253, 32)).abs().max() < 3
    full = decoding.read_image(tmp_path / "grey.png")
    assert full[0, 0].tolist() == full[1, 599].tolist() == [(int(v) + 128) // 257 for v in ramp[0]]
    Image.fromarray((ramp // 257).astype(np.uint8)).convert("P").save(tmp_path / "palette.png")
    assert decoding.read_scaled(tmp_path / "palette.png", 32)[0].shape == (3, 300, 32)
