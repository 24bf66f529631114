"""Masked-coalition regression: the masks learn from the classifier's scores alone, without a gradient through it.

After FastSHAP (Jethani et al., ICLR 2022). The image is cut into G = grid x grid cells. For a random coalition z in {0,1}^G the classifier
sees only its cells and gives v(z); the attributions phi of an image and class must predict it,

    L = mean over z of ( v(z) - v(0) - sum_g z_g phi_g )^2,          z from the Shapley kernel p(|z| = k) ~ 1 / (k (G - k)),

which phi = the Shapley values minimise under the efficiency constraint sum_g phi_g = v(1) - v(0).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from explainer.errors import ConfigError, ShapeError
from explainer.fills import FillKind, blend, make_fill
from explainer.losses.base import Explanation, LossTerm, Weight

Efficiency = Literal["share", "additive", "none"]


def sample_coalitions(number: int, cells: int, generator: torch.Generator, paired: bool = True) -> Tensor:
    """Random coalitions from the Shapley kernel, never empty and never full.

    Args:
        number: number of coalitions.
        cells: G >= 2.
        generator: CPU generator.
        paired: every second one is the complement of the one before it (halves the variance).

    Returns:
        ``[number,G]`` float in {0,1}, on the CPU.
    """
    if cells < 2:
        raise ConfigError(f"coalitions need at least 2 cells, received {cells}: use a grid of at least 2.")
    drawn = (number + 1) // 2 if paired else number
    sizes = torch.arange(1, cells, dtype=torch.float64)
    size = 1 + torch.multinomial(1 / (sizes * (cells - sizes)), drawn, replacement=True, generator=generator)
    rank = torch.rand(drawn, cells, generator=generator, dtype=torch.float64).argsort(dim=1).argsort(dim=1)
    chosen = (rank < size[:, None]).float()
    if not paired:
        return chosen
    return torch.stack([chosen, 1 - chosen], dim=1).flatten(0, 1)[:number]


def efficient(values: Tensor, gap: Tensor, efficiency: Efficiency = "additive") -> Tensor:
    """Attributions whose sum is the gap v(1) - v(0) that the coalitions have to explain.

    ``share``: values >= 0 are shares of the gap, phi = gap * values / sum(values) (all zero: equal shares). ``additive`` (FastSHAP, eq. 6):
    what is missing is spread evenly, phi = values + (gap - sum(values)) / G. ``none``: as they are.

    Args:
        values: ``[N,G]``.
        gap: ``[N]``.

    Returns:
        ``[N,G]``.
    """
    if efficiency == "none":
        return values
    total = values.sum(dim=1, keepdim=True)
    if efficiency == "additive":
        return values + (gap[:, None] - total) / values.shape[1]
    if efficiency == "share":
        tiny = torch.finfo(values.dtype).eps
        return gap[:, None] * (values + tiny) / (total + tiny * values.shape[1])
    raise ConfigError(f"efficiency must be one of {', '.join(get_args(Efficiency))}, received {efficiency!r}.")


def coalition_loss(attributions: Tensor, coalitions: Tensor, scores: Tensor, empty: Tensor) -> Tensor:
    """Mean squared error of the scores that the attributions predict.

    Args:
        attributions: ``[N,G]``.
        coalitions: ``[N,n,G]`` in {0,1}.
        scores: ``[N,n]``, v of each.
        empty: ``[N]``, v of no cell.

    Returns:
        Scalar >= 0.
    """
    if coalitions.ndim != 3 or coalitions.shape[::2] != attributions.shape or scores.shape != coalitions.shape[:2]:
        raise ShapeError(
            f"attributions [N,G], coalitions [N,n,G] and scores [N,n] must agree, received {tuple(attributions.shape)}, "
            f"{tuple(coalitions.shape)} and {tuple(scores.shape)}."
        )
    predicted = empty[:, None] + (coalitions * attributions[:, None]).sum(dim=2)
    return (scores - predicted).square().mean()


class Coalition(LossTerm):
    """The regression for the present classes of every image; asks the classifier ``coalitions + 2`` times an image, without gradient.

    With ``efficiency: additive`` the attribution of a cell is its mean mask logit divided by G, so masks become signed Shapley values up to
    an offset. With ``share`` a class's mask, averaged per cell, says how the class's score divides over the cells. In both the level of the
    masks is free: combine them with ``area_bound`` (which needs no classifier) and weigh smoothness little, or masks shrink to a few
    pixels. A share has no scale either.

    Args:
        weight: number or schedule.
        grid: cells a side.
        coalitions: per image and step.
        efficiency: how the values are made to add up to the gap; see :func:`efficient`.
        score: ``probability`` or ``logit``.
        fill: what replaces the cells outside the coalition.
        paired: whether each coalition comes with its complement; see :func:`sample_coalitions`.
        batch_size: most images per call of the classifier.
    """

    name = "coalition"
    needs_classifier = True

    def __init__(
        self,
        weight: Weight = 1.0,
        *,
        grid: int = 8,
        coalitions: int = 8,
        efficiency: Efficiency = "additive",
        score: Literal["probability", "logit"] = "probability",
        fill: FillKind = "mean",
        paired: bool = True,
        batch_size: int = 256,
    ) -> None:
        super().__init__(weight)
        if grid < 2 or coalitions < 1 or batch_size < 1:
            raise ConfigError(
                "losses.coalition: grid must be at least 2, coalitions and batch_size at least 1, "
                f"received {grid}, {coalitions}, {batch_size}."
            )
        if efficiency not in get_args(Efficiency):
            raise ConfigError(f"losses.coalition.efficiency must be one of {', '.join(get_args(Efficiency))}, received {efficiency!r}.")
        if score not in ("probability", "logit"):
            raise ConfigError(f"losses.coalition.score must be probability or logit, received {score!r}.")
        self.grid, self.coalitions, self.efficiency, self.score = grid, coalitions, efficiency, score
        self.fill, self.paired, self.batch_size = fill, paired, batch_size

    def value(self, e: Explanation) -> Tensor:
        """See :func:`coalition_loss`; 0 for a batch without labels."""
        image, column, label = e.present_pairs()
        if len(image) == 0:
            return e.class_masks.sum() * 0.0
        drawn = [sample_coalitions(self.coalitions, self.grid**2, g, self.paired) for g in e.generators]
        coalitions = torch.stack(drawn).to(e.images)
        scores = self._scores(e, coalitions)  # [B,n+2,K]: the coalitions, no cell, all cells
        empty, full = scores[image, -2, label], scores[image, -1, label]
        masks = e.class_masks[image, column]
        if self.efficiency == "additive":
            masks = torch.logit(masks, eps=1e-6) / self.grid**2
        cells = F.adaptive_avg_pool2d(masks.unsqueeze(1), self.grid).flatten(1)
        attributions = efficient(cells, full - empty, self.efficiency)
        return coalition_loss(attributions, coalitions[image], scores[image, : self.coalitions, label], empty)

    @torch.no_grad()
    def _scores(self, e: Explanation, coalitions: Tensor) -> Tensor:
        """``[B,n+2,K]`` scores of the coalitions ``[B,n,G]``, of the fill alone and of the whole image."""
        B, n, _ = coalitions.shape
        fill = make_fill(e.images, self.fill, mean=e.explanandum.mean, generator=e.generators).expand_as(e.images)
        keep = coalitions.view(B * n, 1, self.grid, self.grid)
        size = (e.images.shape[-2], e.images.shape[-1])
        keep = torch.cat([F.interpolate(keep, size, mode="nearest").view(B, n, *size), keep.new_zeros(B, 1, *size)], dim=1)
        keep = torch.cat([keep, torch.ones_like(keep[:, :1])], dim=1)
        rows = torch.arange(B, device=keep.device).repeat_interleave(n + 2)
        masks = keep.flatten(0, 1)
        results = []
        for part in torch.arange(len(rows), device=keep.device).split(self.batch_size):
            logits = e.explanandum(blend(e.images[rows[part]], masks[part], fill[rows[part]])).float()
            results.append(logits if self.score == "logit" else e.explanandum.probabilities(logits))
        return torch.cat(results).view(B, n + 2, -1)
