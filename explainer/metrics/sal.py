"""The saliency metric: small masks that keep the class score. Dabkowski & Gal, NeurIPS 2017, as in Stalder et al., 2022, eq. 9."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from explainer.fills import FillKind
from explainer.metrics.classifier import Classifier, Output, class_outputs, masked
from explainer.metrics.facts import Facts


def saliency_metric(mask: Tensor, probabilities: Tensor, targets: Tensor, min_area: float = 0.05) -> Tensor:
    """``log max(mean m, min_area) - log sum_{c in Y} p_c``, per image.

    Args:
        mask: ``[B,H,W]`` in [0,1].
        probabilities: ``[B,K]`` of the masked image; a sum below 1e-12 counts as 1e-12, so the value stays finite.
        targets: ``[B,K]`` multi-hot.
        min_area: areas below it earn nothing.

    Returns:
        ``[B]`` float64; smaller is better; NaN for an image without labels.
    """
    area = mask.double().mean(dim=(-2, -1))
    kept = (probabilities.double() * targets).sum(1)
    value = area.clamp(min=min_area).log() - kept.clamp(min=1e-12).log()
    return torch.where(targets.sum(1) == 0, torch.full_like(value, torch.nan), value)


@Facts("sal", higher_is_better=False, bounds=(math.log(0.05), -math.log(1e-12)), optimum=math.log(0.05))
def sal(
    explanandum: Classifier, images: Tensor, mask: Tensor, targets: Tensor, *, fill: FillKind | Tensor = "mean", output: Output = "softmax"
) -> Tensor:
    """Area against kept score, ``[B]`` in [log 0.05, 27.7]: :func:`saliency_metric` of the masked image.

    softmax also for multi-label classifiers, as in the paper.
    """
    return saliency_metric(mask, class_outputs(explanandum, masked(explanandum, images, mask, fill), output), targets)
