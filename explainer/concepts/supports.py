"""Where filters are on: ``I_k(x) = [A_k(x) > T_k]`` with T_k such that a share tau of all activations lies above (section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from explainer.errors import ConfigError

_CHUNK = 256  # images whose maps are compared at once


def thresholds(maps: Sequence[Tensor], tau: float = 0.005) -> Tensor:
    """T_k, the smallest value that at most a share ``tau`` of filter k's activations exceeds, over all images and positions; exact.

    Args:
        maps: ``[N,K,h,w]`` of each split (the paper: all probe images, train and val, with the concept or without).
        tau: share of the largest activations that counts as on, in [0,1). 0 is the option T = 0: a filter is on wherever it is positive.

    Returns:
        ``[K]`` float32. A dead filter (all activations equal) has T = its maximum, so that it is on nowhere.

    Raises:
        ConfigError: tau outside [0,1).
    """
    if not 0 <= tau < 1:
        raise ConfigError(f"tau is a share of activations in [0,1), received {tau}.")
    K = maps[0].shape[1]
    if tau == 0:
        return torch.zeros(K)
    number = sum(m.shape[0] * m.shape[2] * m.shape[3] for m in maps)
    rank = number - int(tau * number + 1e-9)  # this many values are at most T
    out = torch.empty(K)
    for k in range(K):
        values = torch.cat([m[:, k].reshape(-1) for m in maps]).float()
        out[k] = values.kthvalue(rank).values
    return out


@dataclass
class Supports:
    """The filters that are on at each position, as lists: with tau = 0.005 they are 200 times shorter than the maps.

    Attributes:
        filters: ``[n]`` long, filters that are on, position after position of image after image.
        offsets: ``[N*h*w + 1]`` long, where each position's list starts.
        grid: ``(h, w)``.
        K: number of filters.
    """

    filters: Tensor
    offsets: Tensor
    grid: tuple[int, int]
    K: int

    @classmethod
    def of(cls, maps: Tensor, limits: Tensor) -> Supports:
        """From activations ``[N,K,h,w]`` and thresholds ``[K]`` (strict)."""
        h, w = int(maps.shape[2]), int(maps.shape[3])
        filters, counts = [], []
        for part in maps.split(_CHUNK):
            on = (part.float() > limits[:, None, None]).permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
            filters.append(on.nonzero()[:, 1])
            counts.append(on.sum(1))
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), torch.cat(counts).cumsum(0)])
        return cls(torch.cat(filters), offsets, (h, w), int(maps.shape[1]))

    def only(self, images: Tensor) -> Supports:
        """The same for some images, ``[n]`` long, in their order."""
        cells = self.grid[0] * self.grid[1]
        starts, ends = self.offsets[images * cells].tolist(), self.offsets[(images + 1) * cells].tolist()
        filters = torch.cat([self.filters[a:b] for a, b in zip(starts, ends, strict=True)] or [self.filters[:0]])
        lengths = self.offsets.diff().view(-1, cells)[images].flatten()
        return Supports(filters, torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]), self.grid, self.K)

    def combine(self, weights: Tensor) -> Tensor:
        """``sum_k w_k I_k`` of every image, ``[N,h,w]``; differentiable in the weights ``[K]``."""
        sums = F.embedding_bag(self.filters, weights[:, None], self.offsets[:-1], mode="sum")
        return sums.view(-1, *self.grid)

    def indicators(self, images: Tensor) -> Tensor:
        """``I``, ``[n,K,h,w]`` float, of some images."""
        part = self.only(images)
        h, w = self.grid
        dense = torch.zeros(len(images) * h * w, self.K)
        dense[torch.repeat_interleave(torch.arange(len(dense)), part.offsets.diff()), part.filters] = 1
        return dense.view(len(images), h, w, self.K).permute(0, 3, 1, 2)


def upsample(maps: Tensor, side: tuple[int, int]) -> Tensor:
    """Bilinear with half-pixel centres, ``[...,h,w]`` -> ``[...,hs,ws]``."""
    if tuple(maps.shape[-2:]) == tuple(side):
        return maps
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return F.interpolate(flat, side, mode="bilinear", align_corners=False).view(*maps.shape[:-2], *side)
