"""Agreement of a mask with the ground truth: soft accuracy, IoU (soft and at thresholds) and mean absolute error.

Stalder et al., NeurIPS 2022, Table 2. ``mask`` and ``truth`` are ``[B,H,W]`` in [0,1]; ``void`` ``[B,H,W]`` marks pixels that do
not count. The functions return ``[B]`` float64, NaN where every pixel is void or the mask is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from explainer.metrics.base import PerImageMetric
from explainer.metrics.ground_truth import THRESHOLDS, Pixels, align


def soft_accuracy(mask: Tensor, truth: Tensor, void: Tensor | None = None) -> Tensor:
    """``mean(m g + (1-m)(1-g))`` in [0,1]."""
    pixels = align(mask, truth, void)
    m, g = pixels.mask, pixels.truth
    return pixels.mean(m * g + (1 - m) * (1 - g))


def mean_absolute_error(mask: Tensor, truth: Tensor, void: Tensor | None = None) -> Tensor:
    """``mean|m - g|`` in [0,1]; equals ``1 - soft_accuracy`` when the ground truth is binary."""
    pixels = align(mask, truth, void)
    return pixels.mean((pixels.mask - pixels.truth).abs())


def soft_iou(mask: Tensor, truth: Tensor, void: Tensor | None = None, empty: float = math.nan) -> Tensor:
    """``sum min(m,g) / sum max(m,g)`` in [0,1]; ``empty`` when mask and ground truth are both empty (the public code: 0)."""
    return _iou(align(mask, truth, void), empty)


def iou(mask: Tensor, truth: Tensor, void: Tensor | None = None, threshold: float = 0.5, empty: float = math.nan) -> Tensor:
    """Intersection over union of the pixels strictly above ``threshold``."""
    return _iou(align(mask, truth, void).above(threshold), empty)


def iou_curve(
    mask: Tensor, truth: Tensor, void: Tensor | None = None, thresholds: Sequence[float] = THRESHOLDS, empty: float = math.nan
) -> Tensor:
    """:func:`iou` at each threshold, ``[B,T]``."""
    pixels = align(mask, truth, void)
    return torch.stack([_iou(pixels.above(t), empty) for t in thresholds], dim=1)


def _iou(pixels: Pixels, empty: float) -> Tensor:
    union = torch.maximum(pixels.mask, pixels.truth).sum(1)
    return pixels.ratio(torch.minimum(pixels.mask, pixels.truth).sum(1), union, empty)


class SoftAccuracy(PerImageMetric):
    """Mean :func:`soft_accuracy` ("Acc"). Range [0,1], optimum 1."""

    name = "soft_accuracy"
    higher_is_better = True
    bounds = (0.0, 1.0)
    optimum = 1.0

    def values(self, mask: Tensor, truth: Tensor, void: Tensor | None = None) -> Tensor:
        """See :func:`soft_accuracy`."""
        return soft_accuracy(mask, truth, void)


class MeanAbsoluteError(PerImageMetric):
    """Mean :func:`mean_absolute_error` ("MAE"). Range [0,1], optimum 0."""

    name = "mae"
    higher_is_better = False
    bounds = (0.0, 1.0)
    optimum = 0.0

    def values(self, mask: Tensor, truth: Tensor, void: Tensor | None = None) -> Tensor:
        """See :func:`mean_absolute_error`."""
        return mean_absolute_error(mask, truth, void)


class SoftIoU(PerImageMetric):
    """Mean :func:`soft_iou`. Range [0,1], optimum 1."""

    name = "soft_iou"
    higher_is_better = True
    bounds = (0.0, 1.0)
    optimum = 1.0

    def values(self, mask: Tensor, truth: Tensor, void: Tensor | None = None) -> Tensor:
        """See :func:`soft_iou`."""
        return soft_iou(mask, truth, void)


class ThresholdedIoU(PerImageMetric):
    """Mean :func:`iou` at one threshold. Range [0,1], optimum 1."""

    name = "iou"
    higher_is_better = True
    bounds = (0.0, 1.0)
    optimum = 1.0

    def __init__(self, threshold: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = threshold

    def values(self, mask: Tensor, truth: Tensor, void: Tensor | None = None) -> Tensor:
        """See :func:`iou`."""
        return iou(mask, truth, void, self.threshold)


class IoUCurve(PerImageMetric):
    """Mean :func:`iou_curve`, one value per threshold ``[T]``. Range [0,1], optimum 1."""

    name = "iou_curve"
    higher_is_better = True
    bounds = (0.0, 1.0)
    optimum = 1.0

    def __init__(self, thresholds: Sequence[float] = THRESHOLDS, **kwargs: Any) -> None:
        super().__init__(columns=len(thresholds), **kwargs)
        self.thresholds = tuple(thresholds)

    def values(self, mask: Tensor, truth: Tensor, void: Tensor | None = None) -> Tensor:
        """See :func:`iou_curve`."""
        return iou_curve(mask, truth, void, self.thresholds)
