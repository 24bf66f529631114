"""Segmentation of the AGF protocol: pixel accuracy and mean average precision. Gur et al., AAAI 2021, Table 3.

Signed maps are segmented at 0, positive-only maps at their mean over the image (strictly above is object).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from explainer.errors import ConfigError
from explainer.metrics.correlation import tie_groups
from explainer.metrics.facts import Facts
from explainer.metrics.ground_truth import Pixels, align
from explainer.metrics.preparation import divide_by_max_abs


def segment(saliency: Tensor, signed: bool) -> Tensor:
    """The object that a map ``[B,H,W]`` shows, float64 in {0,1}; NaN for a map with NaN. A constant positive-only map shows none."""
    values = saliency.double()
    threshold = 0.0 if signed else values.mean(dim=(1, 2), keepdim=True)
    # The mean of equal numbers can lie a rounding below them.
    constant = (values == values[:, :1, :1]).all(2, keepdim=True).all(1, keepdim=True)
    found = (values > threshold) & (~constant if not signed else torch.ones_like(constant))
    unknown = values.isnan().flatten(1).any(1)
    return found.double().masked_fill(unknown[:, None, None], torch.nan)


@Facts("pixel_accuracy", higher_is_better=True, bounds=(0.0, 1.0), optimum=1.0)
def pixel_accuracy(saliency: Tensor, truth: Tensor, void: Tensor | None = None, signed: bool = False) -> Tensor:
    """Share of pixels on which segment and ground truth (``> 0``) agree, ``[B]`` in [0,1]."""
    pixels = align(segment(saliency, signed), truth > 0, void)
    return pixels.mean(1 - (pixels.mask - pixels.truth).abs())


def average_precision(scores: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """``sum_n (R_n - R_(n-1)) P_n`` over the distinct scores of each row ``[B,N]``, ties taken together; NaN without positives.

    ``weight``: 0 leaves an entry out.
    """
    counted = torch.ones_like(labels, dtype=torch.bool) if weight is None else weight.bool()
    ordered, order = torch.where(counted, scores.double(), -torch.inf).sort(dim=1, descending=True)
    positive = ((labels > 0) & counted).gather(1, order).double()
    seen = counted.gather(1, order).double().cumsum(1)
    _, end = tie_groups(ordered)
    precision = (positive.cumsum(1) / seen.clamp(min=1)).gather(1, end)
    value = (positive * precision).sum(1) / positive.sum(1)
    return value.masked_fill((scores.isnan() & counted).any(1), torch.nan)


@Facts("mean_average_precision", higher_is_better=True, bounds=(0.0, 1.0), optimum=1.0)
def mean_average_precision(
    saliency: Tensor, truth: Tensor, void: Tensor | None = None, signed: bool = False, scores: Literal["segment", "saliency"] = "segment"
) -> Tensor:
    """Average precision over object and background pixels together, ``[B]`` in [0,1].

    Each pixel gives two predictions, "object" and "background", and two labels, one of them true; AP runs over all 2N (micro average).

    Args:
        saliency: ``[B,H,W]``.
        truth: ``[B,H,W]``, object pixels > 0.
        void: pixels left out.
        signed: how the map is segmented.
        scores: ``segment`` (the binary segment and its complement, as the public code does) or ``saliency`` (the map divided by its largest
            absolute value, and its negative).
    """
    if scores not in ("segment", "saliency"):
        raise ConfigError(f"scores must be 'segment' or 'saliency', received {scores!r}.")
    found = segment(saliency, signed) if scores == "segment" else divide_by_max_abs(saliency.double())
    pixels: Pixels = align(found, truth > 0, void)
    background = 1 - pixels.mask if scores == "segment" else -pixels.mask
    labels = torch.cat([pixels.truth, 1 - pixels.truth], 1)
    return average_precision(torch.cat([pixels.mask, background], 1), labels, torch.cat([pixels.weight, pixels.weight], 1))
