"""Random occlusion masks: for training classifiers that have seen masked images (Fong & Vedaldi 2019), and random masks in tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from explainer.errors import ConfigError


def random_masks(
    batch: int,
    size: tuple[int, int],
    generator: torch.Generator,
    kind: Literal["blobs", "cutout", "hide_and_seek"] = "blobs",
    max_share: float = 0.7,
) -> Tensor:
    """Binary masks that remove up to ``max_share`` of the image.

    ``blobs`` thresholds smooth noise at a random quantile; ``cutout`` (DeVries & Taylor 2017) removes one square; ``hide_and_seek``
    (Singh & Lee 2017) removes random cells of a 4x4 to 8x8 grid.

    Args:
        batch: B.
        size: (H, W).
        generator: CPU generator.
        kind: shape of the removed region.
        max_share: largest occluded share, in [0,1].

    Returns:
        ``[B,H,W]`` float in {0,1}, 1 keeps, on the CPU.
    """
    if not 0 <= max_share <= 1:
        raise ConfigError(f"max_share must lie in [0,1], received {max_share}.")
    H, W = size
    share = torch.rand(batch, generator=generator) * max_share
    if kind == "blobs":
        cells = int(torch.randint(3, 9, (1,), generator=generator))
        noise = F.interpolate(torch.rand(batch, 1, cells, cells, generator=generator), size, mode="bilinear", align_corners=False)[:, 0]
        ranks = noise.flatten(1).argsort(dim=1).argsort(dim=1).view(batch, H, W)
        return (ranks >= (share * H * W).view(-1, 1, 1)).float()
    if kind == "cutout":
        side = (share.sqrt().view(-1, 1, 1) * torch.tensor([H, W])).round()
        corner = torch.rand(batch, 1, 2, generator=generator) * (torch.tensor([H, W]) - side)
        rows, columns = torch.arange(H).view(1, H, 1), torch.arange(W).view(1, 1, W)
        top, left, height, width = corner[..., 0:1], corner[..., 1:2], side[..., 0:1], side[..., 1:2]
        inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
        return (~inside).float()
    if kind == "hide_and_seek":
        cells = int(torch.randint(4, 9, (1,), generator=generator))
        keep = (torch.rand(batch, 1, cells, cells, generator=generator) >= share.view(-1, 1, 1, 1)).float()
        return F.interpolate(keep, size, mode="nearest")[:, 0]
    raise ConfigError(f"occlusion kind must be blobs, cutout or hide_and_seek, received {kind!r}.")


def cutout_squares(batch: int, size: tuple[int, int], generator: torch.Generator, squares: int = 6, side: float = 0.375) -> Tensor:
    """Masks that remove squares whose centres are uniform over the image, so that they leave it and overlap (Fong's thesis, appendix C.1).

    Args:
        batch: B.
        size: (H, W).
        generator: CPU generator.
        squares: per image, at least 1.
        side: side length of a square as share of the shorter side, above 0.

    Returns:
        ``[B,H,W]`` float in {0,1}, 1 keeps, on the CPU.
    """
    if squares < 1 or not 0 < side <= 1:
        raise ConfigError(f"cutout_squares needs squares >= 1 and side in (0,1], received {squares} and {side}.")
    H, W = size
    pixels = max(1, round(side * min(H, W)))
    # The first row and column; the centre lies at a pixel of the image.
    corner = (torch.rand(batch, squares, 2, generator=generator) * torch.tensor([H, W])).floor() - pixels // 2
    rows, columns = torch.arange(H).view(1, 1, H, 1), torch.arange(W).view(1, 1, 1, W)
    top, left = corner[..., 0].view(batch, squares, 1, 1), corner[..., 1].view(batch, squares, 1, 1)
    inside = (rows >= top) & (rows < top + pixels) & (columns >= left) & (columns < left + pixels)
    return (~inside.any(1)).float()


def salient_squares(saliency: Tensor, generators: Sequence[torch.Generator], side: float = 0.25, jitter: float = 16 / 224) -> Tensor:
    """Masks that remove the square with the largest sum of a map (Fong's thesis, appendix C.1).

    Squares lie inside the image, their corners on a grid of a 28th of the shorter side (8 pixels at 224). Both coordinates are then
    moved by a whole number of pixels, uniform in +- ``jitter``, and kept inside.

    Args:
        saliency: ``[B,H,W]``; larger is more important.
        generators: one per image, on the CPU.
        side: side of a square as share of the shorter side, in (0,1].
        jitter: largest shift as share of the shorter side, at least 0.

    Returns:
        ``[B,H,W]`` float in {0,1}, 1 keeps, on the CPU.
    """
    if not 0 < side <= 1 or jitter < 0:
        raise ConfigError(f"salient_squares needs side in (0,1] and jitter >= 0, received {side} and {jitter}.")
    B, H, W = saliency.shape
    short = min(H, W)
    pixels, step, reach = max(1, round(side * short)), max(1, round(short / 28)), round(jitter * short)
    sums = F.avg_pool2d(saliency[:, None].double(), pixels, step)[:, 0]
    best = sums.flatten(1).argmax(1).cpu()
    moves = torch.stack([torch.randint(-reach, reach + 1, (2,), generator=g) for g in generators])
    corner = torch.stack([best // sums.shape[2], best % sums.shape[2]], 1) * step + moves
    top, left = corner[:, 0].clamp(0, H - pixels).view(B, 1, 1), corner[:, 1].clamp(0, W - pixels).view(B, 1, 1)
    rows, columns = torch.arange(H).view(1, H, 1), torch.arange(W).view(1, 1, W)
    inside = (rows >= top) & (rows < top + pixels) & (columns >= left) & (columns < left + pixels)
    return (~inside).float()


def hide_and_seek_grid(batch: int, size: tuple[int, int], generator: torch.Generator, grid: int = 4, keep: float = 0.7) -> Tensor:
    """Masks that keep each cell of a grid with a probability, one by one (Singh & Lee 2017 as in Fong's thesis, appendix C.1).

    Args:
        batch: B.
        size: (H, W), each at least ``grid``.
        generator: CPU generator.
        grid: cells a side, at least 1; borders at the nearest pixel where they do not divide the image.
        keep: probability that a cell stays, in [0,1].

    Returns:
        ``[B,H,W]`` float in {0,1}, 1 keeps, on the CPU.
    """
    if not 1 <= grid <= min(size) or not 0 <= keep <= 1:
        raise ConfigError(
            f"hide_and_seek_grid needs grid in 1..{min(size)} (the shorter side) and keep in [0,1], received {grid} and {keep}."
        )
    cells = (torch.rand(batch, grid, grid, generator=generator) < keep).float()
    rows, columns = (torch.linspace(0, n, grid + 1).round().long().diff() for n in size)
    return cells.repeat_interleave(rows, dim=1).repeat_interleave(columns, dim=2)
