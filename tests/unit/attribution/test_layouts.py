"""Which axis is which, by hand; and the same map from channels-first, channels-last and token twins of one network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from explainer import Explanandum
from explainer.attribution.layouts import Layout, readings
from explainer.baselines import build
from explainer.errors import UnsupportedLayerError


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((1, 3, 3, 3072), (96, 96), [Layout(3)]),  # a ConvNeXt's inner GELU: not 3 channels of 3x3072
        ((1, 512, 7, 7), (224, 224), [Layout(1)]),
        ((1, 4, 6, 24), (32, 48), [Layout(3)]),
        ((1, 24, 4, 6), (32, 48), [Layout(1)]),
        ((1, 768, 8, 11), (299, 400), [Layout(1)]),  # unpadded: not an exact share of the image
        ((1, 768, 5, 7), (65, 97), [Layout(1)]),  # padded to whole patches of 14
        ((1, 8, 8, 8), (64, 64), [Layout(1), Layout(3)]),
        ((1, 3, 7, 40), (64, 64), []),
        ((2, 10), (8, 8), []),
    ],
)
def test_readings_of_maps(shape: tuple[int, ...], size: tuple[int, int], expected: list[Layout]) -> None:
    assert readings(shape, size) == expected


@pytest.mark.parametrize(
    ("shape", "size", "grids", "prefix", "expected"),
    [
        ((1, 196, 64), (224, 224), (), None, [Layout(2, (14, 14))]),
        ((1, 197, 64), (224, 224), (), None, [Layout(2, (14, 14), 1)]),
        ((1, 198, 64), (224, 224), ((14, 14),), None, [Layout(2, (14, 14), 2)]),
        ((1, 25, 64), (64, 96), ((4, 6),), 1, [Layout(2, (4, 6), 1)]),  # not 5x5
        ((1, 21, 64), (32, 32), (), 5, [Layout(2, (4, 4), 5)]),
        ((1, 9, 64), (32, 32), ((2, 2),), 5, [Layout(2, (2, 2), 5)]),  # the network says so
        ((1, 9, 64), (32, 32), (), None, [Layout(2, (3, 3))]),
        ((1, 16, 64), (64, 64), ((4, 4),), 1, [Layout(2, (4, 4))]),  # the class token joins later (CaiT)
        ((1, 64, 16), (32, 32), ((4, 4),), None, [Layout(2, (8, 8)), Layout(1, (4, 4))]),
        ((1, 1, 1024), (64, 64), (), None, []),  # one vector, not a map of 32x32
        ((1, 7, 64), (64, 64), (), None, []),
    ],
)
def test_readings_of_tokens(
    shape: tuple[int, ...], size: tuple[int, int], grids: tuple[tuple[int, int], ...], prefix: int | None, expected: list[Layout]
) -> None:
    assert readings(shape, size, grids, prefix) == expected


def test_a_layout_is_a_view_without_the_prefix() -> None:
    output = torch.arange(2 * 7 * 3.0).view(2, 7, 3)
    values = Layout(2, (2, 3), 1).spatial(output)
    assert values.shape == (2, 3, 2, 3)
    assert values[1, 2, 1, 0] == output[1, 1 + 3, 2]
    values[:, 1] = -1
    assert torch.equal(output[:, 1:, 1], -torch.ones(2, 6)) and output[0, 0, 1] == 1, "the prefix token keeps its value"
    assert torch.equal(Layout(1, (2, 3)).spatial(output.transpose(1, 2)[:, :, 1:])[0, 2], output[0, 1:, 2].view(2, 3))
    assert torch.equal(Layout(3).spatial(torch.arange(24).view(1, 2, 3, 4))[0, 3], torch.tensor([[3, 7, 11], [15, 19, 23]]))


class Twin(nn.Module):
    """Two convolutions and a mean; the inner map is handed through ``stage`` in one of three layouts."""

    def __init__(self, layout: str, channels: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.layout = layout
        self.first, self.second = nn.Conv2d(3, channels, 3, 2, 1), nn.Conv2d(channels, channels, 3, 2, 1)
        self.stage, self.last, self.head = nn.GELU(), nn.Conv2d(channels, channels, 1), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(x)))
        h, w = x.shape[-2:]
        if self.layout == "last":
            x = self.stage(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        elif self.layout == "tokens":
            tokens = x.flatten(2).transpose(1, 2)
            with_class = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)
            x = self.stage(with_class)[:, 1:].transpose(1, 2).unflatten(2, (h, w))
        else:
            x = self.stage(x)
        return self.head(torch.tanh(self.last(x)).mean((2, 3)))


def twin(layout: str, channels: int = 6) -> Explanandum:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Explanandum(Twin(layout, channels).double(), 3, mean=0.4, std=0.3)


def images(height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


LAYERED = ["grad_cam", "grad_cam_pp", "x_grad_cam", "layer_cam", "hires_cam", "grad_cam_elementwise", "score_cam", "ablation_cam"]
LAYERED += ["norm_grad", "gradient", "linear_approx"]


@pytest.mark.parametrize("layout", ["last", "tokens"])
@pytest.mark.parametrize("name", LAYERED)
def test_an_explicit_layer_of_any_layout_gives_the_same_map(name: str, layout: str) -> None:
    expected = build(name, twin("first"), layer="stage")(images(), [0, 2])
    assert expected.abs().max() > 0
    torch.testing.assert_close(build(name, twin(layout), layer="stage")(images(), [0, 2]), expected)


@pytest.mark.parametrize("name", ["layer_cam", "ablation_cam", "gradient"])
def test_as_many_channels_as_rows_and_columns(name: str) -> None:
    """[B,6,6,6] fits both readings: where the image's top is felt decides."""
    expected = build(name, twin("first"), layer="stage")(images(24, 24), 1)
    torch.testing.assert_close(build(name, twin("last"), layer="stage")(images(24, 24), 1), expected)


def test_what_cannot_be_told_apart_is_refused_with_candidates() -> None:
    class Mixed(Twin):
        def forward(self, x: Tensor) -> Tensor:
            x = self.second(torch.relu(self.first(x))).mean((2, 3), keepdim=True).expand(-1, -1, 6, 6)
            return self.head(self.last(self.stage(x)).mean((2, 3)))

    model = Explanandum(Mixed("first").double(), 3, mean=0.4, std=0.3)
    with pytest.raises(UnsupportedLayerError, match=r"'stage' returns \(2, 6, 6, 6\), whose rows and columns cannot be told.*first"):
        build("grad_cam", model, layer="stage")(images(24, 24), 1)


def test_the_maximum_of_an_image_size_is_not_kept_for_another() -> None:
    method = build("hires_cam", twin("tokens"), layer="stage")
    for size in ((16, 24), (32, 16)):
        expected = build("hires_cam", twin("first"), layer="stage")(images(*size), 1)
        torch.testing.assert_close(method(images(*size), 1), expected)


def test_the_relevance_of_a_channels_last_layer() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.point, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.point(torch.relu(self.conv(x)).permute(0, 2, 3, 1))).mean((1, 2)))

    model = Explanandum(Last().double(), 3, mean=0.4, std=0.3)
    method = build("excitation_backprop", model, layer="point")
    raw = method.relevance(images(), [0, 2])
    assert raw.shape == (2, 8, 12, 5)
    expected = nn.functional.interpolate(raw.sum(3)[:, None], (16, 24), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(method(images(), [0, 2]), expected)


def test_channel_masks_on_a_channels_last_layer() -> None:
    found = [
        build("extremal_perturbation", twin(layout), layer="stage", areas=[2], iterations=20).channel_masks(images(), [0, 2])
        for layout in ("first", "last")
    ]
    torch.testing.assert_close(found[1].masks, found[0].masks)
    torch.testing.assert_close(found[1].saliency, found[0].saliency)
