"""Similarity overlays: the numbers, the file and the command."""

from __future__ import annotations

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
from explainer.look.similarity import Options, eight_bits, feature_maps, overlay_page, patch_vectors, similarities, write_overlay
from explainer.models.black_box import BlackBox
from explainer.models.explanandum import Explanandum
from tests.unit.look.quadrants import QUADRANTS, Colours, quadrants


def explanandum(**options: Any) -> Explanandum:
    return Explanandum(Colours(), 3, mean=0.0, std=1.0, **options)


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


class ColoursLast(Colours):
    """The same with a layer that returns [B,h,w,C], as Swin and ConvNeXt have them."""

    def __init__(self) -> None:
        super().__init__()
        self.last = ops.Permute([0, 2, 3, 1])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.last(self.features(images))).mean(dim=(1, 2)))


def test_channels_last_is_read_as_what_it_is() -> None:
    images = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    found = feature_maps(Explanandum(ColoursLast(), 3, mean=0.0, std=1.0), images, ["last"])
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


def test_page_without_pictures_of_other_kinds(tmp_path: Path) -> None:
    """A large photograph is embedded small."""
    from explainer.inference.pictures import load_picture

    Image.fromarray(np.zeros((600, 900, 3), np.uint8)).save(tmp_path / "big.png")
    picture = load_picture("big.png", tmp_path / "big.png", (8, 8))
    text = overlay_page([picture], {"x": torch.ones(1, 2, 2, 3)}, "t")
    assert "data:image/jpeg" in text and len(text) < 60_000
