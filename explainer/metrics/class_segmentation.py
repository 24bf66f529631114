"""Semantic segmentation by class maps: which class, or background, does each pixel show?

Gur et al., AAAI 2021 (AGF), multi-label VOC protocol.
"""

from __future__ import annotations

import torch
from torch import Tensor

from explainer.errors import ShapeError
from explainer.metrics.agf_segmentation import average_precision
from explainer.metrics.facts import Facts
from explainer.metrics.preparation import divide_by_max


def class_scores_map(class_saliency: Tensor, logits: Tensor, penalty: float = 0.1) -> Tensor:
    """Scores of background (channel 0) and of the K classes at each pixel, ``[B,K+1,H,W]`` float64.

    Each class map ``[B,K,H,W]`` is divided by its maximum and clamped at 0; classes that the classifier does not predict (``logits``
    ``[B,K]`` with sigmoid <= 0.5) lose ``penalty``; background scores 0.
    """
    if class_saliency.ndim != 4 or class_saliency.shape[:2] != logits.shape:
        raise ShapeError(f"class maps are {tuple(class_saliency.shape)}, expected (B,K,H,W) with logits (B,K) = {tuple(logits.shape)}.")
    scores = divide_by_max(class_saliency.double()).clamp(min=0)
    scores = scores - penalty * (logits <= 0)[:, :, None, None].double()
    return torch.cat([torch.zeros_like(scores[:, :1]), scores], dim=1)


def segment_classes(scores: Tensor) -> Tensor:
    """Label of each pixel, ``[B,K+1,H,W] -> [B,H,W]`` long: 0 background, k+1 class k; background wins ties."""
    best = scores[:, 1:].amax(1)
    return torch.where(best > scores[:, 0], scores[:, 1:].argmax(1) + 1, torch.zeros_like(best, dtype=torch.long))


@Facts("class_pixel_accuracy", higher_is_better=True, bounds=(0.0, 1.0), optimum=1.0)
def class_pixel_accuracy(class_saliency: Tensor, logits: Tensor, class_truth: Tensor, void: Tensor | None = None) -> Tensor:
    """Share of pixels whose label is true, ``[B]`` in [0,1]; ``class_truth`` ``[B,K,H,W]``, where no class is true background is."""
    scores = class_scores_map(class_saliency, logits)
    right = _with_background(class_truth).gather(1, segment_classes(scores)[:, None])[:, 0].double()
    counts = torch.ones_like(right) if void is None else (~void.bool()).to(right)
    unknown = (scores.isnan().any(1) & (counts > 0)).flatten(1).any(1)
    return ((right * counts).sum((1, 2)) / counts.sum((1, 2))).masked_fill(unknown, torch.nan)


@Facts("class_mean_average_precision", higher_is_better=True, bounds=(0.0, 1.0), optimum=1.0)
def class_mean_average_precision(class_saliency: Tensor, logits: Tensor, class_truth: Tensor, void: Tensor | None = None) -> Tensor:
    """Average precision over all (pixel, channel) pairs of the softmax over channels, ``[B]`` in [0,1].

    Even the ground truth as map stays below 1 when several classes are predicted: where all maps are 0, they tie with the background.
    """
    scores = class_scores_map(class_saliency, logits).softmax(1)
    counts = torch.ones_like(scores, dtype=torch.bool) if void is None else (~void.bool())[:, None].expand_as(scores)
    return average_precision(scores.flatten(1), _with_background(class_truth).flatten(1).double(), counts.flatten(1))


def _with_background(class_truth: Tensor) -> Tensor:
    present = class_truth > 0
    return torch.cat([~present.any(1, keepdim=True), present], dim=1)
