"""The saliency metric: small masks that keep the class score. Dabkowski & Gal, NeurIPS 2017, as in Stalder et al., 2022, eq. 9."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from explainer.fills import FillKind
from explainer.metrics.base import PerImageMetric
from explainer.metrics.classifier import Classifier, Output, class_outputs, masked


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


def sal(
    explanandum: Classifier, images: Tensor, mask: Tensor, targets: Tensor, *, fill: FillKind | Tensor = "mean", output: Output = "softmax"
) -> Tensor:
    """:func:`saliency_metric` of the image masked by ``mask``; softmax also for multi-label classifiers, as in the paper."""
    return saliency_metric(mask, class_outputs(explanandum, masked(explanandum, images, mask, fill), output), targets)


class Sal(PerImageMetric):
    """Mean :func:`sal`. Range [log 0.05, 27.7], optimum log 0.05."""

    name = "sal"
    higher_is_better = False
    bounds = (-2.995732273553991, 27.631021115928547)
    optimum = -2.995732273553991

    def __init__(self, fill: FillKind = "mean", output: Output = "softmax", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fill: FillKind = fill
        self.output: Output = output

    def values(self, explanandum: Classifier, images: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """See :func:`sal`."""
        return sal(explanandum, images, mask, targets, fill=self.fill, output=self.output)
