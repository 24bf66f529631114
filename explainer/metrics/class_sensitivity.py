"""Class sensitivity: do maps differ between classes? Rebuffi et al., CVPR 2020."""

from __future__ import annotations

from torch import Tensor

from explainer.errors import ShapeError
from explainer.metrics.correlation import spearman
from explainer.metrics.facts import Facts


def extreme_classes(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most and the least likely class of each image, ``[B]`` each."""
    return logits.argmax(1), logits.argmin(1)


@Facts("class_sensitivity", higher_is_better=False, bounds=(-1.0, 1.0), optimum=0.0)
def class_sensitivity(saliency: Tensor, least_saliency: Tensor) -> Tensor:
    """Spearman correlation ``[B]`` in [-1,1] of the maps ``[B,H,W]`` of the most and of the least likely class; NaN for a constant map."""
    if saliency.shape != least_saliency.shape:
        raise ShapeError(f"both maps must have one shape (B,H,W), received {tuple(saliency.shape)} and {tuple(least_saliency.shape)}.")
    return spearman(saliency.flatten(1), least_saliency.flatten(1))
