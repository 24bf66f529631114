"""Class sensitivity: do maps differ between classes? Rebuffi et al., CVPR 2020."""

from __future__ import annotations

from torch import Tensor

from explainer.errors import ShapeError
from explainer.metrics.base import PerImageMetric
from explainer.metrics.correlation import spearman


def extreme_classes(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most and the least likely class of each image, ``[B]`` each."""
    return logits.argmax(1), logits.argmin(1)


def class_sensitivity(saliency: Tensor, least_saliency: Tensor) -> Tensor:
    """Spearman correlation ``[B]`` in [-1,1] of the maps ``[B,H,W]`` of the most and of the least likely class; NaN for a constant map."""
    if saliency.shape != least_saliency.shape:
        raise ShapeError(f"both maps must have one shape (B,H,W), received {tuple(saliency.shape)} and {tuple(least_saliency.shape)}.")
    return spearman(saliency.flatten(1), least_saliency.flatten(1))


class ClassSensitivity(PerImageMetric):
    """Mean :func:`class_sensitivity`. Range [-1,1]; 0 is best, 1 means that the maps ignore the class."""

    name = "class_sensitivity"
    higher_is_better = False
    bounds = (-1.0, 1.0)
    optimum = 0.0

    def values(self, saliency: Tensor, least_saliency: Tensor) -> Tensor:
        """See :func:`class_sensitivity`."""
        return class_sensitivity(saliency, least_saliency)
