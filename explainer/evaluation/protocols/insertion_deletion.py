"""Insertion and deletion (Petsiuk et al., BMVC 2018): the score while the map's highest pixels appear, or disappear, first."""

from __future__ import annotations

from typing import Any

from explainer.evaluation.protocol import Column, Mode, Protocol, Score, scores
from explainer.evaluation.scene import Maps, Scene
from explainer.fills import FillKind
from explainer.metrics.classifier import Output
from explainer.metrics.perturbation_curves import area_under, even_fractions, perturbation_curve


class InsertionDeletion(Protocol):
    """One row per explained class of an image, with both curves.

    Args:
        mode: no differences.
        steps: points of a curve beyond the first.
        deletion_fill, insertion_fill: what stands where the image does not.
        output: what is read from the classifier: ``probability``, ``softmax``, ``sigmoid`` or ``logit``.
    """

    name = "insertion_deletion"
    heading = "Insertion and deletion"
    question = "The score while the map's most important pixels appear or disappear first."
    source = "Petsiuk et al. 2018"

    def __init__(
        self,
        mode: Mode = "corrected",
        steps: int = 20,
        deletion_fill: FillKind = "mean",
        insertion_fill: FillKind = "blur",
        output: Output = "probability",
    ) -> None:
        super().__init__(mode)
        self.fractions = list(even_fractions(steps))
        self.deletion_fill: FillKind = deletion_fill
        self.insertion_fill: FillKind = insertion_fill
        self.output: Output = output

    def columns(self) -> dict[str, Column]:
        """Areas under the curves, and their difference."""
        return {
            "insertion": Column("insertion", True, percent=True),
            "deletion": Column("deletion", False, percent=True),
            "insertion_minus_deletion": Column("insertion - deletion", True, percent=True),
        }

    def axes(self, class_names: tuple[str, ...]) -> dict[str, list[Any]]:
        """Share of the pixels."""
        return {"insertion": self.fractions, "deletion": self.fractions}

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """Curves and the areas under them: one row per image and explained class."""
        assert maps is not None
        rows, classes = scene.pairs
        if len(rows) == 0:
            return []
        images, saliency = scene.images[rows], maps.saliency(rows, classes)
        curves = {
            name: perturbation_curve(
                scene.explanandum,
                images,
                saliency,
                classes,
                self.fractions,
                first="highest",
                reveal=name == "insertion",
                fill=fill,
                measure=self.output,
            )
            for name, fill in (("insertion", self.insertion_fill), ("deletion", self.deletion_fill))
        }
        values = {name: area_under(curve, self.fractions) for name, curve in curves.items()}
        values["insertion_minus_deletion"] = values["insertion"] - values["deletion"]
        return scores(rows, classes, values, curves, digits=5)
