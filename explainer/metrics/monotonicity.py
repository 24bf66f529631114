"""Monotonicity: does a larger mask preserve more, up to the area that suffices? Fong et al., ICCV 2019 (extremal perturbation)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from explainer.errors import ConfigError, ShapeError
from explainer.fills import FillKind
from explainer.metrics.base import PerImageMetric
from explainer.metrics.classifier import Classifier, Output, class_scores, masked

AREAS: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


def monotone_scores(scores: Tensor, original: Tensor) -> Tensor:
    """1 where the preserved scores never decrease up to the smallest area that suffices, else 0, ``[B]`` float64.

    Args:
        scores: ``[B,A]``, score of the image preserved at A growing areas.
        original: ``[B]``, score of the whole image; the first area that reaches it is a*.

    NaN where no area reaches the original score (a* does not exist), or a score is NaN. One single area below or at a* is monotone.
    """
    if scores.ndim != 2 or original.shape != scores.shape[:1]:
        raise ShapeError(f"scores must be (B,A) and original (B), received {tuple(scores.shape)} and {tuple(original.shape)}.")
    reached = scores >= original[:, None]
    smallest = reached.long().argmax(1)
    position = torch.arange(1, scores.shape[1], device=scores.device)
    falls = (scores[:, 1:] < scores[:, :-1]) & (position <= smallest[:, None])
    undefined = ~reached.any(1) | scores.isnan().any(1) | original.isnan()
    return torch.where(undefined, torch.nan, (~falls.any(1)).double())


def monotonicity(
    explanandum: Classifier,
    images: Tensor,
    area_masks: Tensor,
    class_index: Tensor,
    *,
    fill: FillKind | Tensor = "blur",
    output: Output = "probability",
) -> Tensor:
    """:func:`monotone_scores` of the masks ``[B,A,H,W]`` of growing area (one mask per area, for instance of extremal perturbation)."""
    kept = [class_scores(explanandum, masked(explanandum, images, m, fill), class_index, output) for m in area_masks.unbind(1)]
    return monotone_scores(torch.stack(kept, dim=1), class_scores(explanandum, images, class_index, output))


class Monotonicity(PerImageMetric):
    """Share of images that are monotone. Range [0,1], optimum 1; ``used`` is the n that the paper's protocol asks to report.

    Args:
        areas: the areas that ``area_masks`` have, for the record and to check their number.
        fill, output: as in :func:`monotonicity`.
    """

    name = "monotonicity"
    higher_is_better = True
    bounds = (0.0, 1.0)
    optimum = 1.0

    def __init__(self, areas: Sequence[float] = AREAS, fill: FillKind = "blur", output: Output = "probability", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if list(areas) != sorted(areas):
            raise ConfigError(f"areas must grow, received {list(areas)}.")
        self.areas = tuple(areas)
        self.fill: FillKind = fill
        self.output: Output = output

    def values(self, explanandum: Classifier, images: Tensor, area_masks: Tensor, class_index: Tensor) -> Tensor:
        """See :func:`monotonicity`."""
        if area_masks.shape[1] != len(self.areas):
            raise ShapeError(
                f"area_masks is {tuple(area_masks.shape)}, expected (B,{len(self.areas)},H,W): one mask per area {self.areas}."
            )
        return monotonicity(explanandum, images, area_masks, class_index, fill=self.fill, output=self.output)
