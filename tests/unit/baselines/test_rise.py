from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import explainer
from explainer.baselines import build
from explainer.baselines.rise import smooth_masks
from explainer.errors import ConfigError, ShapeError


class Sums(nn.Module):
    """Logit k is the sum over the pixels of channel k."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum((2, 3))


def sums(task: str = "multilabel") -> explainer.Explanandum:
    return explainer.Explanandum(Sums(), 3, task=task, mean=0.0, std=1.0)


def test_smooth_masks_equal_enlarging_and_cropping() -> None:
    generator = torch.Generator().manual_seed(3)
    grids = (torch.rand(5, 4, 4, generator=generator) < 0.5).double()
    size = (11, 14)  # 3 and 4 pixels a cell
    shifts = torch.tensor([[0, 0], [2, 3], [1, 0], [0, 2], [2, 1]])
    masks = smooth_masks(grids, shifts, size)
    large = F.interpolate(grids[:, None], (15, 20), mode="bilinear", align_corners=False)
    for mask, full, (dy, dx) in zip(masks, large, shifts.tolist(), strict=True):
        torch.testing.assert_close(mask, full[:, dy : dy + 11, dx : dx + 14])


def test_hand_worked_map() -> None:
    """Two 1x2 masks, one image with red pixels 2 and 3: logits 2 and 5 for the masks (1,0) and (1,1)."""
    images = torch.tensor([[[[2.0, 3.0]], [[0.0, 0.0]], [[0.0, 0.0]]]])
    masks = torch.tensor([[[[1.0, 0.0]]], [[[1.0, 1.0]]]])
    method = build("rise", sums(), masks=masks, score="logit", p=0.5)
    torch.testing.assert_close(method(images, 0), torch.tensor([[[7.0, 5.0]]]) / (2 * 0.5))
    raw = build("rise", sums(), masks=masks, score="logit", normalize=False)
    torch.testing.assert_close(raw(images, 0), torch.tensor([[[3.5, 2.5]]]))


def test_score_follows_the_task() -> None:
    images = torch.tensor([[[[0.2, 0.3]], [[0.1, 0.1]], [[0.4, 0.0]]]])
    mask = torch.ones(1, 1, 1, 2)
    logits = images.sum((2, 3))
    for task, expected in (("multilabel", logits.sigmoid()), ("multiclass", logits.softmax(1))):
        maps = build("rise", sums(task), masks=mask, normalize=False).all_classes(images)
        torch.testing.assert_close(maps, expected[..., None, None].expand(1, 3, 1, 2))


def test_maps_do_not_depend_on_batching_and_all_classes_share_the_masks() -> None:
    images = torch.rand(3, 3, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    small, large = (build("rise", sums(), n_masks=13, grid=3, batch_size=n) for n in (2, 64))
    maps = large.all_classes(images)
    torch.testing.assert_close(small.all_classes(images), maps)
    for k in range(3):
        torch.testing.assert_close(small(images, k), maps[:, k])
    torch.testing.assert_close(large.all_classes(images, [2, 0]), maps[:, [2, 0]])


def test_expected_mask_is_p() -> None:
    """With a constant score of 1 and division by p, the map is the mean mask over p: about 1."""

    class One(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.new_ones(len(x), 3)

    method = build("rise", explainer.Explanandum(One(), 3), n_masks=4000, grid=4, p=0.3, score="logit", batch_size=500)
    maps = method(torch.rand(1, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 0)
    assert abs(maps.mean().item() - 1) < 0.03
    assert (maps - 1).abs().max() < 0.15


def test_budget_stops_after_a_batch_and_averages_what_was_seen() -> None:
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    masks = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    method = build("rise", sums(), masks=masks, batch_size=4, budget_s=0.0)
    maps = method(images, 1)
    assert method.masks_used == 4
    torch.testing.assert_close(maps, build("rise", sums(), masks=masks[:4])(images, 1))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"p": 0.0}, ConfigError),
        ({"n_masks": 0}, ConfigError),
        ({"score": "loss"}, ConfigError),
        ({"masks": torch.ones(4, 8, 8)}, ShapeError),
    ],
)
def test_wrong_options(options: dict, error: type[Exception]) -> None:
    with pytest.raises(error, match="rise"):
        build("rise", sums(), **options)


def test_masks_of_another_size() -> None:
    with pytest.raises(ShapeError, match="8x8"):
        build("rise", sums(), masks=torch.ones(2, 1, 4, 4))(torch.rand(1, 3, 8, 8), 0)
