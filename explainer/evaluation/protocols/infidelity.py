"""Infidelity and max-sensitivity (Yeh et al., NeurIPS 2019), through captum."""

from __future__ import annotations

import torch

from explainer.evaluation.protocol import Column, Mode, Protocol, Score, scores
from explainer.evaluation.scene import Maps, Scene
from explainer.metrics.captum_metrics import infidelity, max_sensitivity


class Infidelity(Protocol):
    """One row per explained class of an image.

    Args:
        mode: no differences.
        samples: perturbations for infidelity.
        sensitivity_samples: perturbed images for max-sensitivity; 0 leaves it out.
        radius: largest change of a value in those, in [0,1] units.
    """

    name = "infidelity"
    heading = "Infidelity and sensitivity"
    question = "Does the map predict the effect of small changes, and is it stable?"
    source = "Yeh et al. 2019"

    def __init__(self, mode: Mode = "corrected", samples: int = 50, sensitivity_samples: int = 10, radius: float = 0.02) -> None:
        super().__init__(mode)
        self.samples, self.sensitivity_samples, self.radius = samples, sensitivity_samples, radius

    def columns(self) -> dict[str, Column]:
        """Both, smaller is better."""
        return {"infidelity": Column("infidelity", False), "max_sensitivity": Column("max-sensitivity", False)}

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """See the module's text."""
        assert maps is not None
        rows, classes = scene.pairs
        if len(rows) == 0:
            return []
        images = scene.images[rows]
        saliency = maps.saliency(rows, classes)
        values = {"infidelity": infidelity(scene.explanandum, images, saliency, classes, samples=self.samples, seed=scene.seed)}
        if self.sensitivity_samples and not maps.method.needs_truth:
            values["max_sensitivity"] = max_sensitivity(
                maps.explain, images, classes, samples=self.sensitivity_samples, radius=self.radius, seed=scene.seed
            )
        elif self.sensitivity_samples:
            values["max_sensitivity"] = torch.full((len(rows),), torch.nan)
        return scores(rows, classes, values)
