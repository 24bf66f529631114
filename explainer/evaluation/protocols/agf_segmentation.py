"""Segmentation by raw maps: Table 3 of Gur et al., AAAI 2021 (AGF). Pixel accuracy and mean average precision.

Signed maps are cut at 0, positive-only maps at their mean, unless the method's ``threshold`` says otherwise.
``agf_class_segmentation`` is the multi-label form, in which every pixel shows one class or the background.
"""

from __future__ import annotations

import torch
from torch import Tensor

from explainer.evaluation.protocol import Column, Mode, Protocol, Score, scores
from explainer.evaluation.scene import Maps, Scene
from explainer.metrics.agf_segmentation import mean_average_precision, pixel_accuracy
from explainer.metrics.class_segmentation import class_mean_average_precision, class_pixel_accuracy

_COLUMNS = {
    "pixel_accuracy": Column("pixel accuracy", True, percent=True),
    "mean_average_precision": Column("mAP", True, percent=True),
}


class AGFSegmentation(Protocol):
    """One row per explained class of an image. In single-label data the object is the label's, whichever class the map explains.

    Args:
        mode: "paper" and "code" score the binary segment; "corrected" scores the map itself for mAP, so that its order counts.
    """

    name = "agf_segmentation"
    heading = "Segmentation by ranking"
    question = "Does the map rank the object's pixels above the others?"
    source = "Gur et al. 2021, Table 3"
    needs_truth = True

    def __init__(self, mode: Mode = "corrected") -> None:
        super().__init__(mode)

    def columns(self) -> dict[str, Column]:
        """Pixel accuracy, mAP."""
        return _COLUMNS

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """See the module's text."""
        assert maps is not None
        rows, classes = scene.pairs
        if len(rows) == 0:
            return []
        truth = scene.truth(rows, classes)
        if scene.explanandum.task == "multiclass" and scene.batch.masks is not None:
            truth = scene.batch.masks.amax(1)[rows]
        saliency, void, signed = maps.saliency(rows, classes), scene.void(rows), maps.method.cut_at_zero
        values = {
            "pixel_accuracy": pixel_accuracy(saliency, truth, void, signed),
            "mean_average_precision": mean_average_precision(
                saliency, truth, void, signed, "saliency" if self.mode == "corrected" else "segment"
            ),
        }
        return scores(rows, classes, values)


class AGFClassSegmentation(Protocol):
    """One row per image: all class maps compete, classes that the classifier does not predict with a penalty.

    Args:
        mode: no differences.
    """

    name = "agf_class_segmentation"
    heading = "Segmentation by competition"
    question = "Does each pixel's strongest class map name its class?"
    source = "Gur et al. 2021, multi-label segmentation"
    needs_truth = True

    def __init__(self, mode: Mode = "corrected") -> None:
        super().__init__(mode)

    def columns(self) -> dict[str, Column]:
        """Pixel accuracy, mAP."""
        return _COLUMNS

    def wanted(self, scene: Scene) -> Tensor:
        """All classes."""
        return torch.ones_like(scene.labels)

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """Agreement of each pixel's strongest class map with its class: one row per image."""
        assert maps is not None and scene.batch.masks is not None
        arguments = (maps.raw, scene.logits, scene.batch.masks, scene.void())
        values = {
            "pixel_accuracy": class_pixel_accuracy(*arguments),
            "mean_average_precision": class_mean_average_precision(*arguments),
        }
        return scores(len(maps.raw), None, values)
