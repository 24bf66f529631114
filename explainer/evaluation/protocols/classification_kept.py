"""Is the classification kept under the target mask? Table 4 of Stalder et al., NeurIPS 2022: micro precision, recall and F."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from explainer.evaluation.protocol import Column, Mode, Protocol, Score, scores
from explainer.evaluation.scene import Maps, Scene
from explainer.fills import FillKind
from explainer.metrics.classification_kept import SWEEP, micro_counts, scores_from_counts
from explainer.metrics.classifier import class_outputs, masked

_SCORES = ("accuracy", "precision", "recall", "f1")


class ClassificationKept(Protocol):
    """One row per image with the counts (tp, fp, fn, tn) of the whole image and of the masked image at each threshold.

    Args:
        mode: no differences.
        original_threshold, masked_threshold: on the logits (0 and -1 in the paper); without meaning for single-label tasks.
        sweep: further thresholds for the masked image.
        fill: replaces removed pixels.
    """

    name = "classification_kept"
    heading = "Classification kept"
    question = "Is the image still recognised when only the mask is shown?"
    source = "Stalder et al. 2022, Table 4"
    uses_scale = True

    def __init__(
        self,
        mode: Mode = "corrected",
        original_threshold: float = 0.0,
        masked_threshold: float = -1.0,
        sweep: Sequence[float] = SWEEP,
        fill: FillKind = "mean",
    ) -> None:
        super().__init__(mode)
        self.original_threshold, self.masked_threshold, self.sweep = original_threshold, masked_threshold, list(sweep)
        self.fill: FillKind = fill

    def columns(self) -> dict[str, Column]:
        """Scores of the summed counts."""
        names = ["original", "masked", *(f"masked@{t:g}" for t in self.sweep)]
        return {
            f"{name}/{score}": Column(
                f"{score}, {name}", True if name != "original" else None, percent=True, counts=("counts", 4 * i + j), shown=i < 2
            )
            for i, name in enumerate(names)
            for j, score in enumerate(_SCORES)
        }

    def axes(self, class_names: tuple[str, ...]) -> dict[str, list[Any]]:
        """Four counts per threshold."""
        names = ["original", "masked", *(f"masked@{t:g}" for t in self.sweep)]
        return {"counts": [f"{name}/{count}" for name in names for count in ("tp", "fp", "fn", "tn")]}

    def from_counts(self, vector: str, summed: Tensor) -> Tensor:
        """Accuracy, precision, recall and F1 of each group of four counts."""
        return scores_from_counts(summed.unflatten(-1, (-1, 4))).flatten(-2)

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """Counts of right and wrong labels, whole and masked: one row per image."""
        assert maps is not None
        cut = class_outputs(scene.explanandum, masked(scene.explanandum, scene.images, maps.merged(), self.fill), "logit")
        pairs = [(scene.logits, self.original_threshold), (cut, self.masked_threshold), *((cut, t) for t in self.sweep)]
        single = scene.explanandum.task == "multiclass"
        counts = torch.cat([micro_counts(logits, scene.batch.targets, None if single else t) for logits, t in pairs], dim=1)
        return scores(len(counts), None, {"image_f1": scores_from_counts(counts[:, 4:8])[:, 3]}, {"counts": counts})
