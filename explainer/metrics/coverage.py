"""How much of the object and of the background a mask covers, and two similarity ratios. Shapes and void as in ``segmentation``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from explainer.metrics.facts import Facts
from explainer.metrics.ground_truth import align


@Facts("object_coverage", higher_is_better=True, bounds=(0.0, 1.0), optimum=1.0)
def object_coverage(mask: Tensor, truth: Tensor, void: Tensor | None = None, empty: float = math.nan) -> Tensor:
    """``sum min(m,g) / sum g`` in [0,1]: share of the object that the mask keeps; ``empty`` without an object (the public code: 0)."""
    pixels = align(mask, truth, void)
    return pixels.ratio(torch.minimum(pixels.mask, pixels.truth).sum(1), pixels.truth.sum(1), empty)


@Facts("background_coverage", higher_is_better=False, bounds=(0.0, 1.0), optimum=0.0)
def background_coverage(mask: Tensor, truth: Tensor, void: Tensor | None = None, empty: float = math.nan) -> Tensor:
    """``sum max(m-g,0) / sum (1-g)`` in [0,1]: share of the background kept; ``empty`` without background (the public code: 0)."""
    pixels = align(mask, truth, void)
    background = (pixels.weight * (1 - pixels.truth)).sum(1)
    return pixels.ratio((pixels.mask - pixels.truth).clamp(min=0).sum(1), background, empty)


@Facts("overlap", higher_is_better=True, bounds=(0.0, 1.0), optimum=1.0)
def overlap(mask: Tensor, truth: Tensor, void: Tensor | None = None) -> Tensor:
    """``1 - mean|m-g|`` in [0,1]."""
    pixels = align(mask, truth, void)
    return 1 - pixels.mean((pixels.mask - pixels.truth).abs())


@Facts("sim_ratio", higher_is_better=True, bounds=(0.0, 1.0), optimum=1.0)
def similarity_ratio(mask: Tensor, truth: Tensor, void: Tensor | None = None, empty: float = math.nan) -> Tensor:
    """Tanimoto ratio ``sum m g / sum (m^2 + g^2 - m g)`` in [0,1]; ``empty`` when both are empty."""
    pixels = align(mask, truth, void)
    product = pixels.mask * pixels.truth
    return pixels.ratio(product.sum(1), (pixels.mask.square() + pixels.truth.square() - product).sum(1), empty)
