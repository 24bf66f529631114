"""How many filters a concept needs (section 4.2): the largest weights, learned anew with the others fixed at 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

#: F of the paper's Figure 3.
CLASSIFICATION_SIZES = (1, 2, 3, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 80, 100, 128)
SEGMENTATION_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 160, 192, 224)


def order(weights: Tensor) -> Tensor:
    """Filters by ``|w_k|``, largest first, lower index on ties; ``[K]`` long."""
    return torch.sort(weights.abs(), descending=True, stable=True).indices


def top(weights: Tensor, number: int) -> Tensor:
    """``[K]`` float, 1 for the ``number`` filters of the largest weights."""
    chosen = torch.zeros_like(weights)
    chosen[order(weights)[:number]] = 1
    return chosen


def sizes(wanted: Sequence[int], K: int) -> list[int]:
    """The sizes that K filters allow, and K itself."""
    return sorted({f for f in wanted if 1 <= f <= K} | {K})


def filters_needed(scores: Mapping[int, float], share: float) -> int | None:
    """The smallest F whose score is at least ``share`` of the best over F; None without scores."""
    known = {f: s for f, s in scores.items() if s == s}
    if not known:
        return None
    best = max(known.values())
    return min(f for f, s in known.items() if s >= share * best - 1e-12)
