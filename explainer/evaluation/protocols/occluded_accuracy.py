"""Accuracy on occluded images: Fong's thesis, appendix C.1. A property of the classifier, not of a method."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from explainer.data.samplers import sample_seed
from explainer.evaluation.protocol import Column, Mode, Protocol, Score, scores
from explainer.evaluation.scene import Maps, Scene
from explainer.fills import FillKind
from explainer.metrics.apop import top_k_hits
from explainer.metrics.classifier import class_outputs, masked
from explainer.models.occlusion import cutout_squares, hide_and_seek_grid

KEEP = (0.9, 0.8, 0.7, 0.6, 0.5)
SQUARES = (1, 2, 4, 6, 8)
SIDES = (56, 84, 112)  # of 224 pixels
Draw = Callable[[int, tuple[int, int], torch.Generator], Tensor]


class OccludedAccuracy(Protocol):
    """One row per label of an image: is it among the first, and among the first five, of the whole and of the occluded image?

    Hide-and-Seek with a grid of 4 x 4 keeps each cell with a probability of 0.9 to 0.5; Cutout removes 1 to 8 squares of 56, 84 or 112
    pixels (at 224) that may leave the image. Each image has its own occlusions, fixed by the seed, the same for every classifier. The
    vectors ``hide_and_seek`` and ``cutout`` hold the hits at each setting.

    Args:
        mode: no differences.
        fill: replaces what is removed; the thesis takes the mean colour.
    """

    name = "occluded_accuracy"
    heading = "Accuracy on occluded images"
    question = "How many images does the classifier still get right when a part is hidden?"
    source = "Fong's thesis, appendix C.1"
    uses_maps = False

    def __init__(self, mode: Mode = "corrected", fill: FillKind = "mean") -> None:
        super().__init__(mode)
        self.fill: FillKind = fill

    def columns(self) -> dict[str, Column]:
        """Top-1 and top-5 accuracy, means over the settings for the two kinds of occlusion."""
        kinds = {"whole": "whole images", "hide_and_seek": "Hide-and-Seek", "cutout": "Cutout"}
        return {f"{kind}_top{k}": Column(f"{title}, top-{k}", True, percent=True) for kind, title in kinds.items() for k in (1, 5)}

    def axes(self, class_names: tuple[str, ...]) -> dict[str, list[Any]]:
        """The settings."""
        return {"hide_and_seek": list(KEEP), "cutout": [f"{n} x {s} px" for n in SQUARES for s in SIDES]}

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """Occlude the images in both ways and look for the labels among the first classes."""
        rows, classes = scene.labels.nonzero(as_tuple=True)
        if len(rows) == 0:
            return []
        grid: list[Draw] = [partial(hide_and_seek_grid, keep=p) for p in KEEP]
        squares: list[Draw] = [partial(cutout_squares, squares=n, side=s / 224) for n in SQUARES for s in SIDES]
        occluded = {"hide_and_seek": self._hits(scene, grid), "cutout": self._hits(scene, squares)}
        whole = {k: top_k_hits(scene.logits[rows], classes, k).double() for k in (1, 5)}
        values = {f"whole_top{k}": whole[k] for k in (1, 5)}
        for kind, hits in occluded.items():
            values |= {f"{kind}_top{k}": hits[k].mean(1) for k in (1, 5)}
        return scores(rows, classes, values, {kind: hits[1] for kind, hits in occluded.items()})

    def _hits(self, scene: Scene, kinds: list[Draw]) -> dict[int, Tensor]:
        """Hits ``[P,S]`` among the first and the first five, at each setting."""
        rows, classes = scene.labels.nonzero(as_tuple=True)
        found: dict[int, list[Tensor]] = {1: [], 5: []}
        for number, draw in enumerate(kinds):
            generators = [torch.Generator().manual_seed(sample_seed(scene.seed, i, number)) for i in scene.indices]
            masks = torch.cat([draw(1, scene.size, g) for g in generators])
            logits = class_outputs(scene.explanandum, masked(scene.explanandum, scene.images, masks, self.fill), "logit")
            for k, hits in found.items():
                hits.append(top_k_hits(logits[rows], classes, k).double())
        return {k: torch.stack(hits, 1) for k, hits in found.items()}
