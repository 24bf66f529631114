"""Segmentation by the target mask: Table 2 of Stalder et al., NeurIPS 2022, and the same per class.

Acc, IoU, MAE and Sal per image, with the merged mask of the explained classes against the union of their objects. The mode "corrected"
leaves void pixels out; "paper" and "code" count them as object, as the published evaluation did, and an empty union as IoU 0 ("code").
Otherwise an image without object pixels has no IoU and no F1, whatever the mask: else a row that shows nothing would be averaged over
fewer images than a row that shows something.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from explainer.errors import ConfigError
from explainer.evaluation.protocol import Column, Mode, Protocol, Score, scores
from explainer.evaluation.scene import Maps, Scene
from explainer.fills import FillKind
from explainer.metrics.auc import roc_auc
from explainer.metrics.coverage import background_coverage, object_coverage
from explainer.metrics.f1 import f1
from explainer.metrics.sal import sal
from explainer.metrics.segmentation import iou, iou_curve, mean_absolute_error, soft_accuracy, soft_iou

#: Among which the best threshold is looked for.
_SEARCHED = tuple(round(0.05 * i, 2) for i in range(1, 20))
_COLUMNS = {
    "acc": Column("Acc", True, percent=True),
    "iou": Column("IoU", True, percent=True),
    "iou_at": Column("IoU@t", True, percent=True),
    "mae": Column("MAE", False, percent=True),
    "sal": Column("Sal", False),
    "f1": Column("F1@t", True, percent=True),
    "auc": Column("AUC", True, percent=True),
    "object": Column("object kept", True, percent=True),
    "background": Column("background kept", False, percent=True),
    "area": Column("area", None, percent=True),
}


class Segmentation(Protocol):
    """One row per image.

    Args:
        mode: which published version; see the module's text.
        threshold: mask values above it count as object, in ``iou_at`` and ``f1``.
        thresholds: a method's own threshold by its label (``grad_cam``) or label and scale (``grad_cam/minmax``), for methods whose values
            have no unit. Choose them on validation images (``--split val``, column "best t" of ``segmentation_per_class``).
        fill: replaces removed pixels for Sal.
    """

    name = "segmentation"
    heading = "Agreement with the objects"
    question = "How well the mask matches the object's pixels."
    source = "Stalder et al. 2022, Table 2"
    needs_truth = True
    uses_scale = True

    def __init__(
        self, mode: Mode = "corrected", threshold: float = 0.5, fill: FillKind = "mean", thresholds: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(mode)
        for label, value in {"threshold": threshold, **dict(thresholds or {})}.items():
            if not 0 <= value <= 1:
                raise ConfigError(f"{self.name}: thresholds must lie in [0,1], received {value} for {label}.")
        self.threshold = threshold
        self.thresholds = dict(thresholds or {})
        self.fill: FillKind = fill

    def columns(self) -> dict[str, Column]:
        """Acc, IoU, MAE, Sal and what explains them."""
        return _COLUMNS

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """See the module's text."""
        assert maps is not None
        mask = maps.merged()
        targets = scene.explained.to(scene.images)
        mask = self.own_row(mask, maps, scene.void())
        values = self.compare(mask, scene.merged_truth, scene.void(), self.threshold_of(maps))
        values["sal"] = sal(scene.explanandum, scene.images, mask, targets, fill=self.fill)
        return scores(len(mask), None, values)

    def threshold_of(self, maps: Maps) -> float:
        """The method's own, or the one of all."""
        label = maps.method.label
        return self.thresholds.get(f"{label}/{maps.scale}", self.thresholds.get(label, self.threshold))

    def compare(self, mask: Tensor, truth: Tensor, void: Tensor | None, threshold: float = 0.5) -> dict[str, Tensor]:
        """The columns that need ground truth, ``[B]`` each."""
        truth, void, unknown = self.treat_void(truth.to(mask), void)
        empty = 0.0 if self.mode == "code" else torch.nan
        values = {
            "acc": soft_accuracy(mask, truth, void),
            "iou": soft_iou(mask, truth, void, empty),
            "iou_at": iou(mask, truth, void, threshold, empty),
            "mae": mean_absolute_error(mask, truth, void),
            "f1": f1(mask, truth, void, threshold, empty),
            "auc": roc_auc(mask, truth, void),
            "object": object_coverage(mask, truth, void),
            "background": background_coverage(mask, truth, void),
            "area": mask.double().mean((1, 2)),
        }
        if self.mode != "code":
            absent = (truth if void is None else truth * (1 - void.to(truth))).flatten(1).amax(1) == 0
            values |= {name: values[name].masked_fill(absent, torch.nan) for name in ("iou", "iou_at", "f1")}
        return values if unknown is None else {k: v.masked_fill(unknown, torch.nan) for k, v in values.items()}

    def own_row(self, mask: Tensor, maps: Maps, void: Tensor | None) -> Tensor:
        """The mask of the row ``ground_truth`` is what is scored against, void pixels included where they count as object."""
        if maps.method.needs_truth and void is not None and self.mode != "corrected":
            return torch.maximum(mask, void.to(mask))
        return mask

    def treat_void(self, truth: Tensor, void: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``(ground truth, void, images without ground truth)`` as the mode says."""
        if void is None or self.mode == "corrected":
            return truth, void, None
        return torch.maximum(truth, void.to(truth)), None, void.flatten(1).all(1)


class SegmentationPerClass(Segmentation):
    """One row per explained class of an image: the class's own mask against its own object; options as :class:`Segmentation`."""

    name = "segmentation_per_class"
    heading = "Agreement with the objects, by class"
    question = "One mask per class, compared with that class's pixels."
    source = "Stalder et al. 2022, Table 2, per class"

    def columns(self) -> dict[str, Column]:
        """As per image, with the means over classes."""
        extra = {
            "class_iou": Column("IoU, mean of classes", True, percent=True, average="classes", value="iou"),
            "class_iou_at": Column("IoU@t, mean of classes", True, percent=True, average="classes", value="iou_at"),
            "best_threshold": Column("best t", None, counts=("curve", 0)),
            "best_iou": Column("IoU at best t, mean of classes", True, percent=True, counts=("curve", 1)),
        }
        return {**_COLUMNS, **extra}

    def axes(self, class_names: tuple[str, ...]) -> dict[str, list[Any]]:
        """For each class its IoU at each of the thresholds, summed, and the number of its objects."""
        return {"curve": [f"{name} {at}" for name in class_names for at in (*_SEARCHED, "objects")]}

    def from_counts(self, vector: str, summed: Tensor) -> Tensor:
        """The threshold at which the mean over classes is greatest, and that mean: optimistic, choose it on other images."""
        per_class = summed.unflatten(-1, (-1, len(_SEARCHED) + 1))
        curve = (per_class[..., :-1] / per_class[..., -1:]).nanmean(dim=-2)
        best, at = curve.max(dim=-1)
        return torch.stack([torch.tensor(_SEARCHED, dtype=best.dtype, device=best.device)[at], best], dim=-1)

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """Agreement of the mask with the class's pixels: one row per image and explained class."""
        assert maps is not None
        rows, classes = scene.pairs
        if len(rows) == 0:
            return []
        mask = maps.mask(rows, classes)
        mask = self.own_row(mask, maps, scene.void(rows))
        values = self.compare(mask, scene.truth(rows, classes), scene.void(rows), self.threshold_of(maps))
        one_hot = torch.nn.functional.one_hot(classes, scene.labels.shape[1]).to(scene.images)
        values["sal"] = sal(scene.explanandum, scene.images[rows], mask, one_hot, fill=self.fill)
        return scores(rows, classes, values, {"curve": self._curves(mask, values["iou"], scene, rows, classes)}, digits=4)

    def _curves(self, mask: Tensor, found: Tensor, scene: Scene, rows: Tensor, classes: Tensor) -> Tensor:
        """IoU at each threshold and a 1, in the place of the row's class, ``[P, K (T+1)]``; nothing where there is no object."""
        truth, void, _ = self.treat_void(scene.truth(rows, classes).to(mask), scene.void(rows))
        curve = iou_curve(mask, truth, void, _SEARCHED, 0.0).double()
        known = found.isfinite().to(curve)[:, None]
        own = torch.cat([curve.nan_to_num(0.0), torch.ones_like(curve[:, :1])], dim=1) * known
        out = own.new_zeros(len(rows), scene.labels.shape[1], own.shape[1])
        out[torch.arange(len(rows), device=out.device), classes] = own
        return out.flatten(1)
