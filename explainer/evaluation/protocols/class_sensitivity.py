"""Class sensitivity (Rebuffi et al., CVPR 2020): do the maps of the most and the least likely class differ?"""

from __future__ import annotations

import torch
from torch import Tensor

from explainer.evaluation.protocol import Column, Mode, Protocol, Score, scores
from explainer.evaluation.scene import Maps, Scene
from explainer.metrics.class_sensitivity import class_sensitivity, extreme_classes


class ClassSensitivity(Protocol):
    """One row per image.

    Args:
        mode: no differences.
    """

    name = "class_sensitivity"
    heading = "Class sensitivity"
    question = "Do the maps of the most and the least likely class differ?"
    source = "Rebuffi et al. 2020"

    def __init__(self, mode: Mode = "corrected") -> None:
        super().__init__(mode)

    def columns(self) -> dict[str, Column]:
        """Spearman correlation; 0 is best."""
        return {"class_sensitivity": Column("correlation of extreme classes", False)}

    def wanted(self, scene: Scene) -> Tensor:
        """The most and the least likely class."""
        most, least = extreme_classes(scene.logits)
        rows = torch.arange(len(most), device=most.device)
        chosen = torch.zeros_like(scene.labels)
        chosen[rows, most] = True
        chosen[rows, least] = True
        return chosen

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """See the module's text."""
        assert maps is not None
        most, least = extreme_classes(scene.logits)
        rows = torch.arange(len(most), device=most.device)
        value = class_sensitivity(maps.saliency(rows, most), maps.saliency(rows, least))
        return scores(len(most), None, {"class_sensitivity": value})
