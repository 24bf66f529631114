"""Class-specific masking: Table 1 of Stalder et al., NeurIPS 2022.

Row t, column k: mean over thresholds of the score of class t on the image cut to the mask of class k; the last column is the whole image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from explainer.errors import ConfigError
from explainer.evaluation.protocol import Column, Mode, Protocol, Score, scores
from explainer.evaluation.scene import Maps, Scene
from explainer.fills import FillKind
from explainer.metrics.classifier import Output
from explainer.metrics.masking_matrix import masking_scores


class MaskingMatrix(Protocol):
    """One row per label of an image, with the matrix row in percent.

    Args:
        mode: no differences.
        classes: class numbers (the paper: five VOC classes); None: all.
        fill: replaces removed pixels.
        output: softmax in the paper.
    """

    name = "masking_matrix"
    heading = "Class-specific masking"
    question = "Does the mask of one class keep that class and remove the others?"
    source = "Stalder et al. 2022, Table 1"
    uses_scale = True

    def __init__(
        self, mode: Mode = "corrected", classes: Sequence[int] | None = None, fill: FillKind = "mean", output: Output = "softmax"
    ) -> None:
        super().__init__(mode)
        self.classes = None if classes is None else list(classes)
        self.fill: FillKind = fill
        self.output: Output = output

    def columns(self) -> dict[str, Column]:
        """Summaries of the matrix: mean of the diagonal, of the other masks and of the column "none"."""
        return {
            "own": Column("own mask", True, percent=True, average="classes"),
            "foreign": Column("other masks", False, percent=True, average="classes"),
            "none": Column("whole image", None, percent=True, average="classes"),
        }

    def axes(self, class_names: tuple[str, ...]) -> dict[str, list[Any]]:
        """Columns of the matrix."""
        return {"masking": [*(class_names[k] for k in self._chosen(len(class_names))), "none"]}

    def wanted(self, scene: Scene) -> Tensor:
        """The chosen classes of images that contain one of them."""
        chosen = torch.zeros_like(scene.labels)
        chosen[:, self._chosen(scene.labels.shape[1])] = True
        return chosen & (scene.labels & chosen).any(1, keepdim=True)

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """See the module's text."""
        assert maps is not None
        chosen = self._chosen(scene.labels.shape[1])
        images = self.wanted(scene).any(1).nonzero()[:, 0]
        if len(images) == 0:
            return []
        targets = scene.labels[images].to(scene.images)
        masks = maps.class_masks()[images]
        matrix = masking_scores(
            scene.explanandum, scene.images[images], masks, targets, classes=chosen, rescale=False, fill=self.fill, output=self.output
        )
        row, label = scene.labels[images][:, chosen].nonzero(as_tuple=True)
        lines = matrix[row, label]
        own = lines.gather(1, label[:, None])[:, 0]
        number = len(chosen)
        foreign = (lines[:, :number].sum(1) - own) / (number - 1) if number > 1 else torch.full_like(own, torch.nan)
        classes = torch.tensor(chosen, device=label.device)[label]
        values = {"own": own, "foreign": foreign, "none": lines[:, -1]}
        return scores(images[row], classes, values, {"masking": 100 * lines}, digits=7)

    def _chosen(self, number: int) -> list[int]:
        chosen = list(range(number)) if self.classes is None else self.classes
        if not chosen or min(chosen) < 0 or max(chosen) >= number:
            raise ConfigError(f"masking_matrix: classes must be numbers in 0..{number - 1}, received {self.classes}.")
        return chosen
