"""The pointing game of Fong et al., ICCV 2019 (TorchRay's protocol): all images, and the difficult ones.

A hit is a maximum within the tolerance of the object; the mean over classes is reported. Where the data has boxes (VOC), they are the
object, at the image's original resolution, and a class whose boxes are all marked difficult does not count; otherwise the masks are (for
"paper" and "code" at the original resolution, where the data set can give them).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from explainer.errors import ConfigError
from explainer.evaluation.protocol import Column, Mode, Protocol, Score, scores
from explainer.evaluation.scene import Maps, Scene
from explainer.metrics.pointing_game import difficult, pointing_game
from explainer.metrics.preparation import resize

#: Pixels, for images of about 224 px.
TOLERANCE = 15.0


class PointingGame(Protocol):
    """One row per explained class of an image.

    Args:
        mode: "paper" and "code" take 15 pixels whatever the images' size and, for "code", an object without pixels as a miss;
            "corrected" scales the tolerance with the shorter side (15 at 224) and leaves such images out.
        tolerance: pixels; overrides the mode's.
        truth: ``boxes``, ``masks``, or ``auto``: boxes where the data set has them.
    """

    name = "pointing_game"
    heading = "Pointing game"
    question = "Does the highest point of the map lie on the object?"
    source = "Fong et al. 2019, Table 1"

    def __init__(self, mode: Mode = "corrected", tolerance: float | None = None, truth: Literal["auto", "boxes", "masks"] = "auto") -> None:
        super().__init__(mode)
        if truth not in ("auto", "boxes", "masks"):
            raise ConfigError(f"pointing_game: truth must be auto, boxes or masks, received {truth!r}.")
        if tolerance is not None and not tolerance >= 0:
            raise ConfigError(f"pointing_game: tolerance must be at least 0 pixels, received {tolerance}.")
        self.tolerance, self.truth = tolerance, truth

    def columns(self) -> dict[str, Column]:
        """Accuracy in percent, mean over classes."""
        return {
            "hit": Column("pointing, all", True, percent=True, average="classes"),
            "hit_difficult": Column("pointing, difficult", True, percent=True, average="classes"),
        }

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """See the module's text."""
        assert maps is not None
        rows, classes = scene.pairs
        if len(rows) == 0:
            return []
        source = self._source(scene)
        if source != "masks":
            hit, hard = self._original(scene, maps, rows, classes, source)
        elif scene.batch.masks is None:
            return []
        else:
            truth = scene.truth(rows, classes)
            hit = pointing_game(maps.saliency(rows, classes), truth, scene.void(rows), self._radius(scene.size), self._empty())
            hard = difficult(truth, scene.batch.targets[rows])
        return scores(rows, classes, {"hit": hit, "hit_difficult": hit.masked_fill(~hard, torch.nan)})

    def _empty(self) -> Literal["skip", "miss"]:
        return "miss" if self.mode == "code" else "skip"

    def _radius(self, size: tuple[int, int]) -> float:
        if self.tolerance is not None:
            return self.tolerance
        return TOLERANCE * min(size) / 224 if self.mode == "corrected" else TOLERANCE

    def _source(self, scene: Scene) -> str:
        boxed, original = (callable(getattr(scene.dataset, name, None)) for name in ("boxes", "original_masks"))
        if self.truth == "boxes" and not boxed:
            raise ConfigError("pointing_game: truth is 'boxes', but this data set has no boxes. Use truth: masks.")
        if boxed and self.truth != "masks":
            return "boxes"
        return "original_masks" if original and self.mode != "corrected" else "masks"

    def _original(self, scene: Scene, maps: Maps, rows: Tensor, classes: Tensor, source: str) -> tuple[Tensor, Tensor]:
        hits, hard = [], []
        saliency = maps.saliency(rows, classes).cpu()
        # The photographs are about 500 px, for which the paper's 15 pixels are meant.
        tolerance = TOLERANCE if self.tolerance is None else self.tolerance
        for i, (b, k) in enumerate(zip(rows.tolist(), classes.tolist(), strict=True)):
            read = class_boxes if source == "boxes" else class_mask
            mask, counts = read(scene.dataset, scene.indices[b], k)
            point = on_picture(scene.dataset, scene.indices[b], saliency[i : i + 1], (mask.shape[0], mask.shape[1]))
            hit = pointing_game(point, mask[None].to(point), None, tolerance, self._empty())
            hits.append(hit if counts else torch.full_like(hit, torch.nan))
            hard.append(difficult(mask[None], scene.batch.targets[b : b + 1].cpu()))
        return torch.cat(hits), torch.cat(hard)


def on_picture(dataset: Any, index: int, maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps ``[N,h,w]`` of the data set's image in the pixels of the picture, which has ``size``."""
    moved = getattr(dataset, "geometry", "squash") != "squash" and size != (1, 1)
    return dataset.original_maps(index, maps).to(maps) if moved else resize(maps, size)


def class_boxes(dataset: Any, index: int, label: int) -> tuple[Tensor, bool]:
    """The union ``[H,W]`` bool of a class's boxes at the original resolution, and whether one of them is not marked difficult."""
    height, width = dataset.original_size(index)
    mask, counts = torch.zeros(height, width, dtype=torch.bool), False
    for box in dataset.boxes(index):
        if box.label == label:
            mask[box.y0 : box.y1, box.x0 : box.x1] = True
            counts = counts or not box.difficult
    return mask, counts


def class_mask(dataset: Any, index: int, label: int) -> tuple[Tensor, bool]:
    """The class's pixels ``[H,W]`` bool at the original resolution, and whether the image has ground truth."""
    found = dataset.original_masks(index)
    if found is None:
        return torch.zeros(1, 1, dtype=torch.bool), False
    return found[0][label].bool(), True
