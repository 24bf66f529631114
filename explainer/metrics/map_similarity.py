"""Similarity of two maps of one image, for randomisation tests (Adebayo et al., NeurIPS 2018): SSIM and Spearman correlation."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from explainer.errors import ShapeError
from explainer.metrics.correlation import spearman
from explainer.metrics.facts import Facts


@Facts("map_ssim", higher_is_better=False, bounds=(-1.0, 1.0), optimum=0.0)
def map_ssim(saliency: Tensor, other_saliency: Tensor, data_range: float = 1.0) -> Tensor:
    """Structural similarity ``[B]`` in [-1,1] of maps ``[B,H,W]`` (11x11 Gaussian window, sigma 1.5, reflected borders).

    Prepare both maps alike first (:func:`explainer.metrics.preparation.prepare`); ``data_range`` is their span, 1 for [0,1], 2 for [-1,1].
    Equal maps score 1, also constant ones. NaN where a map holds a NaN. Sides of at least 6 pixels, half a window.
    """
    _check(saliency, other_saliency)
    if min(saliency.shape[-2:]) < 6:
        raise ShapeError(f"SSIM's window needs maps of at least 6x6 pixels, received {tuple(saliency.shape[-2:])}: resize them.")
    first, second = (s.double()[:, None] for s in (saliency, other_saliency))
    value = structural_similarity_index_measure(first, second, data_range=data_range, reduction="none")
    assert isinstance(value, Tensor)
    unknown = (first + second).flatten(1).isnan().any(1)
    return value.reshape(-1).masked_fill(unknown, torch.nan)


@Facts("map_spearman", higher_is_better=False, bounds=(-1.0, 1.0), optimum=0.0)
def map_spearman(saliency: Tensor, other_saliency: Tensor, absolute: bool = False) -> Tensor:
    """Spearman correlation ``[B]`` in [-1,1]; ``absolute``: of the absolute values. NaN for a constant map."""
    _check(saliency, other_saliency)
    if absolute:
        saliency, other_saliency = saliency.abs(), other_saliency.abs()
    return spearman(saliency.flatten(1), other_saliency.flatten(1))


def _check(saliency: Tensor, other_saliency: Tensor) -> None:
    if saliency.shape != other_saliency.shape or saliency.ndim != 3:
        raise ShapeError(f"both maps must have one shape (B,H,W), received {tuple(saliency.shape)} and {tuple(other_saliency.shape)}.")
