"""Grey share: how undecided a mask is."""

from __future__ import annotations

import torch
from torch import Tensor

from explainer.metrics.facts import Facts
from explainer.metrics.ground_truth import align


@Facts("grey_share", higher_is_better=False, bounds=(0.0, 1.0), optimum=0.0)
def grey_share(mask: Tensor, void: Tensor | None = None, low: float = 0.1, high: float = 0.9) -> Tensor:
    """Share of the pixels whose value lies in ``[low, high]`` (bounds included), ``[B]`` in [0,1]; NaN if the mask holds a NaN."""
    pixels = align(mask, torch.zeros_like(mask), void)
    # Compared in the mask's own precision: a float32 0.1 is meant to equal 0.1.
    grey = align(((mask >= low) & (mask <= high)).double(), torch.zeros_like(mask), void).mask
    return pixels.mean(grey + 0 * pixels.mask)
