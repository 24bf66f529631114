"""Squash, letterbox and crop: boxes by hand, and the way back to the picture's own pixels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from explainer import plugins
from explainer.data.transforms import place_image, place_masks, to_picture
from explainer.errors import ConfigError
from explainer.geometry import GEOMETRIES, PADDING, placement
from tests.factories import make_image_folder, make_voc


@pytest.mark.parametrize(
    ("geometry", "picture", "size", "source", "target"),
    [
        ("squash", (30, 60), (16, 16), (0, 0, 30, 60), (0, 0, 16, 16)),
        ("letterbox", (30, 60), (16, 16), (0, 0, 30, 60), (4, 0, 8, 16)),
        ("letterbox", (60, 30), (16, 16), (0, 0, 60, 30), (0, 4, 16, 8)),
        ("letterbox", (33, 100), (32, 32), (0, 0, 33, 100), (10, 0, 11, 32)),  # 33 * 0.32 = 10.56
        ("letterbox", (1, 1000), (16, 16), (0, 0, 1, 1000), (7, 0, 1, 16)),  # at least one row
        ("letterbox", (20, 20), (16, 24), (0, 0, 20, 20), (0, 4, 16, 16)),
        ("crop", (30, 60), (16, 16), (0, 15, 30, 30), (0, 0, 16, 16)),
        ("crop", (61, 30), (16, 16), (15, 0, 30, 30), (0, 0, 16, 16)),
        ("crop", (20, 20), (16, 32), (5, 0, 10, 20), (0, 0, 16, 32)),
        ("crop", (7, 7), (16, 16), (0, 0, 7, 7), (0, 0, 16, 16)),
    ],
)
def test_boxes_by_hand(geometry: str, picture: tuple[int, int], size: tuple[int, int], source: object, target: object) -> None:
    place = placement(geometry, picture, size)
    assert (place.source, place.target) == (source, target)
    assert place.padded == (target[2:] != size) and place.cropped == (source[2:] != picture)


def test_an_unknown_geometry_is_refused() -> None:
    with pytest.raises(ConfigError, match="geometry must be one of squash, letterbox, crop, got 'stretch'"):
        placement("stretch", (4, 4), (4, 4))


def test_letterbox_pads_with_the_mean_colour_and_crop_takes_the_middle() -> None:
    picture = torch.full((3, 8, 16), 200, dtype=torch.uint8)
    picture[:, :, :4] = 10  # the left quarter
    boxed = place_image(picture, placement("letterbox", (8, 16), (16, 16)))
    assert boxed.shape == (3, 16, 16) and torch.equal(boxed[:, 4:12], picture)
    assert boxed[:, :4].flatten(1).unique(dim=1).flatten().tolist() == list(PADDING) and torch.equal(boxed[:, :4], boxed[:, 12:])
    cropped = place_image(picture, placement("crop", (8, 16), (8, 8)))
    assert torch.equal(cropped, picture[:, :, 4:12]) and cropped.unique().tolist() == [200]
    labels = torch.zeros(1, 8, 16, dtype=torch.uint8)
    labels[0, 2:4, 6:10] = 3
    placed = place_masks(labels, placement("letterbox", (8, 16), (16, 16)), padding=255)
    assert torch.equal(placed[:, 4:12], labels) and (placed[:, :4] == 255).all() and (placed[:, 12:] == 255).all()
    assert torch.equal(place_masks(labels, placement("crop", (8, 16), (8, 8)), padding=255), labels[:, :, 4:12])


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("picture", [(40, 90), (90, 40), (64, 64), (33, 57)])
def test_the_way_back_puts_each_pixel_where_it_was(geometry: str, picture: tuple[int, int]) -> None:
    # A picture whose value says the place: after both ways, what was seen is where it was, within half a pixel of the network.
    size = (32, 32)
    place = placement(geometry, picture, size)
    rows = torch.arange(picture[0], dtype=torch.float32)[:, None].expand(picture) + 0.5
    columns = torch.arange(picture[1], dtype=torch.float32)[None].expand(picture) + 0.5
    (top, left, height, width), (y0, x0, h, w) = place.source, place.target
    # centres of the network's pixels in the picture, by the definition of the boxes
    y = top + (torch.arange(32) + 0.5 - y0) * height / h
    x = left + (torch.arange(32) + 0.5 - x0) * width / w
    seen = torch.stack([y[:, None].expand(size), x[None].expand(size)])
    back = to_picture(seen, place, outside=-1)
    assert back.shape == (2, *picture)
    inside = torch.zeros(picture, dtype=torch.bool)
    inside[top : top + height, left : left + width] = True
    assert (back[:, ~inside] == -1).all() and bool(inside.all()) == (not place.cropped)
    assert (back[0] - rows)[inside].abs().max() <= 0.5 * height / h + 1e-4
    assert (back[1] - columns)[inside].abs().max() <= 0.5 * width / w + 1e-4
    assert to_picture(torch.zeros(0, 32, 32), place).shape == (0, *picture)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_masks_void_and_maps_follow_the_image(geometry: str, tmp_path: Path) -> None:
    drawn = {d.id: d for d in make_voc(tmp_path, height=20, width=40)}
    options = {"root": str(tmp_path), "class_names": ["cat", "dog", "bird"], "size": 40, "geometry": geometry}
    data = plugins.build("explainer.data", "voc", split="train", **options)
    for i in range(len(data)):
        sample, own, void = data[i], *data.original_masks(i)
        assert sample.masks.shape == (3, 40, 40) and not (sample.masks & sample.void).any()
        padding = torch.zeros(40, 40, dtype=torch.bool)
        if geometry == "letterbox":
            padding[:10] = padding[30:] = True
            padding[10:30] |= void
            assert torch.equal(sample.masks[:, 10:30], own) and torch.equal(sample.void, padding)
            padding[10:30] = False
            assert torch.equal((sample.image[:, padding] * 255).round().unique(dim=1).flatten(), torch.tensor(PADDING).float())
        if geometry == "crop":  # the middle 20 columns, twice as large
            twice = own[:, :, 10:30].repeat_interleave(2, 1).repeat_interleave(2, 2)
            assert torch.equal(sample.masks, twice)
        maps = data.original_maps(i, sample.masks.float())
        assert maps.shape == own.shape
        shown = slice(10, 30) if geometry == "crop" else slice(None)
        agree = ((maps[:, :, shown] >= 0.5) == own[:, :, shown]).float().mean()
        assert agree > 0.97, (geometry, drawn[sample.id].rectangles)
        if geometry == "crop":
            assert not maps[:, :, :10].any() and not maps[:, :, 30:].any()
    others = {plugins.build("explainer.data", "voc", split="train", **{**options, "geometry": g}).fingerprint() for g in GEOMETRIES}
    assert len(others) == 3


@pytest.mark.parametrize("name", ["coco", "cub", "csv", "image_folder"])
def test_padding_is_void_in_every_data_set(name: str, tmp_path: Path) -> None:
    from tests.factories import dataset_options

    options = dataset_options(name, tmp_path / "data")
    data = plugins.build("explainer.data", name, split="train", size=32, geometry="letterbox", **options)
    place = placement("letterbox", data.original_size(0), (32, 32))
    top, left, height, width = place.target
    assert place.padded
    for cached in (data, plugins.build("explainer.data", name, split="train", size=32, geometry="letterbox", cache="ram", **options)):
        for _ in range(2):
            sample = cached[0]
            inside = torch.zeros(32, 32, dtype=torch.bool)
            inside[top : top + height, left : left + width] = True
            assert sample.void[~inside].all() and not sample.masks[:, ~inside].any() and sample.masks.any()


def test_classes_without_a_region_need_no_mask(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "a", names=("crack", "free"))
    for path in (tmp_path / "masks").rglob("free/*.png"):
        path.unlink()
    options = {"root": str(tmp_path / "a"), "mask_root": str(tmp_path / "masks"), "size": 32}
    plain = plugins.build("explainer.data", "image_folder", split="train", **options)
    assert [plain[i].masks is None for i in range(8)] == [False] * 4 + [True] * 4 and plain.no_region == ()
    data = plugins.build("explainer.data", "image_folder", split="train", geometry="letterbox", no_region=["free"], **options)
    assert data.no_region == ("free",)
    sample = data[4]
    assert sample.target.tolist() == [0, 1] and not sample.masks.any() and 0 < sample.void.float().mean() < 0.2, "padding alone is unknown"
    masks, void = data.original_masks(4)
    assert masks.shape == (2, 16, 18) and not masks.any() and not void.any() and data[0].masks.any()
    with pytest.raises(ConfigError, match=r"no_region names 'fre', which is not a class\. Classes: crack, free"):
        plugins.build("explainer.data", "image_folder", split="train", no_region=["fre"], **options)
    with pytest.raises(ConfigError, match="no_region must be a list of class names"):
        plugins.build("explainer.data", "image_folder", split="train", no_region="free", **options)


def test_an_upright_photograph_of_a_turned_file(tmp_path: Path) -> None:
    array = torch.randint(0, 255, (3, 40, 20), dtype=torch.uint8)
    image = Image.fromarray(array.permute(1, 2, 0).numpy())
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees: 20 x 40
    for split in ("train", "val", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        image.save(tmp_path / split / "a" / "x.png", exif=exif)
    data = plugins.build("explainer.data", "image_folder", split="train", root=str(tmp_path), size=40, geometry="letterbox")
    assert data.original_size(0) == (20, 40)
    assert torch.equal((data[0].image[:, 10:30] * 255).round().to(torch.uint8), array.rot90(-1, (1, 2)))
