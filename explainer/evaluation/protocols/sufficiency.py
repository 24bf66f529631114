"""Sufficiency and necessity: the score that a mask keeps and the score that its inverse leaves, under several fills.

A score that holds under one fill only may come from the fill.
"""

from __future__ import annotations

from collections.abc import Sequence

from explainer.evaluation.protocol import Column, Mode, Protocol, Score, scores
from explainer.evaluation.scene import Maps, Scene
from explainer.fills import FillKind
from explainer.metrics.classifier import Output
from explainer.metrics.sufficiency import FILLS, sufficiency_by_fill


class SufficiencyNecessity(Protocol):
    """One row per explained class of an image, with the class's own mask.

    Args:
        mode: no differences.
        fills: replace removed pixels, one after the other.
        output: what is read from the classifier: ``probability``, ``softmax``, ``sigmoid`` or ``logit``.
    """

    name = "sufficiency_necessity"
    heading = "Sufficiency and necessity"
    question = "Score kept by the mask, score left without it."
    source = "this project"
    uses_scale = True

    def __init__(self, mode: Mode = "corrected", fills: Sequence[FillKind] = FILLS, output: Output = "probability") -> None:
        super().__init__(mode)
        self.fills = list(fills)
        self.output: Output = output

    def columns(self) -> dict[str, Column]:
        """Means over the fills, then each fill."""
        found = {"sufficiency": Column("sufficiency", True, percent=True), "necessity": Column("score left", False, percent=True)}
        for fill in self.fills:
            found[f"sufficiency_{fill}"] = Column(f"sufficiency, {fill}", True, percent=True, shown=False)
            found[f"necessity_{fill}"] = Column(f"score left, {fill}", False, percent=True, shown=False)
        return found

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """Scores with the mask's pixels alone, and without them: one row per image and explained class."""
        assert maps is not None
        rows, classes = scene.pairs
        if len(rows) == 0:
            return []
        images, mask = scene.images[rows], maps.mask(rows, classes)
        values = {}
        for name, shown in (("sufficiency", mask), ("necessity", 1 - mask)):
            by_fill = sufficiency_by_fill(scene.explanandum, images, shown, classes, self.fills, output=self.output)
            values[name] = by_fill.mean(1)
            values.update({f"{name}_{fill}": by_fill[:, i] for i, fill in enumerate(self.fills)})
        return scores(rows, classes, values)
