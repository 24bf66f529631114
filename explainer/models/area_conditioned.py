"""Masks of any wanted area from one Explainer: nested, monotone in the area by construction.

The network's mask logits S of a class order the pixels. The mask of area a is

    m_a = sigmoid((S - t(a)) / tau),      t(a) such that mean(m_a) = a,

which exists and is unique, because the mean falls strictly from 1 to 0 as t rises. A larger area means a smaller t, so m_a <= m_b in every
pixel for a <= b. Extremal perturbations (Fong, Patrick & Vedaldi 2019) search each of these masks by optimisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from explainer.errors import ConfigError, ShapeError
from explainer.fills import FillKind, blend, make_fill

_BISECTIONS = 40


def area_threshold(logits: Tensor, area: Tensor, temperature: float = 1.0) -> Tensor:
    """The t with ``mean(sigmoid((logits - t) / temperature)) = area``, ``[...]`` for logits ``[...,H,W]`` and areas ``[...]`` in (0,1).

    Found by bisection; its gradient is that of the implicit function, so that a pixel's logit rises at the cost of the others'.
    """
    flat, wanted = logits.detach().flatten(-2), area.detach()
    # At these two the mean is at most, and at least, the wanted area, because it is so in every pixel.
    reach = temperature * torch.logit(wanted.clamp(1e-6, 1 - 1e-6))
    low, high = flat.amin(-1) - reach, flat.amax(-1) - reach
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        too_large = torch.sigmoid((flat - middle[..., None]) / temperature).mean(-1) > wanted
        low, high = torch.where(too_large, middle, low), torch.where(too_large, high, middle)
    root = (low + high) / 2
    mask = torch.sigmoid((logits.flatten(-2) - root[..., None]) / temperature)
    slope = (mask * (1 - mask)).mean(-1).detach() / temperature
    mean = mask.mean(-1)
    # Worth the root, with the slope of a Newton step from it.
    return root + (mean - mean.detach() - (area - area.detach())) / slope.clamp_min(torch.finfo(logits.dtype).tiny)


def area_masks(logits: Tensor, area: Tensor | float, temperature: float = 1.0) -> Tensor:
    """Soft masks whose mean is the wanted area.

    Args:
        logits: ``[B,K,H,W]``.
        area: shares of the image in (0,1): one number, ``[B]`` or ``[B,K]``.
        temperature: tau > 0; the smaller, the harder the masks.

    Returns:
        ``[B,K,H,W]`` in [0,1], in every pixel non-decreasing in the area.
    """
    wanted = _areas(logits, area)
    if not temperature > 0:
        raise ConfigError(f"temperature must be positive, received {temperature}.")
    return torch.sigmoid((logits - area_threshold(logits, wanted, temperature)[..., None, None]) / temperature)


def top_pixels(logits: Tensor, area: Tensor | float) -> Tensor:
    """Binary masks of the ``round(area * H * W)`` (at least one) highest pixels; ties go to the first in row-major order, so that the
    masks of two areas are nested.

    Args:
        logits: ``[B,K,H,W]``.
        area: share of the image; see :func:`area_masks`.
    """
    wanted = _areas(logits, area)
    pixels = logits.shape[-2] * logits.shape[-1]
    number = (wanted * pixels).round().clamp(1, pixels)
    rank = logits.flatten(-2).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (rank < number[..., None]).to(logits.dtype).view_as(logits)


def _areas(logits: Tensor, area: Tensor | float) -> Tensor:
    if logits.ndim != 4:
        raise ShapeError(f"logits must be [B,K,H,W], received {tuple(logits.shape)}.")
    wanted = torch.as_tensor(area, dtype=logits.dtype, device=logits.device)
    if wanted.ndim == 1:
        wanted = wanted[:, None]
    if wanted.ndim > 2 or (wanted.ndim == 2 and (len(wanted) != len(logits) or wanted.shape[1] not in (1, logits.shape[1]))):
        raise ShapeError(f"area must be one number, [B] or [B,K] for logits {tuple(logits.shape)}, received {tuple(wanted.shape)}.")
    if bool((wanted <= 0).any()) or bool((wanted >= 1).any()):
        raise ConfigError(f"area must lie in (0,1), received {wanted.flatten().tolist()[:5]}.")
    return wanted.expand(logits.shape[:2])


class AreaConditioned(nn.Module):
    """An Explainer with the wanted area as a second, optional input.

    Any trained Explainer can be wrapped; train with ``masking.area_conditioned`` for one whose order of pixels is right at every area.

    Args:
        net: :class:`~explainer.models.explainer.Explainer` (or any module with ``logits(images)`` and ``num_classes``).
        temperature: softness of the cut; see :func:`area_masks`; None: the one it was trained with (``net.metadata["area_temperature"]``, 1
            where that is not known).
    """

    def __init__(self, net: Any, temperature: float | None = None) -> None:
        super().__init__()
        if temperature is None:
            temperature = getattr(net, "metadata", {}).get("area_temperature", 1.0)
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not temperature > 0:
            raise ConfigError(f"temperature must be a positive number, received {temperature!r}.")
        self.net, self.temperature = net, float(temperature)
        self.num_classes: int = net.num_classes
        self.class_names: tuple[str, ...] = tuple(getattr(net, "class_names", ()))

    def forward(self, images: Tensor, area: Tensor | float | None = None, hard: bool = False) -> Tensor:
        """Class masks ``[B,K,H,W]`` in [0,1].

        Args:
            images: ``[B,3,H,W]`` in [0,1].
            area: one number, ``[B]`` or ``[B,K]``; None: the Explainer's own masks.
            hard: binary masks of exactly this many pixels.
        """
        if area is None:
            masks: Tensor = self.net(images)
            return masks
        logits = self.net.logits(images)
        return top_pixels(logits, area) if hard else area_masks(logits, area, self.temperature)

    @torch.no_grad()
    def smallest_sufficient(
        self,
        explanandum: Any,
        images: Tensor,
        class_index: Tensor,
        areas: Sequence[float] = (0.025, 0.05, 0.1, 0.2, 0.4),
        *,
        share: float = 1.0,
        fill: FillKind = "mean",
    ) -> tuple[Tensor, Tensor]:
        """The smallest of the areas whose mask keeps ``share`` of the image's own probability (Fong et al. 2019, eq. 5).

        Args:
            explanandum: the classifier; asked ``areas + 1`` times an image.
            images: ``[B,3,H,W]``.
            class_index: ``[B]``.
            areas: candidates.
            share: share of the probability on the whole image, in (0,1].
            fill: what is shown outside the mask.

        Returns:
            ``(area [B], mask [B,H,W])``; where no area suffices, NaN and the mask of the largest.
        """
        rows = torch.arange(len(images), device=images.device)

        def score(shown: Tensor) -> Tensor:
            probabilities: Tensor = explanandum.probabilities(explanandum(shown))[rows, class_index]
            return probabilities

        wanted = share * score(images)
        hidden = make_fill(images, fill, mean=explanandum.mean, generator=torch.Generator().manual_seed(0))
        logits = self.net.logits(images)[rows, class_index].unsqueeze(1)
        best = wanted.new_full(wanted.shape, torch.nan)
        mask: Tensor | None = None
        for area in sorted(areas, reverse=True):
            candidate = area_masks(logits, area, self.temperature)[:, 0]
            mask = candidate if mask is None else mask
            enough = score(blend(images, candidate, hidden)) >= wanted
            best = torch.where(enough, area, best)
            mask = torch.where(enough[:, None, None], candidate, mask)
        if mask is None:
            raise ConfigError("areas is empty: name at least one share of the image in (0,1).")
        return best, mask
