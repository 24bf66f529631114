"""Agreement of a mask with the ground truth: soft accuracy, IoU (soft and at thresholds) and mean absolute error.

Stalder et al., NeurIPS 2022, Table 2. ``mask`` and ``truth`` are ``[B,H,W]`` in [0,1]; ``void`` ``[B,H,W]`` marks pixels that do
not count. The functions return ``[B]`` float64, NaN where every pixel is void or the mask is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from explainer.metrics.facts import Facts
from explainer.metrics.ground_truth import THRESHOLDS, Pixels, align


@Facts("soft_accuracy", higher_is_better=True, bounds=(0.0, 1.0), optimum=1.0)
def soft_accuracy(mask: Tensor, truth: Tensor, void: Tensor | None = None) -> Tensor:
    """``mean(m g + (1-m)(1-g))`` in [0,1]."""
    pixels = align(mask, truth, void)
    m, g = pixels.mask, pixels.truth
    return pixels.mean(m * g + (1 - m) * (1 - g))


@Facts("mae", higher_is_better=False, bounds=(0.0, 1.0), optimum=0.0)
def mean_absolute_error(mask: Tensor, truth: Tensor, void: Tensor | None = None) -> Tensor:
    """``mean|m - g|`` in [0,1]; equals ``1 - soft_accuracy`` when the ground truth is binary."""
    pixels = align(mask, truth, void)
    return pixels.mean((pixels.mask - pixels.truth).abs())


@Facts("soft_iou", higher_is_better=True, bounds=(0.0, 1.0), optimum=1.0)
def soft_iou(mask: Tensor, truth: Tensor, void: Tensor | None = None, empty: float = math.nan) -> Tensor:
    """``sum min(m,g) / sum max(m,g)`` in [0,1]; ``empty`` when mask and ground truth are both empty (the public code: 0)."""
    return _iou(align(mask, truth, void), empty)


@Facts("iou", higher_is_better=True, bounds=(0.0, 1.0), optimum=1.0)
def iou(mask: Tensor, truth: Tensor, void: Tensor | None = None, threshold: float = 0.5, empty: float = math.nan) -> Tensor:
    """Intersection over union of the pixels strictly above ``threshold``, ``[B]`` in [0,1]."""
    return _iou(align(mask, truth, void).above(threshold), empty)


@Facts("iou_curve", higher_is_better=True, bounds=(0.0, 1.0), optimum=1.0, columns="thresholds")
def iou_curve(
    mask: Tensor, truth: Tensor, void: Tensor | None = None, thresholds: Sequence[float] = THRESHOLDS, empty: float = math.nan
) -> Tensor:
    """:func:`iou` at each threshold, ``[B,T]`` in [0,1]."""
    pixels = align(mask, truth, void)
    both, either = pixels.counts_above(thresholds)
    return torch.stack([pixels.ratio(b, e, empty) for b, e in zip(both.unbind(1), either.unbind(1), strict=True)], dim=1)


def _iou(pixels: Pixels, empty: float) -> Tensor:
    union = torch.maximum(pixels.mask, pixels.truth).sum(1)
    return pixels.ratio(torch.minimum(pixels.mask, pixels.truth).sum(1), union, empty)
