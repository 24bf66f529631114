"""The occlusions of Fong's thesis: squares that leave the image, cells of a fixed grid."""

from __future__ import annotations

import pytest
import torch

from explainer.errors import ConfigError
from explainer.models.occlusion import cutout_squares, hide_and_seek_grid, salient_squares


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_squares_leave_the_image_and_overlap() -> None:
    masks = cutout_squares(4000, (20, 28), generator(), squares=1, side=0.5)
    removed = (1 - masks).sum((1, 2))
    assert masks.shape == (4000, 20, 28) and set(masks.unique().tolist()) == {0.0, 1.0}
    assert removed.max() == 100, "a whole square of 10 x 10 inside"
    assert removed.min() <= 30, "in a corner only a quarter of it is left"
    # A centre anywhere: along an axis of n pixels a square of s covers s - s^2 / 4n of them on average.
    expected = (10 - 100 / 80) * (10 - 100 / 112)
    assert float(removed.mean()) == pytest.approx(expected, rel=0.02)
    edges = (1 - masks).mean(0)
    assert edges[0, 0] < 0.4 * edges[10, 14], "an edge is covered less often than the middle"
    many = (1 - cutout_squares(500, (20, 28), generator(), squares=8, side=0.5)).sum((1, 2))
    assert removed.mean() * 2 < many.mean() < removed.mean() * 8, "they overlap"
    assert torch.equal(cutout_squares(3, (9, 9), generator(1)), cutout_squares(3, (9, 9), generator(1)))


def test_cells_are_kept_one_by_one() -> None:
    masks = hide_and_seek_grid(3000, (8, 12), generator(), grid=4, keep=0.7)
    cells = masks.unflatten(2, (4, 3)).unflatten(1, (4, 2))
    assert torch.equal(cells.amax((2, 4)), cells.amin((2, 4))), "a cell is kept or removed as a whole"
    kept = cells[:, :, 0, :, 0]
    assert float(kept.mean()) == pytest.approx(0.7, abs=0.01) and kept.mean((1, 2)).unique().numel() > 8
    together = (kept[:, 0, 0] * kept[:, 0, 1]).mean()
    assert float(together) == pytest.approx(0.49, abs=0.04), "neighbours know nothing of each other"
    uneven = hide_and_seek_grid(50, (10, 11), generator(), grid=4, keep=0.5)
    assert uneven.shape == (50, 10, 11)
    assert torch.equal(hide_and_seek_grid(2, (8, 8), generator(), keep=1.0), torch.ones(2, 8, 8))


def test_refusals() -> None:
    for wrong in ({"squares": 0}, {"side": 0.0}, {"side": 1.5}):
        with pytest.raises(ConfigError, match="cutout_squares needs"):
            cutout_squares(1, (8, 8), generator(), **wrong)
    for wrong in ({"grid": 0}, {"grid": 9}, {"keep": 1.1}):
        with pytest.raises(ConfigError, match="hide_and_seek_grid needs"):
            hide_and_seek_grid(1, (8, 8), generator(), **wrong)


def test_the_square_with_the_largest_sum_is_removed() -> None:
    saliency = torch.zeros(2, 56, 84)  # the shorter side 56: corners every 2 pixels, squares of 14
    saliency[0, 20:34, 40:54] = 1.0
    saliency[1, 0:3, 80:84] = 1.0  # in a corner: the square stays inside
    masks = salient_squares(saliency, [generator(), generator(1)], side=0.25, jitter=0.0)
    removed = 1 - masks
    assert torch.equal(removed[0], saliency[0]) and removed.sum((1, 2)).tolist() == [196, 196]
    assert removed[1, :14, 70:].sum() == 196
    moved = torch.stack([1 - salient_squares(saliency[:1], [generator(i)], side=0.25, jitter=4 / 56)[0] for i in range(40)])
    tops = moved.amax(2).argmax(1)
    assert set(tops.tolist()) <= set(range(16, 25)) and len(set(tops.tolist())) > 4 and moved.sum((1, 2)).eq(196).all()
    with pytest.raises(ConfigError, match="salient_squares needs"):
        salient_squares(saliency, [generator(), generator()], side=0.0)
