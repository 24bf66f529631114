"""A learned order of pixels: the masks' logits rank pixels as another method's map does, on either side of the mask's edge.

RankNet (Burges et al., ICML 2005, eq. 3) on pairs of pixels: for mask logits S and a target map t,

    L = mean_ij log(1 + exp(-sign(t_i - t_j) (S_i - S_j)))

over random pairs i, j with t_i != t_j that lie both inside the mask (S >= 0) or both outside. Pairs across the edge are left out: where a
mask ends is for other terms to say. Small differences of t count as much as large ones: most of an insertion or deletion curve is decided
where maps are low.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from explainer.errors import ConfigError, ShapeError
from explainer.losses.base import Explanation, LossTerm, Weight


def order_loss(logits: Tensor, maps: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """RankNet over pairs on the same side of 0.

    Args:
        logits: ``[N,P]``, S.
        maps: ``[N,P]``, t; only its order counts.
        first, second: ``[N,M]`` positions i and j in 0..P-1.

    Returns:
        ``[N]``, each >= 0; log 2 where S is flat, near 0 where it is far and in the order of t, and 0 where no pair can be ordered.
    """
    if logits.shape != maps.shape or first.shape != second.shape:
        raise ShapeError(
            f"logits and maps must be [N,P] and pairs [N,M] alike, received {tuple(logits.shape)}, {tuple(maps.shape)}, "
            f"{tuple(first.shape)} and {tuple(second.shape)}."
        )
    S = logits.gather(1, first) - logits.gather(1, second)
    t = maps.gather(1, first) - maps.gather(1, second)
    inside = logits.detach() >= 0
    counts = (t != 0) & (inside.gather(1, first) == inside.gather(1, second))
    return (counts * F.softplus(-t.sign() * S)).sum(dim=1) / counts.sum(dim=1).clamp_min(1)


class Order(LossTerm):
    """Rank the pixels of the present classes' masks as the maps of the teachers with ``teaches: order`` do.

    With a shared encoder give ``explainer.options.order``, too: a logit of its own then ranks pixels, and this loss moves no mask's edge.
    Without it one logit has to serve both; where masks are cut to areas (``masking.area_conditioned``) the loss reaches both logits.

    Args:
        weight: number or schedule.
        pairs: random pairs of pixels for each mask and step.
    """

    name = "order"
    needs_order = True
    ranks = True

    def __init__(self, weight: Weight = 1.0, *, pairs: int = 4096) -> None:
        super().__init__(weight)
        if pairs < 1:
            raise ConfigError(f"losses.order.pairs must be at least 1, received {pairs}.")
        self.pairs = pairs

    def value(self, e: Explanation) -> Tensor:
        """Mean of :func:`order_loss` over the masks whose map is known; 0 if none is."""
        if e.order is None:
            raise ConfigError("losses.order needs a teacher with teaches: order: add one to teachers.")
        rows, columns = torch.isfinite(e.order).flatten(2).all(dim=2).nonzero(as_tuple=True)
        if len(rows) == 0:
            return e.class_masks.sum() * 0.0
        logits = e.ranked(rows, columns).flatten(1)
        first, second = _pairs(rows.tolist(), e.generators, self.pairs, logits.shape[1]).to(logits.device).unbind(0)
        return order_loss(logits, e.order[rows, columns].flatten(1).to(logits.dtype), first, second).mean()


def _pairs(rows: Sequence[int], generators: Sequence[torch.Generator], pairs: int, pixels: int) -> Tensor:
    """``[2,N,pairs]`` random positions; each mask draws from its own image's generator."""
    return torch.stack([torch.randint(pixels, (2, pairs), generator=generators[row]) for row in rows], dim=1)
