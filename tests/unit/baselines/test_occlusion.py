from __future__ import annotations

import pytest
import torch
from torch import nn

import explainer
from explainer.baselines import build
from explainer.baselines.occlusion import window_starts
from explainer.errors import ConfigError, ShapeError


class Sums(nn.Module):
    """Logit k is the sum over the pixels of channel k."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum((2, 3))


CLASSIFIER = explainer.Explanandum(Sums(), 3, mean=0.0, std=1.0)


def test_window_starts() -> None:
    assert window_starts(8, 4, 2) == [0, 2, 4]
    assert window_starts(9, 4, 2) == [0, 2, 4, 6]  # the last one is cut by the border
    assert window_starts(3, 4, 2) == [0]


def test_one_pixel_windows_give_the_pixels_contribution() -> None:
    images = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps = build("occlusion", CLASSIFIER, window=1, stride=1, batch_size=7)(images, [0, 2])
    torch.testing.assert_close(maps, torch.stack([images[0, 0], images[1, 2]]))


def test_hand_worked_overlap() -> None:
    """Row (1,2,4), window 2, stride 1: hiding (1,2) costs 3, hiding (2,4) costs 6; the middle pixel is the mean of both."""
    images = torch.zeros(1, 3, 1, 3)
    images[0, 1, 0] = torch.tensor([1.0, 2.0, 4.0])
    maps = build("occlusion", CLASSIFIER, window=(1, 2), stride=1)(images, 1)
    torch.testing.assert_close(maps, torch.tensor([[[3.0, 4.5, 6.0]]]))


def test_fill_colour() -> None:
    images = torch.full((1, 3, 2, 2), 0.75)
    maps = build("occlusion", CLASSIFIER, window=1, stride=1, fill="white")(images, 0)
    torch.testing.assert_close(maps, torch.full((1, 2, 2), -0.25))


def test_segments_get_their_whole_contribution() -> None:
    images = torch.rand(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[[[0, 0], [7, 3]]]])
    maps = build("occlusion", CLASSIFIER, segments=segments)(images, 0)
    red = images[0, 0]
    torch.testing.assert_close(maps[0], torch.tensor([[red[0].sum(), red[0].sum()], [red[1, 0], red[1, 1]]]))


def test_maps_do_not_depend_on_batching() -> None:
    images = torch.rand(3, 3, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps = [build("occlusion", CLASSIFIER, window=4, stride=2, score="probability", batch_size=n).all_classes(images) for n in (2, 64)]
    torch.testing.assert_close(*maps)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"window": 4, "stride": 5}, ConfigError),
        ({"stride": 0}, ConfigError),
        ({"score": "loss"}, ConfigError),
        ({"batch_size": 0}, ConfigError),
        ({"segments": torch.zeros(2, 2)}, ShapeError),
    ],
)
def test_wrong_options(options: dict, error: type[Exception]) -> None:
    with pytest.raises(error, match="occlusion"):
        build("occlusion", CLASSIFIER, **options)


def test_segments_of_another_size() -> None:
    with pytest.raises(ShapeError, match="8x8"):
        build("occlusion", CLASSIFIER, segments=torch.zeros(1, 1, 4, 4, dtype=torch.long))(torch.rand(1, 3, 8, 8), 0)
