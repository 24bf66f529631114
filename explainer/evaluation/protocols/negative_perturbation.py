"""Negative and positive perturbation: Table 2 of Gur et al., AAAI 2021 (AGF).

10, 20, ... 90 % of the pixels are removed (black), lowest first (negative) or highest first (positive); 100 x the area under the
accuracy over 0 to 0.9, once for maps of the predicted class and once of the true class. The label is scored in both. In multi-label data
the label is the image's most likely one, and an image is "correct" while it is detected.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from explainer.evaluation.protocol import Column, Mode, Protocol, Score, scores
from explainer.evaluation.scene import Maps, Scene
from explainer.fills import FillKind
from explainer.metrics.perturbation_curves import AGF_FRACTIONS, Measure, area_under, perturbation_curve
from explainer.metrics.ranking import First


class NegativePerturbation(Protocol):
    """One row per image that has a label; its class is the label scored.

    Args:
        mode: no differences (the public code stops at the curves; the trapezoid is this project's).
        fill: black in the paper.
        measure: ``correct`` (accuracy) or an output of the classifier.
    """

    name = "negative_perturbation"
    heading = "Negative and positive perturbation"
    question = "Accuracy while unimportant or important pixels are removed first."
    source = "Gur et al. 2021, Table 2"

    def __init__(self, mode: Mode = "corrected", fill: FillKind = "black", measure: Measure = "correct") -> None:
        super().__init__(mode)
        self.fill: FillKind = fill
        self.measure: Measure = measure

    def columns(self) -> dict[str, Column]:
        """Areas, 0 to 90."""
        return {
            "negative_predicted": Column("negative, predicted", True),
            "negative_target": Column("negative, target", True),
            "positive_predicted": Column("positive, predicted", False),
            "positive_target": Column("positive, target", False),
        }

    def axes(self, class_names: tuple[str, ...]) -> dict[str, list[Any]]:
        """Share of the pixels removed."""
        return {"negative": list(AGF_FRACTIONS), "positive": list(AGF_FRACTIONS)}

    def wanted(self, scene: Scene) -> Tensor:
        """The predicted class and the scored label."""
        rows, label = self._label(scene)
        chosen = torch.zeros_like(scene.labels)
        chosen[rows, label] = True
        chosen[rows, scene.top[rows]] = True
        return chosen

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """See the module's text."""
        assert maps is not None
        rows, label = self._label(scene)
        if len(rows) == 0:
            return []
        images, values, vectors = scene.images[rows], {}, {}
        order: dict[str, First] = {"negative": "lowest", "positive": "highest"}
        for name, first in order.items():
            for of, classes in (("predicted", scene.top[rows]), ("target", label)):
                curve = perturbation_curve(
                    scene.explanandum,
                    images,
                    maps.saliency(rows, classes),
                    label,
                    AGF_FRACTIONS,
                    first=first,
                    reveal=False,
                    fill=self.fill,
                    measure=self.measure,
                )
                values[f"{name}_{of}"] = 100 * area_under(curve, AGF_FRACTIONS)
                if of == "target":
                    vectors[name] = curve
        return scores(rows, label, values, vectors, digits=5)

    @staticmethod
    def _label(scene: Scene) -> tuple[Tensor, Tensor]:
        """Images with a label and the likeliest of their labels."""
        rows = scene.labels.any(1).nonzero()[:, 0]
        return rows, scene.logits[rows].masked_fill(~scene.labels[rows], -torch.inf).argmax(1)
