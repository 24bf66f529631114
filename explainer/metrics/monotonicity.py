"""Monotonicity: does a larger mask preserve more, up to the area that suffices? Fong et al., ICCV 2019 (extremal perturbation)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from explainer.errors import ConfigError, ShapeError
from explainer.fills import FillKind
from explainer.metrics.classifier import Classifier, Output, class_scores, masked
from explainer.metrics.facts import Facts

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


@Facts("monotonicity", higher_is_better=True, bounds=(0.0, 1.0), optimum=1.0)
def monotonicity(
    explanandum: Classifier,
    images: Tensor,
    area_masks: Tensor,
    class_index: Tensor,
    *,
    areas: Sequence[float] | None = None,
    fill: FillKind | Tensor = "blur",
    output: Output = "probability",
) -> Tensor:
    """Whether larger masks preserve more, ``[B]`` in {0,1}: :func:`monotone_scores` of one mask per area.

    Args:
        explanandum: classifier.
        images: ``[B,3,H,W]`` in [0,1].
        area_masks: ``[B,A,H,W]`` of growing area, for instance of extremal perturbation.
        class_index: ``[B]``.
        areas: the A areas that the masks should have, to check their order and number; None: not checked.
        fill: replaces the removed pixels.
        output: what is read from the classifier.

    The number of images used is the n that the paper's protocol asks to report.
    """
    if areas is not None and list(areas) != sorted(areas):
        raise ConfigError(f"areas must grow, received {list(areas)}.")
    if areas is not None and area_masks.shape[1] != len(areas):
        raise ShapeError(f"area_masks is {tuple(area_masks.shape)}, expected (B,{len(areas)},H,W): one mask per area {tuple(areas)}.")
    kept = [class_scores(explanandum, masked(explanandum, images, m, fill), class_index, output) for m in area_masks.unbind(1)]
    return monotone_scores(torch.stack(kept, dim=1), class_scores(explanandum, images, class_index, output))
