"""APOP, activation-pattern-only prediction: Table 1 of Han et al., ICLR 2024 (SRD). A property of the classifier, not of a method."""

from __future__ import annotations

from typing import Literal

from explainer.evaluation.protocol import Column, Mode, Protocol, Score, scores
from explainer.evaluation.scene import Maps, Scene
from explainer.metrics.apop import COLUMNS, apop


class Apop(Protocol):
    """One row per label of an image.

    Args:
        mode: no differences (one mask per call, not per module as in the paper's pseudo-code, which fails on ResNets).
        substitute: image of the second pass, in normalised space: ``zeros``, ``ones`` or ``noise``.
        relu: also clip negative values (the paper's second variant).
    """

    name = "apop"
    heading = "What activation patterns predict"
    question = "The class read from activation patterns alone."
    source = "Han et al. 2024, Table 1"
    uses_maps = False

    def __init__(self, mode: Mode = "corrected", substitute: Literal["zeros", "ones", "noise"] = "zeros", relu: bool = False) -> None:
        super().__init__(mode)
        self.substitute, self.relu = substitute, relu

    def columns(self) -> dict[str, Column]:
        """Top-1 and top-5 accuracy."""
        return {name: Column(name.replace("_", " "), True, percent=True) for name in COLUMNS}

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """See the module's text."""
        rows, classes = scene.labels.nonzero(as_tuple=True)
        if len(rows) == 0:
            return []
        hits = apop(
            scene.images[rows],
            classes,
            scene.explanandum,
            substitute=self.substitute,
            mode="apop_relu" if self.relu else "apop",
            seed=scene.seed,
        )
        return scores(rows, classes, dict(zip(COLUMNS, hits.unbind(1), strict=True)))
