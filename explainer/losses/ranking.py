"""Ranked evidence: the masks' order of pixels is trained on insertion and deletion themselves.

Let S be a class's mask logits and M_a(S) in {0,1}^{HxW} the mask of the share a of the pixels with the largest logits. With b the fill of
insertion, d that of deletion and p the class's probability, the areas under the two curves of Petsiuk et al. (BMVC 2018) are

    ins = E_a p(M_a x + (1 - M_a) b),   del = E_a p((1 - M_a) x + M_a d),   a ~ U(0,1),   L = 1 - ins + del,  in [0,2].

A step draws one class of each image and some areas: an unbiased estimate of L. M_a is piecewise constant in S; its gradient is one of two:

- ``straight_through``: forward M_a, backward that of m_a = sigmoid((S - t(a)) / tau) with t(a) such that mean(m_a) = a
  (:mod:`explainer.models.area_conditioned`). t follows S, so that the logits near it are moved against each other and a common offset is
  not: the term sorts, and leaves it to the other losses where the masks cross 0.5.
- ``perturbation``, from scores alone: of the smoothed E_z L(S + sigma z) by antithetic pairs (Salimans et al. 2017, section 2),
  z (L(S + sigma z) - L(S - sigma z)) / (2 sigma), where z is standard normal noise on a coarse grid, enlarged.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from explainer.errors import ConfigError, ShapeError
from explainer.fills import FillKind, blend, make_fill
from explainer.losses.base import Explanation, LossTerm, Weight
from explainer.models.area_conditioned import area_masks, top_pixels

Gradient = Literal["auto", "straight_through", "perturbation"]


def straight_through(logits: Tensor, area: Tensor, temperature: float = 1.0) -> Tensor:
    """Binary masks of the highest pixels, with the gradient of soft masks of the same area.

    Args:
        logits: ``[N,H,W]``.
        area: shares of the image in (0,1), ``[N]``.
        temperature: tau > 0, in units of the logits: how far from the threshold a pixel still has a gradient.

    Returns:
        ``[N,H,W]`` in {0,1}; ``round(area * H * W)`` pixels, at least one, are 1.
    """
    if logits.ndim != 3 or area.shape != logits.shape[:1]:
        raise ShapeError(f"logits must be [N,H,W] and area [N], received {tuple(logits.shape)} and {tuple(area.shape)}.")
    hard = top_pixels(logits[:, None], area)[:, 0]
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return hard
    soft = area_masks(logits[:, None], area, temperature)[:, 0]
    return hard + (soft - soft.detach())


def ranking_loss(inserted: Tensor, deleted: Tensor) -> Tensor:
    """``1 - p_inserted + p_deleted``, of any shape; 0 where the kept pixels say all and the rest nothing, 2 where it is the other way."""
    return 1 - inserted + deleted


class Ranking(LossTerm):
    """Expected deletion minus insertion of one present class of every image, over random areas.

    Shows the classifier ``2 * draws`` images for every image of the batch, with the gradient ``perturbation`` three times as many (in
    validation ``2 * draws``). It orders pixels and does not say where a mask ends: combine it with terms that do.

    Args:
        weight: number or schedule.
        draws: areas per image and step, one in each of as many equal parts of (0,1).
        temperature: see :func:`straight_through`.
        gradient: ``straight_through``, ``perturbation``, or ``auto``: the first where the classifier has gradients.
        sigma: standard deviation of the perturbations, in units of the logits.
        grid: cells a side of the perturbations.
        insertion_fill, deletion_fill: what stands where the image does not; by default those of the protocol ``insertion_deletion``.
    """

    name = "ranking"
    needs_classifier = True
    ranks = True

    def __init__(
        self,
        weight: Weight = 1.0,
        *,
        draws: int = 1,
        temperature: float = 1.0,
        gradient: Gradient = "auto",
        sigma: float = 1.0,
        grid: int = 8,
        insertion_fill: FillKind = "blur",
        deletion_fill: FillKind = "mean",
    ) -> None:
        super().__init__(weight)
        if draws < 1 or grid < 1:
            raise ConfigError(f"losses.ranking: draws and grid must be at least 1, received {draws} and {grid}.")
        if not (temperature > 0 and sigma > 0):
            raise ConfigError(f"losses.ranking: temperature and sigma must be positive, received {temperature} and {sigma}.")
        if gradient not in get_args(Gradient):
            raise ConfigError(f"losses.ranking.gradient must be one of {', '.join(get_args(Gradient))}, received {gradient!r}.")
        self.draws, self.temperature, self.gradient, self.sigma, self.grid = draws, temperature, gradient, sigma, grid
        self.insertion_fill, self.deletion_fill = insertion_fill, deletion_fill

    def value(self, e: Explanation) -> Tensor:
        """Scalar in [0,2]; 0 for a batch without labels."""
        rows = (e.present > 0.5).any(dim=1).nonzero()[:, 0]
        if len(rows) == 0:
            return e.class_masks.sum() * 0.0
        generators = [e.generators[i] for i in rows.tolist()]
        part = torch.arange(self.draws)
        area = torch.stack([(part + torch.rand(self.draws, generator=g)) / self.draws for g in generators], dim=1)  # [draws,N]
        present = e.present[rows].float().cpu()
        column = torch.cat([torch.multinomial(p, 1, generator=g) for p, g in zip(present, generators, strict=True)]).to(rows.device)
        label = column if e.classes is None else e.classes[rows, column]
        logits = e.ranked(rows, column)
        pixels = logits[0].numel()
        area = area.to(logits).clamp(0.5 / pixels, 1 - 0.5 / pixels)
        fills = [make_fill(e.images, kind, e.explanandum.mean, e.generators) for kind in (self.insertion_fill, self.deletion_fill)]
        inserted, deleted = (fill.expand_as(e.images)[rows] for fill in fills)

        def loss(masks: Tensor) -> Tensor:
            """``[draws,N]`` for masks ``[draws,N,H,W]``."""
            flat, images = masks.flatten(0, 1), e.images[rows].repeat(self.draws, 1, 1, 1)
            shown = [blend(images, m, f.repeat(self.draws, 1, 1, 1)) for m, f in ((flat, inserted), (1 - flat, deleted))]
            seen = e.explanandum.probabilities(e.explanandum(torch.cat(shown)).float())
            chosen = seen.gather(1, label.repeat(2 * self.draws)[:, None])[:, 0]
            return ranking_loss(*chosen.view(2, self.draws, -1))

        def ranked(scores: Tensor) -> Tensor:
            """``[draws,N,H,W]``, cut from ``[N,H,W]``."""
            flat = straight_through(scores.repeat(self.draws, 1, 1), area.flatten(), self.temperature)
            return flat.view(self.draws, *scores.shape)

        if self._differentiates(e):
            return loss(ranked(logits)).mean()
        with torch.no_grad():
            value = loss(ranked(logits)).mean()
        if not (torch.is_grad_enabled() and logits.requires_grad):
            return value
        with torch.no_grad():
            noise = torch.stack([torch.randn(1, self.grid, self.grid, generator=g) for g in generators]).to(logits)
            noise = F.interpolate(noise, logits.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
            higher, lower = (loss(ranked(logits + sign * self.sigma * noise)).mean(dim=0) for sign in (1, -1))
            slope = (higher - lower)[:, None, None] / (2 * self.sigma) * noise
        surrogate = (slope * logits).sum() / len(rows)
        return value + (surrogate - surrogate.detach())

    def _differentiates(self, e: Explanation) -> bool:
        if self.gradient == "straight_through" and not e.explanandum.differentiable:
            raise ConfigError(
                "losses.ranking.gradient: straight_through backpropagates through the classifier, and this classifier gives scores only: "
                "use perturbation (or auto)."
            )
        return self.gradient == "straight_through" or (self.gradient == "auto" and bool(e.explanandum.differentiable))
