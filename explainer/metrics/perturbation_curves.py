"""Scores while pixels are removed or revealed in the order of the map: deletion, insertion, negative and positive perturbation.

Deletion and insertion: Petsiuk et al., BMVC 2018. Negative and positive perturbation: Gur et al., AAAI 2021 (AGF), Table 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from explainer.errors import ConfigError
from explainer.fills import FillKind, blend
from explainer.metrics.classifier import Classifier, Output, class_scores, correct, removal_fill
from explainer.metrics.facts import Facts
from explainer.metrics.ranking import First, top_masks

#: 0, 0.1, ... 0.9 of the pixels removed (the AGF protocol never removes the whole image).
AGF_FRACTIONS: tuple[float, ...] = tuple(i / 10 for i in range(10))

Measure = Literal["correct", "probability", "softmax", "sigmoid", "logit"]


def perturbation_curve(
    explanandum: Classifier,
    images: Tensor,
    saliency: Tensor,
    class_index: Tensor,
    fractions: Sequence[float],
    *,
    first: First = "highest",
    reveal: bool = False,
    fill: FillKind | Tensor = "mean",
    measure: Measure = "probability",
) -> Tensor:
    """Score of ``class_index`` after each fraction of the pixels was replaced (or shown), ``[B,T]``.

    Args:
        explanandum: classifier.
        images: ``[B,3,H,W]`` in [0,1].
        saliency: ``[B,H,W]`` raw map; only its order matters.
        class_index: ``[B]``, the class that is scored (not necessarily the class that the map explains).
        fractions: share of the pixels, in [0,1].
        first: which pixels go first.
        reveal: start from the fill and show pixels instead of removing them.
        fill: what stands where the image does not.
        measure: ``correct`` (1 if the class is predicted) or an output of the classifier.

    NaN for a map with NaN. Ties: see :func:`explainer.metrics.ranking.pixel_ranks`.
    """
    if measure not in get_args(Measure):
        raise ConfigError(f"measure must be one of {', '.join(get_args(Measure))}, received {measure!r}.")
    background = removal_fill(explanandum, images, fill)
    unknown = saliency.flatten(1).isnan().any(1)
    curve = []
    for chosen in top_masks(saliency.nan_to_num(), fractions, first).unbind(1):
        shown = blend(images, (chosen if reveal else 1 - chosen).to(images), background)
        if measure == "correct":
            curve.append(correct(explanandum, shown, class_index))
        else:
            curve.append(class_scores(explanandum, shown, class_index, measure))
    return torch.stack(curve, dim=1).double().masked_fill(unknown[:, None], torch.nan)


def area_under(curve: Tensor, fractions: Sequence[float]) -> Tensor:
    """Trapezoid rule over the fractions, ``[B,T] -> [B]``."""
    return torch.trapezoid(curve, torch.tensor(fractions, dtype=curve.dtype, device=curve.device), dim=1)


def even_fractions(steps: int) -> tuple[float, ...]:
    """0, 1/steps, ... 1."""
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, received {steps}.")
    return tuple(i / steps for i in range(steps + 1))


@Facts("deletion", higher_is_better=False, bounds=(0.0, 1.0), optimum=0.0)
def deletion(
    explanandum: Classifier,
    images: Tensor,
    saliency: Tensor,
    class_index: Tensor,
    steps: int = 20,
    *,
    fill: FillKind | Tensor = "mean",
    output: Output = "probability",
) -> Tensor:
    """Area under the score while the highest pixels are removed first, ``[B]`` in [0,1] for probabilities; smaller is better."""
    fractions = even_fractions(steps)
    return area_under(
        perturbation_curve(explanandum, images, saliency, class_index, fractions, first="highest", reveal=False, fill=fill, measure=output),
        fractions,
    )


@Facts("insertion", higher_is_better=True, bounds=(0.0, 1.0), optimum=1.0)
def insertion(
    explanandum: Classifier,
    images: Tensor,
    saliency: Tensor,
    class_index: Tensor,
    steps: int = 20,
    *,
    fill: FillKind | Tensor = "blur",
    output: Output = "probability",
) -> Tensor:
    """Area under the score while the highest pixels appear first on ``fill``, ``[B]`` in [0,1] for probabilities; larger is better."""
    fractions = even_fractions(steps)
    return area_under(
        perturbation_curve(explanandum, images, saliency, class_index, fractions, first="highest", reveal=True, fill=fill, measure=output),
        fractions,
    )


@Facts("negative_perturbation", higher_is_better=True, bounds=(0.0, 90.0), optimum=90.0)
def negative_perturbation(
    explanandum: Classifier, images: Tensor, saliency: Tensor, class_index: Tensor, fill: FillKind | Tensor = "black"
) -> Tensor:
    """AGF protocol: the lowest pixels are removed first; 100 x area under "still classified as ``class_index``" over 0..0.9.

    ``[B]`` in [0,90]; larger is better. The mean over images equals the area under the accuracy curve. (The trapezoid is this project's
    reading: the public code stops at the curve.) ``class_index`` is the label, whether the map explains the label or the prediction.
    """
    return _agf(explanandum, images, saliency, class_index, "lowest", fill)


@Facts("positive_perturbation", higher_is_better=False, bounds=(0.0, 90.0), optimum=0.0)
def positive_perturbation(
    explanandum: Classifier, images: Tensor, saliency: Tensor, class_index: Tensor, fill: FillKind | Tensor = "black"
) -> Tensor:
    """As :func:`negative_perturbation` with the highest pixels removed first, ``[B]`` in [0,90]; smaller is better."""
    return _agf(explanandum, images, saliency, class_index, "highest", fill)


def _agf(explanandum: Classifier, images: Tensor, saliency: Tensor, class_index: Tensor, first: First, fill: FillKind | Tensor) -> Tensor:
    curve = perturbation_curve(
        explanandum, images, saliency, class_index, AGF_FRACTIONS, first=first, reveal=False, fill=fill, measure="correct"
    )
    return 100 * area_under(curve, AGF_FRACTIONS)
