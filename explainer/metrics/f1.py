"""F1 of a mask against the ground truth: soft, at a threshold, and over thresholds. Shapes and void as in ``segmentation``.

The positive class only (the paper's code says "macro" in its docstring and computes this).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from explainer.metrics.base import PerImageMetric
from explainer.metrics.ground_truth import THRESHOLDS, Pixels, align


def soft_f1(mask: Tensor, truth: Tensor, void: Tensor | None = None, empty: float = math.nan) -> Tensor:
    """``2 sum m g / (sum m + sum g)`` in [0,1]; ``empty`` when mask and ground truth are both empty."""
    return _f1(align(mask, truth, void), empty)


def f1(mask: Tensor, truth: Tensor, void: Tensor | None = None, threshold: float = 0.5, empty: float = math.nan) -> Tensor:
    """F1 of the pixels strictly above ``threshold``."""
    return _f1(align(mask, truth, void).above(threshold), empty)


def f1_curve(
    mask: Tensor, truth: Tensor, void: Tensor | None = None, thresholds: Sequence[float] = THRESHOLDS, empty: float = math.nan
) -> Tensor:
    """:func:`f1` at each threshold, ``[B,T]``."""
    pixels = align(mask, truth, void)
    return torch.stack([_f1(pixels.above(t), empty) for t in thresholds], dim=1)


def _f1(pixels: Pixels, empty: float) -> Tensor:
    return pixels.ratio(2 * (pixels.mask * pixels.truth).sum(1), pixels.mask.sum(1) + pixels.truth.sum(1), empty)


class SoftF1(PerImageMetric):
    """Mean :func:`soft_f1`. Range [0,1], optimum 1."""

    name = "soft_f1"
    higher_is_better = True
    bounds = (0.0, 1.0)
    optimum = 1.0

    def values(self, mask: Tensor, truth: Tensor, void: Tensor | None = None) -> Tensor:
        """See :func:`soft_f1`."""
        return soft_f1(mask, truth, void)


class DiscreteF1(PerImageMetric):
    """Mean :func:`f1` at one threshold. Range [0,1], optimum 1."""

    name = "f1"
    higher_is_better = True
    bounds = (0.0, 1.0)
    optimum = 1.0

    def __init__(self, threshold: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = threshold

    def values(self, mask: Tensor, truth: Tensor, void: Tensor | None = None) -> Tensor:
        """See :func:`f1`."""
        return f1(mask, truth, void, self.threshold)


class F1Curve(PerImageMetric):
    """Mean :func:`f1_curve`, one value per threshold ``[T]``. Range [0,1], optimum 1."""

    name = "f1_curve"
    higher_is_better = True
    bounds = (0.0, 1.0)
    optimum = 1.0

    def __init__(self, thresholds: Sequence[float] = THRESHOLDS, **kwargs: Any) -> None:
        super().__init__(columns=len(thresholds), **kwargs)
        self.thresholds = tuple(thresholds)

    def values(self, mask: Tensor, truth: Tensor, void: Tensor | None = None) -> Tensor:
        """See :func:`f1_curve`."""
        return f1_curve(mask, truth, void, self.thresholds)
