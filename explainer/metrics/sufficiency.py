"""Sufficiency and necessity: the score that the mask keeps, and the score that its inverse leaves, under several fills.

A score that holds under one fill only may come from the fill; so the mean over fills is reported, and each fill on request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from explainer.fills import FillKind
from explainer.metrics.base import PerImageMetric
from explainer.metrics.classifier import Classifier, Output, class_scores, masked

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


class Sufficiency(PerImageMetric):
    """Mean :func:`sufficiency` over images and fills. Range [0,1] (probabilities), optimum 1."""

    name = "sufficiency"
    higher_is_better = True
    bounds = (0.0, 1.0)
    optimum = 1.0

    def __init__(self, fills: Sequence[FillKind] = FILLS, output: Output = "probability", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fills = tuple(fills)
        self.output: Output = output

    def values(self, explanandum: Classifier, images: Tensor, mask: Tensor, class_index: Tensor) -> Tensor:
        """Mean of :func:`sufficiency_by_fill` over the fills."""
        return sufficiency_by_fill(explanandum, images, mask, class_index, self.fills, output=self.output).mean(1)


class Necessity(PerImageMetric):
    """Mean :func:`necessity` (score left) over images and fills. Range [0,1] (probabilities), optimum 0."""

    name = "necessity"
    higher_is_better = False
    bounds = (0.0, 1.0)
    optimum = 0.0

    def __init__(self, fills: Sequence[FillKind] = FILLS, output: Output = "probability", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fills = tuple(fills)
        self.output: Output = output

    def values(self, explanandum: Classifier, images: Tensor, mask: Tensor, class_index: Tensor) -> Tensor:
        """Mean of :func:`sufficiency_by_fill` of the inverse mask over the fills."""
        return sufficiency_by_fill(explanandum, images, 1 - mask, class_index, self.fills, output=self.output).mean(1)
