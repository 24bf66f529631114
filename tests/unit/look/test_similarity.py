"""Similarity overlays: the numbers, the file and the command."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import ops

from explainer.cli import main
from explainer.errors import ConfigError, DatasetNotFoundError
from explainer.look.charts import chart_values, enlargements, rotations
from explainer.look.components import components
from explainer.look.similarity import Beside, Options, eight_bits, feature_maps, patch_vectors, similarities, write_overlay
from explainer.models.black_box import BlackBox
from explainer.models.explanandum import Explanandum
from tests.unit.look.quadrants import QUADRANTS, Colors, quadrants


def explanandum(**options: Any) -> Explanandum:
    return Explanandum(Colors(), 3, mean=0.0, std=1.0, **options)


def test_similarities_by_hand() -> None:
    features = torch.tensor([[[1.0, 1.0, 0.0], [-3.0, 0.0, 2.0]], [[0.0, 1.0, 2.0], [0.0, 0.0, -2.0]]])[None]  # [1,C=2,2,3]
    vectors = patch_vectors(features, grid=16)
    half = 0.5**0.5
    assert torch.allclose(similarities(vectors, 0, 0, 0), torch.tensor([[[1, half, 0], [-1, 0, half]]]))
    assert torch.allclose(similarities(vectors, 0, 0, 2), torch.tensor([[[0, half, 1], [0, 0, -half]]]))
    assert torch.equal(similarities(vectors, 0, 1, 1), torch.zeros(1, 2, 3)), "a vector of zeros is similar to nothing"


def test_a_fine_map_is_averaged_before_it_is_compared() -> None:
    features = torch.zeros(1, 2, 4, 4)
    features[0, 0, :2] = torch.tensor([[4.0, 0, 1, 1], [0, 0, 1, 1]])
    features[0, 1, :2, :2] = torch.tensor([[0.0, 1], [1, 2]])
    vectors = patch_vectors(features, grid=2)
    assert vectors.shape == (1, 2, 2, 2)
    assert torch.allclose(vectors[0, 0, 0], torch.tensor([0.5**0.5, 0.5**0.5])), "means 1 and 1"
    assert torch.allclose(vectors[0, 0, 1], torch.tensor([1.0, 0.0]))


def test_eight_bits_keep_the_cosine() -> None:
    generator = torch.Generator().manual_seed(0)
    for channels in (2, 64, 512):
        features = torch.randn(3, channels, 5, 6, generator=generator) * torch.rand(3, 1, 5, 6, generator=generator) * 100
        features[0, :, 0, 0] = 0
        if channels == 64:
            features = features.relu() ** 3
        vectors = patch_vectors(features, 16)
        small = eight_bits(vectors)
        again = patch_vectors(torch.from_numpy(small).float().permute(0, 3, 1, 2), 16)
        for row in range(5):
            assert (similarities(vectors, 1, row, 2) - similarities(again, 1, row, 2)).abs().max() < 0.01
        assert not small[0, 0, 0].any() and small.dtype == np.int8 and abs(small.astype(int)).max() == 127


def test_feature_maps_are_those_of_the_layer_and_the_classifier_is_left_alone() -> None:
    model = explanandum()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images = torch.rand(11, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = feature_maps(model, images, ["features.0", "features.1", "act#0", "act"])
    pooled = nn.functional.avg_pool2d(images, 2)
    assert torch.allclose(found["features.0"], images) and torch.allclose(found["features.1"], pooled, atol=1e-6)
    assert torch.allclose(found["act#0"], pooled) and torch.allclose(found["act"], 2 * pooled), "first and last call"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


class ColorsLast(Colors):
    """The same with a layer that returns [B,h,w,C], as Swin and ConvNeXt have them."""

    def __init__(self) -> None:
        super().__init__()
        self.last = ops.Permute([0, 2, 3, 1])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.last(self.features(images))).mean(dim=(1, 2)))


def test_channels_last_is_read_as_what_it_is() -> None:
    images = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    found = feature_maps(Explanandum(ColorsLast(), 3, mean=0.0, std=1.0), images, ["last"])
    assert torch.allclose(found["last"], nn.functional.avg_pool2d(images, 2), atol=1e-6)


def test_wrong_layers_are_answered_with_a_remedy() -> None:
    model, images = explanandum(), torch.rand(1, 3, 8, 8)
    with pytest.raises(ConfigError, match=r"'layer9'.*features\.0, features\.1, act, unused, head"):
        feature_maps(model, images, ["layer9"])
    with pytest.raises(ConfigError, match=r"'head' gives \[1, 3\].*feature map"):
        feature_maps(model, images, ["head"])
    with pytest.raises(ConfigError, match="not used"):
        feature_maps(model, images, ["unused"])
    for wrong in ("act#2", "act#x"):
        with pytest.raises(ConfigError, match=r"called 2 time"):
            feature_maps(model, images, [wrong])
    with pytest.raises(ConfigError, match="scores only"):
        write_overlay(["x"], BlackBox(lambda x: x, 3), "out.html")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for n in range(3):
        Image.fromarray(quadrants(shift=n)).save(folder / f"{n}.png")
    Image.fromarray(quadrants()).save(folder / "z<script>alert(1)<.png")
    return folder


def test_the_file_holds_everything(photos: Path, tmp_path: Path) -> None:
    out = write_overlay([photos], explanandum(), tmp_path / "deep" / "o.html", Options(["features.1", "act"], side=8, title="<b>t</b>"))
    text = out.read_text()
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//|@import|url\(|https?://", text), "a link to elsewhere"
    assert "<title>&lt;b&gt;t&lt;/b&gt;</title>" in text and text.count("<script") == 2 and "alert(1)<" not in text
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL).group(1))
    assert [i["name"] for i in data["images"]][:2] == ["0.png", "1.png"] and len(data["images"]) == 4
    assert [(layer["name"], layer["height"], layer["width"], layer["channels"]) for layer in data["layers"]] == [
        ("features.1", 4, 4, 3),
        ("act", 4, 4, 3),
    ]
    assert all(i["picture"].startswith("data:image/png;base64,") for i in data["images"])


def test_images_are_spread_and_the_layer_is_found(photos: Path, tmp_path: Path) -> None:
    text = write_overlay([photos], explanandum(input_size=8), tmp_path / "o.html", Options(limit=2)).read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1))
    assert [i["name"] for i in data["images"]] == ["0.png", "2.png"]
    assert [layer["name"] for layer in data["layers"]] == ["features"], "the last that is called once and that all evidence passes through"


def test_the_command(photos: Path, classifier_checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "o.html"
    arguments = ["overlay", str(photos), "--classifier", str(classifier_checkpoint), "--out", str(out)]
    assert main([*arguments, "--layers", "features.2, features.5", "--grid", "4"]) == 0
    assert str(out) in capsys.readouterr().out and '"height": 4' in out.read_text() and '"features.5"' in out.read_text()
    assert main([*arguments, "--layers", "nothing"]) == 2
    assert "features.5" in capsys.readouterr().err, "the layers are listed"
    assert main(["overlay", "absent", "--classifier", str(classifier_checkpoint)]) == 2
    assert main([*arguments[:-1], str(tmp_path / "o.pdf")]) == 2 and ".html" in capsys.readouterr().err


def test_no_image_no_page(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError):
        write_overlay([tmp_path], explanandum(), tmp_path / "o.html")


def test_quadrants_are_as_similar_as_their_colours() -> None:
    images = torch.from_numpy(quadrants()).permute(2, 0, 1)[None].float() / 255
    vectors = patch_vectors(feature_maps(explanandum(), images, ["features.1"])["features.1"], 2)
    directions = nn.functional.normalize(torch.tensor(QUADRANTS, dtype=torch.float32), dim=1)
    for index in range(4):
        assert torch.allclose(similarities(vectors, 0, index // 2, index % 2).flatten(), directions @ directions[index], atol=1e-5)


def test_large_photographs_are_embedded_small(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((600, 900, 3), np.uint8)).save(tmp_path / "big.png")
    text = write_overlay([tmp_path / "big.png"], explanandum(), tmp_path / "o.html", Options(["features.1"], side=8)).read_text()
    assert "data:image/jpeg" in text and len(text) < 80_000


def content(file: Path) -> dict[str, Any]:
    return json.loads(re.search(r'id="data">(.*?)</script>', file.read_text(), re.DOTALL).group(1))


def array(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=dtype)


def test_several_classifiers_side_by_side(photos: Path, tmp_path: Path) -> None:
    beside = [Beside("other", explanandum(), ["features.1", "act"], side=4)]
    data = content(write_overlay([photos], explanandum(), tmp_path / "o.html", Options(["features.0"], side=8, beside=beside)))
    rows = [(layer["name"], layer["height"]) for layer in data["layers"]]
    assert rows == [("features.0", 8), ("other: features.1", 2), ("other: act", 2)] and len(data["images"]) == 4
    with pytest.raises(ConfigError, match="scores only"):
        write_overlay([photos], explanandum(), tmp_path / "o.html", Options(beside=[Beside("x", BlackBox(lambda x: x, 3))]))


def test_components_are_found_in_a_planted_factorisation(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two directions, mixed by known amounts."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.tensor([[1.0, 0, 1, 0], [0, 2, 0, 0]])
    amounts = torch.rand(3, 5, 5, 2, generator=generator) * torch.tensor([3.0, 1.0])
    amounts[0, 0, :, 0], amounts[0, 1, :, 1] = 0, 0
    features = (amounts @ directions).permute(0, 3, 1, 2)
    weights, parts = components(features, 2)
    torch.testing.assert_close((weights @ parts).permute(0, 3, 1, 2), features, atol=2e-3, rtol=1e-2)
    torch.testing.assert_close(parts, torch.nn.functional.normalize(directions, dim=1), atol=2e-2, rtol=0)
    assert weights[0, 0, :, 0].max() < 0.05, "the heavier component comes first and is not in this row"
    assert (weights >= 0).all() and not caplog.text
    components(features - 0.1, 2)
    assert "negative activations count as 0" in caplog.text
    assert not components(torch.zeros(1, 4, 2, 2), 2)[0].any()
    with pytest.raises(ConfigError, match=r"components must lie in 1\.\.4"):
        components(features, 5)
    (layer,) = content(write_overlay([photos], explanandum(), tmp_path / "o.html", Options(["features.1"], side=8, components=2)))["layers"]
    shares = array(layer["components"]["data"], "u1").reshape(4, 4, 4, 2)
    assert layer["components"]["count"] == 2 and shares.max() == 255


def test_nearest_patches_of_a_folder(photos: Path, tmp_path: Path) -> None:
    """Of a red patch the nearest are red, one per image, at cosine 1."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for n in range(3):
        Image.fromarray(quadrants(shift=n)).save(folder / f"{n}.png")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "black.png")
    options = Options(["features.1"], side=8, grid=2, limit=1, data=folder, neighbors=2)
    data = content(write_overlay([photos], explanandum(), tmp_path / "o.html", options))
    (layer,) = data["layers"]
    near = array(layer["neighbors"]["data"], "<i2").reshape(1, 2, 2, 2, 3)
    assert (layer["neighbors"]["height"], layer["neighbors"]["width"], layer["neighbors"]["count"]) == (2, 2, 2)
    # Red is the first place of image 0 and the last of image 1, whose colours are moved on by one.
    found = {data["found"][image]["name"]: int(place) for image, place, _ in near[0, 0, 0]}
    assert near[0, 0, 0, :, 2].tolist() == [1000, 1000] and found == {"0.png": 0, "1.png": 3}
    assert "black.png" not in {f["name"] for f in data["found"]} and len(data["found"]) <= 3
    assert all(f["picture"].startswith("data:image/png") for f in data["found"])


@pytest.mark.parametrize("angle", [30, 90])
def test_turned_pictures_show_the_same_patch_where_it_has_gone(angle: int) -> None:
    """A picture of smooth colours: the patch that has turned along is the same, the one at the same place is not."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 32), indexing="ij")
    small = 0.5 + 0.4 * torch.stack([(6 * x).sin(), (6 * y).sin(), (6 * (x + y)).cos()])
    series = rotations(small, angle, (0.5, 0.5, 0.5))
    assert series.labels[1] == f"{angle}°" and len(series.labels) == 360 // angle
    assert torch.equal(series.images[0], small)
    values = chart_values(series.images, series)
    assert values.shape == (len(series.labels), 32, 32, len(series.labels))
    middle = values[:, 10:22, 10:22]
    assert torch.allclose(torch.stack([middle[a, ..., a] for a in range(len(values))]), torch.tensor(1.0).double(), atol=1e-6)
    assert float(middle.nan_to_num(1).min()) > 0.99, "what has turned along is the same"
    still = torch.nn.functional.cosine_similarity(series.images[0], series.images[1], dim=0)[10:22, 10:22]
    assert float(still.min()) < 0.97
    if angle == 30:
        assert values[0, 0, 0, 1].isnan(), "a corner turns out of the picture"
    round_ones = rotations(small, angle, (0.5, 0.5, 0.5), disc=True).images
    assert torch.equal(round_ones[:, :, 0, 0], torch.full((len(values), 3), 0.5)) and torch.equal(
        round_ones[0, :, 16, 16], small[:, 16, 16]
    )
    with pytest.raises(ConfigError, match="divide 360"):
        rotations(small, 50, (0, 0, 0))


def test_enlarged_pictures_show_the_same_patch_further_out() -> None:
    y, x = torch.meshgrid(torch.linspace(0, 255, 200), torch.linspace(0, 255, 301), indexing="ij")
    pixels = torch.stack([x, y, 255 - x]).to(torch.uint8)
    series = enlargements(pixels, (32, 32), 3)
    assert series.labels == ["1.0x", "1.4x", "1.8x", "2.5x"] and series.images.shape == (4, 3, 32, 32)
    values = chart_values(series.images, series)
    assert float(values.nan_to_num(1).min()) > 0.995
    assert values[0, 0, 0, 1].isnan() and not values[1, 0, 0, 0].isnan(), "the corner leaves the enlarged picture, not the other way round"
    assert values[0, 16, 16].isfinite().all()


def test_pages_of_one_picture_in_several_states(photos: Path, tmp_path: Path) -> None:
    out = write_overlay([photos / "0.png"], explanandum(), tmp_path / "o.html", Options(["features.1"], side=8, rotate=90))
    data = content(out)
    assert [i["name"] for i in data["images"]] == data["chart"]["labels"] == ["0°", "90°", "180°", "270°"]
    curves = array(data["layers"][0]["chart"], "i1").reshape(4, 4, 4, 4)
    assert (curves[:, 0, 0] == 100).sum() >= 4
    # A corner of the quadrants turned by right angles: the same colour wherever it has gone. The black one is similar to nothing.
    assert sorted(curves[0, 0, 0].tolist()) == [100] * 4 and set(curves[0, 3, 3].tolist()) == {0}
    zoomed = content(write_overlay([photos / "0.png"], explanandum(), out, Options(["features.1"], side=8, zoom=2)))
    assert zoomed["chart"]["title"] == "enlargement" and len(zoomed["images"]) == 3
    with pytest.raises(ConfigError, match="one image in several states, received 4"):
        write_overlay([photos], explanandum(), out, Options(rotate=90))
    for more in ({"zoom": 2}, {"components": 2}, {"data": photos}):
        with pytest.raises(ConfigError, match="one of both, without data and components"):
            write_overlay([photos / "0.png"], explanandum(), out, Options(rotate=90, **more))


def test_the_command_with_everything(photos: Path, classifier_checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "o.html"
    base = ["overlay", str(photos), "--classifier", str(classifier_checkpoint), "--out", str(out), "--grid", "4"]
    more = [
        "--beside",
        str(classifier_checkpoint),
        "--beside_layers",
        "['features.2']",
        "--components",
        "2",
        "--data",
        str(photos),
        "--neighbors",
        "2",
    ]
    assert main([*base, "--layers", "features.2", *more]) == 0
    data = content(out)
    assert [layer["name"] for layer in data["layers"]] == ["features.2", f"{classifier_checkpoint.stem}: features.2"]
    assert all("components" in layer and "neighbors" in layer for layer in data["layers"])
    assert (
        main([*base[:1], str(photos / "0.png"), *base[2:], "--rotate", "120", "--disc"]) == 0
        and content(out)["chart"]["labels"][1] == "120°"
    )
    assert main([*base, "--beside", str(classifier_checkpoint), "--beside_layers", "['a', 'b']"]) == 2
    assert "--beside_layers has 2 entries for 1" in capsys.readouterr().err
    assert main([*base, "--disc"]) == 2 and "--disc belongs to --rotate" in capsys.readouterr().err
