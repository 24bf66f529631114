"""Area under the ROC curve of the mask as a detector of object pixels. Shapes and void as in ``segmentation``."""

from __future__ import annotations

import torch
from torch import Tensor

from explainer.metrics.correlation import average_ranks
from explainer.metrics.facts import Facts
from explainer.metrics.ground_truth import align


@Facts("auc", higher_is_better=True, bounds=(0.0, 1.0), optimum=1.0)
def roc_auc(mask: Tensor, truth: Tensor, void: Tensor | None = None) -> Tensor:
    """Probability in [0,1] that an object pixel (``truth > 0``) has a larger value than a background pixel, ties counting one half.

    The Mann-Whitney form, so a constant mask scores exactly 0.5. NaN without object or without background pixels.
    """
    pixels = align(mask, truth, void)
    counts = pixels.weight.bool()
    positive = (pixels.truth > 0) & counts
    # Void pixels rank last and are no positives, so they change no other pixel's rank.
    ranks = average_ranks(torch.where(counts, pixels.mask, torch.full_like(pixels.mask, torch.inf)))
    n_positive = positive.sum(1).double()
    n_negative = counts.sum(1) - n_positive
    wins = (ranks * positive).sum(1) - n_positive * (n_positive + 1) / 2
    return pixels.ratio(wins + 0 * pixels.mask.sum(1), n_positive * n_negative)
