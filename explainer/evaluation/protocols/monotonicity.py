"""Monotonicity: does a larger mask preserve more, up to the area that suffices? Fong et al., ICCV 2019."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from explainer.evaluation.protocol import Column, Mode, Protocol, Score, scores
from explainer.evaluation.scene import Maps, Method, Scene
from explainer.fills import FillKind
from explainer.metrics.classifier import Output, class_scores, masked
from explainer.metrics.monotonicity import AREAS, monotone_scores
from explainer.metrics.ranking import top_masks


class Monotonicity(Protocol):
    """One row per explained class of an image. A method that optimises one mask per area (it has ``areas`` and ``masks(images, classes)``)
    is judged by those masks; the areas of any other method are its map's highest pixels.

    Args:
        mode: no differences.
        areas: shares of the image, growing; a method with masks of its own must have been built with the same.
        fill: replaces removed pixels (the paper blurs).
        output: what is read from the classifier: ``probability``, ``softmax``, ``sigmoid`` or ``logit``.
        scores: ``masked``: the images are masked here with ``fill``; ``own``: what the method's search reached under its own perturbation
            (methods with masks of their own only), against its reward of the untouched image.
    """

    name = "monotonicity"
    heading = "Monotonicity"
    question = "Do larger areas keep more of the score?"
    source = "Fong et al. 2019, section 4"

    def __init__(
        self,
        mode: Mode = "corrected",
        areas: Sequence[float] = AREAS,
        fill: FillKind = "blur",
        output: Output = "probability",
        scores: Literal["masked", "own"] = "masked",
    ) -> None:
        super().__init__(mode)
        self.areas = list(areas)
        self.fill: FillKind = fill
        self.output: Output = output
        self.scores = scores

    def columns(self) -> dict[str, Column]:
        """Share of monotone images, and the smallest area that suffices."""
        return {"monotone": Column("monotone", True, percent=True), "smallest_area": Column("a*", False, percent=True)}

    def axes(self, class_names: tuple[str, ...]) -> dict[str, list[Any]]:
        """The areas."""
        return {"preserved": list(self.areas)}

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """Whether the score grows with the area shown, and from which area on it suffices: one row per image and explained class."""
        assert maps is not None
        rows, classes = scene.pairs
        if len(rows) == 0:
            return []
        images = scene.images[rows]
        if self.scores == "own":
            return self._rows(rows, classes, *self._own_scores(maps, images, classes))
        areas = self._area_masks(maps, images, rows, classes)
        kept = torch.stack(
            [
                class_scores(scene.explanandum, masked(scene.explanandum, images, m, self.fill), classes, self.output)
                for m in areas.unbind(1)
            ],
            1,
        )
        whole = class_scores(scene.explanandum, images, classes, self.output)
        return self._rows(rows, classes, kept, whole)

    def not_applicable(self, method: Method) -> str | None:
        """With ``scores: own``, a method needs masks of its own for these areas."""
        own = self.scores == "masked" or has_area_masks(method, self.areas)
        return None if own else "it has no masks of its own for these areas"

    def _own_scores(self, maps: Maps, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        attributor: Any = maps.method.attributor
        parts = zip(images.split(maps.method.batch_size), classes.split(maps.method.batch_size), strict=True)
        found = [attributor.masks(i, k, generator=maps.generator()) for i, k in parts]
        return torch.cat([f.preserved for f in found]), torch.cat([f.original for f in found])

    def _rows(self, rows: Tensor, classes: Tensor, kept: Tensor, whole: Tensor) -> list[Score]:
        reached = kept >= whole[:, None]
        smallest = torch.tensor(self.areas, dtype=torch.float64, device=kept.device)[reached.long().argmax(1)]
        values = {"monotone": monotone_scores(kept, whole), "smallest_area": smallest.masked_fill(~reached.any(1), torch.nan)}
        return scores(rows, classes, values, {"preserved": kept}, digits=5)

    def _area_masks(self, maps: Maps, images: Tensor, rows: Tensor, classes: Tensor) -> Tensor:
        if has_area_masks(maps.method, self.areas):
            attributor: Any = maps.method.attributor
            parts = zip(images.split(maps.method.batch_size), classes.split(maps.method.batch_size), strict=True)
            return torch.cat([attributor.masks(i, k, generator=maps.generator()).masks for i, k in parts])
        return top_masks(maps.saliency(rows, classes), self.areas)


def has_area_masks(method: Method, areas: Sequence[float]) -> bool:
    """Whether the method optimises one mask for each of these areas."""
    own = getattr(method.attributor, "areas", None)
    return callable(getattr(method.attributor, "masks", None)) and own is not None and [float(a) for a in own] == [float(a) for a in areas]
