"""Classes by the average activation of their masks: Figures 4 and 5 of Stalder et al., NeurIPS 2022, over all images."""

from __future__ import annotations

import torch
from torch import Tensor

from explainer.evaluation.protocol import Column, Mode, Protocol, Score, scores
from explainer.evaluation.scene import Maps, Scene
from explainer.metrics.correlation import spearman


class MaskActivation(Protocol):
    """One row per image: does the class with the largest mean mask belong to the image, and do masks follow the classifier's scores?

    Args:
        mode: no differences.
    """

    name = "mask_activation"
    heading = "Mask activation"
    question = "Which share of the image do the masks of present and absent classes cover?"
    source = "Stalder et al. 2022, Figures 4 and 5"
    uses_scale = True

    def __init__(self, mode: Mode = "corrected") -> None:
        super().__init__(mode)

    def columns(self) -> dict[str, Column]:
        """Share of images whose top class is a label, and the rank correlation over classes."""
        return {
            "top_is_label": Column("top class is a label", True, percent=True),
            "rank_correlation": Column("rank correlation with the score", True),
        }

    def axes(self, class_names: tuple[str, ...]) -> dict[str, list[str]]:
        """The classes."""
        return {"activation": list(class_names), "probability": list(class_names)}

    def wanted(self, scene: Scene) -> Tensor:
        """All classes."""
        return torch.ones_like(scene.labels)

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """Mean of each class mask, against the labels and the probabilities: one row per image. An image without labels has no
        ``top_is_label``.
        """
        assert maps is not None
        activation = maps.class_masks().double().mean((2, 3))
        probability = scene.explanandum.probabilities(scene.logits)
        hit = scene.labels.gather(1, activation.argmax(1, keepdim=True))[:, 0].double()
        values = {
            "top_is_label": hit.masked_fill(~scene.labels.any(1), torch.nan),
            "rank_correlation": spearman(activation, probability.double()),
        }
        vectors = {"activation": activation, "probability": probability}
        return scores(len(activation), None, values, vectors, digits=5)
