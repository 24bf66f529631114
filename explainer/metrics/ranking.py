"""Pixels in order of their attribution, with ties broken fairly and reproducibly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from explainer.errors import ConfigError

First = Literal["highest", "lowest"]


def pixel_ranks(saliency: Tensor, first: First = "highest", seed: int = 0) -> Tensor:
    """Rank ``[B,H*W]`` long of each pixel, 0 is first.

    Ties are broken by one random order of the pixels (``seed``), the same for every image: a constant map removes pixels at random, not
    from the top left corner, and the result does not depend on how images are batched.
    """
    if first not in get_args(First):
        raise ConfigError(f"first must be 'highest' or 'lowest', received {first!r}.")
    flat = saliency.flatten(1)
    shuffle = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(seed)).to(flat.device)
    order = shuffle[flat[:, shuffle].argsort(dim=1, descending=first == "highest", stable=True)]
    position = torch.arange(flat.shape[1], device=flat.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, position)


def top_masks(saliency: Tensor, fractions: Sequence[float], first: First = "highest", seed: int = 0) -> Tensor:
    """Binary masks ``[B,T,H,W]`` of the first ``floor(fraction * H * W)`` pixels, in the map's dtype; NaN for a map with NaN."""
    ranks = pixel_ranks(saliency, first, seed)
    # 0.7 * 10 is 7.000000000000001 and 0.29 * 100 is 28.999999999999996: the small number restores the count that is meant.
    counts = [int(fraction * ranks.shape[1] + 1e-9) for fraction in fractions]
    masks = torch.stack([(ranks < count).to(saliency.dtype) for count in counts], dim=1)
    unknown = saliency.flatten(1).isnan().any(1)
    shaped: Tensor = masks.masked_fill(unknown[:, None, None], torch.nan).unflatten(2, saliency.shape[1:])
    return shaped
