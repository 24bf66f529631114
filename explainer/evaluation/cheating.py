"""What the checks for cheating are made of: binary masks, the same masks moved elsewhere, foreign images, removed cues.

A learned, class-dependent explainer can write the label into its mask (a pattern that the classifier, or the reader of a metric, decodes)
instead of showing evidence. The checks themselves are protocols: ``label_leakage``, ``randomized_classifier``, ``fill_swap``,
``shortcut``, ``parameter_randomization`` and ``implausible``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from explainer.errors import ConfigError, ShapeError

#: Coverage of a cell is stored in these steps (two bits).
_STEPS = 3


def binary(mask: Tensor, threshold: float = 0.5) -> Tensor:
    """1 where ``mask`` is at least ``threshold``, else 0 (NaN too); any shape."""
    return (mask >= threshold).to(mask.dtype)


def moved(mask: Tensor, keys: Sequence[tuple[int, ...]], draws: int = 1) -> Tensor:
    """The same masks at random places: same form, same area, moved over a torus (what leaves on one side enters on the other).

    Args:
        mask: ``[P,H,W]``.
        keys: one tuple of numbers per mask that decides where it goes, so that neither batching nor order matters.
        draws: places per mask.

    Returns:
        ``[draws,P,H,W]``; no place is the original one (unless the mask has a single pixel).
    """
    if len(keys) != len(mask):
        raise ShapeError(f"moved needs one key per mask, received {len(keys)} keys for {len(mask)} masks.")
    H, W = mask.shape[-2:]
    out = mask.new_empty(draws, *mask.shape)
    for p, key in enumerate(keys):
        random = np.random.default_rng([int(k) for k in key])
        for d in range(draws):
            step = int(random.integers(1, H * W)) if H * W > 1 else 0
            out[d, p] = mask[p].roll((step // W, step % W), dims=(0, 1))
    return out


def pack(mask: Tensor, grid: int = 16) -> Tensor:
    """Binary masks ``[P,H,W]`` as ``[P,grid]`` whole numbers: each is a row of cells, two bits of coverage a cell. Exact in float64."""
    if not 2 <= grid <= 24:
        raise ConfigError(f"grid must lie in 2..24 (two bits a cell in one float64 number), received {grid}.")
    cells = (F.adaptive_avg_pool2d(mask.double()[:, None], grid)[:, 0] * _STEPS).round()
    powers = float(_STEPS + 1) ** torch.arange(grid - 1, -1, -1, dtype=torch.float64, device=mask.device)
    return (cells * powers).sum(-1)


def unpack(rows: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """The inverse of :func:`pack`: coverage ``[P,grid,grid]`` in [0,1]."""
    numbers = np.asarray(rows, dtype=np.float64).astype(np.int64)
    grid = numbers.shape[1]
    powers = (_STEPS + 1) ** np.arange(grid - 1, -1, -1, dtype=np.int64)
    coverage: NDArray[np.float64] = (numbers[:, :, None] // powers % (_STEPS + 1)) / _STEPS
    return coverage


def foreign_index(labels: Tensor, rows: Tensor, classes: Tensor) -> Tensor:
    """For each pair the next image of the batch (cyclic) that does not show the pair's class, ``[P]``; -1 where every image shows it.

    Args:
        labels: ``[B,K]`` bool.
        rows, classes: the pairs ``[P]``.
    """
    B = len(labels)
    others = (rows[:, None] + torch.arange(1, B, device=rows.device)) % B
    free = ~labels[others, classes[:, None]]
    if B == 1:
        return torch.full_like(rows, -1)
    first = free.to(torch.uint8).argmax(1)
    return torch.where(free.any(1), others.gather(1, first[:, None])[:, 0], torch.full_like(rows, -1))


def without_cue(images: Tensor, cue: Tensor, ring: int = 3) -> Tensor:
    """Images with the cue painted over in the mean colour of the pixels around it.

    Args:
        images: ``[P,3,H,W]``.
        cue: ``[P,H,W]`` in {0,1}.
        ring: width of the surroundings in pixels.
    """
    inside = cue.to(images)[:, None]
    around = F.max_pool2d(inside, 2 * ring + 1, stride=1, padding=ring) - inside
    # A cue that fills the image has no surroundings: the image's mean colour stands in.
    around = torch.where(around.flatten(1).sum(1)[:, None, None, None] > 0, around, torch.ones_like(around))
    color = (images * around).sum((2, 3), keepdim=True) / around.sum((2, 3), keepdim=True)
    return images * (1 - inside) + color * inside


def share_on(saliency: Tensor, region: Tensor) -> Tensor:
    """Share of a map's positive values that lie in ``region``, ``[P]`` in [0,1]; 0 without positive values, NaN with NaN."""
    positive = saliency.double().clamp(min=0)
    total = positive.flatten(1).sum(1)
    inside = (positive * region).flatten(1).sum(1)
    return torch.where(total == 0, torch.zeros_like(total), inside / torch.where(total == 0, torch.ones_like(total), total))


def overlap(mask: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of binary masks ``[...,H,W]``; 0 where both are empty (a mask that shows nothing is not right)."""
    both = (mask * truth).sum((-2, -1)).double()
    either = torch.maximum(mask, truth).sum((-2, -1)).double()
    return both / either.clamp(min=1)
