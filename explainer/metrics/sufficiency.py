"""Sufficiency and necessity: the score that the mask keeps, and the score that its inverse leaves, under several fills.

A score that holds under one fill only may come from the fill; so the mean over fills is reported, and each fill on request.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from explainer.fills import FillKind
from explainer.metrics.classifier import Classifier, Output, class_scores, masked
from explainer.metrics.facts import Facts

FILLS: tuple[FillKind, ...] = ("mean", "black", "blur", "noise")


def sufficiency(
    explanandum: Classifier,
    images: Tensor,
    mask: Tensor,
    class_index: Tensor,
    fill: FillKind | Tensor = "mean",
    *,
    output: Output = "probability",
    relative: bool = False,
) -> Tensor:
    """Score of ``class_index`` when only ``mask`` is kept, ``[B]``; ``relative``: divided by the score of the whole image."""
    kept = class_scores(explanandum, masked(explanandum, images, mask, fill), class_index, output).double()
    return kept / class_scores(explanandum, images, class_index, output).double() if relative else kept


def necessity(
    explanandum: Classifier,
    images: Tensor,
    mask: Tensor,
    class_index: Tensor,
    fill: FillKind | Tensor = "mean",
    *,
    output: Output = "probability",
    relative: bool = False,
) -> Tensor:
    """Score of ``class_index`` left when ``mask`` is removed, ``[B]``: small means that the mask's pixels are necessary."""
    return sufficiency(explanandum, images, 1 - mask, class_index, fill, output=output, relative=relative)


def sufficiency_by_fill(
    explanandum: Classifier,
    images: Tensor,
    mask: Tensor,
    class_index: Tensor,
    fills: Sequence[FillKind] = FILLS,
    *,
    output: Output = "probability",
) -> Tensor:
    """:func:`sufficiency` under each fill, ``[B,F]`` (pass ``1 - mask`` for necessity)."""
    return torch.stack([sufficiency(explanandum, images, mask, class_index, fill, output=output) for fill in fills], dim=1)


@Facts("sufficiency", higher_is_better=True, bounds=(0.0, 1.0), optimum=1.0)
def mean_sufficiency(
    explanandum: Classifier,
    images: Tensor,
    mask: Tensor,
    class_index: Tensor,
    fills: Sequence[FillKind] = FILLS,
    *,
    output: Output = "probability",
) -> Tensor:
    """Mean of :func:`sufficiency` over the fills, ``[B]`` in [0,1] for probabilities."""
    return sufficiency_by_fill(explanandum, images, mask, class_index, fills, output=output).mean(1)


@Facts("necessity", higher_is_better=False, bounds=(0.0, 1.0), optimum=0.0)
def mean_necessity(
    explanandum: Classifier,
    images: Tensor,
    mask: Tensor,
    class_index: Tensor,
    fills: Sequence[FillKind] = FILLS,
    *,
    output: Output = "probability",
) -> Tensor:
    """Mean of :func:`necessity` (the score left) over the fills, ``[B]`` in [0,1] for probabilities."""
    return mean_sufficiency(explanandum, images, 1 - mask, class_index, fills, output=output)
