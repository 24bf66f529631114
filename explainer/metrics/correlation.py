"""Tie-aware ranks and correlations along the last axis, vectorised over rows."""

from __future__ import annotations

import torch
from torch import Tensor


def average_ranks(values: Tensor) -> Tensor:
    """Ranks 1..N of each row of ``[B,N]``; tied values share the mean of their ranks. float64."""
    ordered, order = values.sort(dim=-1)
    start, end = tie_groups(ordered)
    ranks = (start + end).double() / 2 + 1
    return torch.empty_like(ranks).scatter_(-1, order, ranks)


def tie_groups(ordered: Tensor) -> tuple[Tensor, Tensor]:
    """First and last position of the group of equal values at each position of sorted rows ``[B,N]``."""
    position = torch.arange(ordered.shape[-1], device=ordered.device).expand_as(ordered)
    changes = ordered[..., 1:] != ordered[..., :-1]
    edge = torch.ones_like(ordered[..., :1], dtype=torch.bool)
    first, last = torch.cat([edge, changes], -1), torch.cat([changes, edge], -1)
    start = torch.where(first, position, torch.zeros_like(position)).cummax(-1).values
    end = torch.where(last, position, torch.full_like(position, ordered.shape[-1])).flip(-1).cummin(-1).values.flip(-1)
    return start, end


def pearson(first: Tensor, second: Tensor) -> Tensor:
    """Pearson correlation of the rows of two ``[B,N]`` tensors, in [-1,1]; NaN where either row is constant or holds a NaN."""
    a, b = first.double(), second.double()
    constant = (a == a[..., :1]).all(-1) | (b == b[..., :1]).all(-1)
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    value = (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return torch.where(constant, torch.full_like(value, torch.nan), value.clamp(-1, 1))


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Spearman correlation (Pearson of average ranks) of the rows of two ``[B,N]`` tensors; NaN as in :func:`pearson`."""
    value = pearson(average_ranks(first), average_ranks(second))
    unknown = first.isnan().any(-1) | second.isnan().any(-1)
    return torch.where(unknown, torch.full_like(value, torch.nan), value)
