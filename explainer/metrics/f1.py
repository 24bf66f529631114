"""F1 of a mask against the ground truth: soft, at a threshold, and over thresholds. Shapes and void as in ``segmentation``.

The positive class only (the paper's code says "macro" in its docstring and computes this).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from explainer.metrics.facts import Facts
from explainer.metrics.ground_truth import THRESHOLDS, Pixels, align


@Facts("soft_f1", higher_is_better=True, bounds=(0.0, 1.0), optimum=1.0)
def soft_f1(mask: Tensor, truth: Tensor, void: Tensor | None = None, empty: float = math.nan) -> Tensor:
    """``2 sum m g / (sum m + sum g)`` in [0,1]; ``empty`` when mask and ground truth are both empty."""
    return _f1(align(mask, truth, void), empty)


@Facts("f1", higher_is_better=True, bounds=(0.0, 1.0), optimum=1.0)
def f1(mask: Tensor, truth: Tensor, void: Tensor | None = None, threshold: float = 0.5, empty: float = math.nan) -> Tensor:
    """F1 of the pixels strictly above ``threshold``, ``[B]`` in [0,1]."""
    return _f1(align(mask, truth, void).above(threshold), empty)


@Facts("f1_curve", higher_is_better=True, bounds=(0.0, 1.0), optimum=1.0, columns="thresholds")
def f1_curve(
    mask: Tensor, truth: Tensor, void: Tensor | None = None, thresholds: Sequence[float] = THRESHOLDS, empty: float = math.nan
) -> Tensor:
    """:func:`f1` at each threshold, ``[B,T]`` in [0,1]."""
    pixels = align(mask, truth, void)
    both, either = pixels.counts_above(thresholds)
    return torch.stack([pixels.ratio(2 * b, b + e, empty) for b, e in zip(both.unbind(1), either.unbind(1), strict=True)], dim=1)


def _f1(pixels: Pixels, empty: float) -> Tensor:
    return pixels.ratio(2 * (pixels.mask * pixels.truth).sum(1), pixels.mask.sum(1) + pixels.truth.sum(1), empty)
