"""Is the classification kept under the mask? Micro precision, recall and F over all (image, class) pairs. Stalder et al., 2022, Table 4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from explainer.errors import ConfigError
from explainer.fills import FillKind
from explainer.metrics.base import ImageMean
from explainer.metrics.classifier import Classifier, class_outputs, masked

#: Logit thresholds reported besides the two of the table.
SWEEP: tuple[float, ...] = (-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0)


def micro_counts(logits: Tensor, targets: Tensor, threshold: float | None = 0.0) -> Tensor:
    """True positives, false positives, false negatives, true negatives of each image, ``[B,4]`` float64.

    A class is predicted where its logit is at least ``threshold``; None: only the class of the largest logit (single-label tasks).
    A NaN logit makes the image's counts NaN.
    """
    if threshold is None:
        predicted = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, logits.argmax(1, keepdim=True), True)
    else:
        predicted = logits.double() >= threshold
    actual = targets > 0
    counts = torch.stack([(predicted == p) & (actual == a) for p, a in ((True, True), (True, False), (False, True), (False, False))], 1)
    unknown = logits.isnan().any(1)
    return counts.sum(2).double().masked_fill(unknown[:, None], torch.nan)


def scores_from_counts(counts: Tensor) -> Tensor:
    """Accuracy, precision, recall and F1 of the counts, ``[...,4] -> [...,4]``.

    Precision without predictions, recall without labels and F1 without either are NaN.
    """
    tp, fp, fn, tn = counts.unbind(-1)
    return torch.stack([(tp + tn) / counts.sum(-1), tp / (tp + fp), tp / (tp + fn), 2 * tp / (2 * tp + fp + fn)], dim=-1)


def image_f1(logits: Tensor, targets: Tensor, threshold: float | None = 0.0) -> Tensor:
    """F1 of each image's predicted classes, ``[B]``."""
    return scores_from_counts(micro_counts(logits, targets, threshold))[:, 3]


class ClassificationKept(ImageMean):
    """Micro accuracy, precision, recall and F1 of the whole image and of the masked image. Range [0,1], optimum 1.

    ``compute`` returns a dictionary: ``original/...``, ``masked/...`` and, for each threshold of the sweep, ``masked@-2/...``; the
    value per image is the masked image's F1. For single-label tasks the largest logit is the prediction and thresholds do not matter.
    It is a class and no function because its scores come from counts over all images, not from a mean of values per image.

    Args:
        original_threshold: logit from which a class of the whole image is predicted (0 in the paper).
        masked_threshold: logit from which a class of the masked image is predicted (-1 in the paper).
        sweep: further thresholds for the masked image.
        fill: replaces the removed pixels.
        kwargs: arguments of :class:`torchmetrics.Metric`.
    """

    name = "classification_kept"
    higher_is_better = True
    bounds = (0.0, 1.0)
    optimum = 1.0
    SCORES: ClassVar[tuple[str, ...]] = ("accuracy", "precision", "recall", "f1")
    counts: Tensor

    def __init__(
        self,
        original_threshold: float = 0.0,
        masked_threshold: float = -1.0,
        sweep: Sequence[float] = SWEEP,
        fill: FillKind = "mean",
        **kwargs: Any,
    ) -> None:
        key = f"classification_kept at {original_threshold}, {masked_threshold}, {tuple(sweep)}, fill={fill}"
        super().__init__(key=key, **kwargs)
        if any(t != t for t in (original_threshold, masked_threshold, *sweep)):
            raise ConfigError("thresholds must be numbers, received NaN.")
        self.original_threshold, self.masked_threshold, self.sweep = original_threshold, masked_threshold, tuple(sweep)
        self.fill: FillKind = fill
        self.add_state("counts", torch.zeros(2 + len(self.sweep), 4, dtype=torch.float64), dist_reduce_fx="sum")

    def values(self, explanandum: Classifier, images: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """F1 of each masked image, ``[B]``."""
        return self._values(self._image_counts(explanandum, images, mask, targets))

    def update(self, *args: Any, given: Tensor | None = None, **kwargs: Any) -> None:
        """Add a batch, as ``values`` takes it; ``given`` values per image count in their mean alone."""
        if given is None:
            counts = self._image_counts(*args, **self._own(kwargs))
            usable = ~counts.isnan().any(2).any(1)
            self.counts = self.counts + counts[usable].sum(0).to(self.counts)
            given = self._values(counts)
        super().update(given=given)

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Scores by name."""
        labels = ["original", "masked", *(f"masked@{threshold:g}" for threshold in self.sweep)]
        scores = scores_from_counts(self.counts)
        return {f"{label}/{score}": scores[i, j] for i, label in enumerate(labels) for j, score in enumerate(self.SCORES)}

    def _image_counts(self, explanandum: Classifier, images: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        whole = class_outputs(explanandum, images, "logit")
        cut = class_outputs(explanandum, masked(explanandum, images, mask, self.fill), "logit")
        pairs = [(whole, self.original_threshold), (cut, self.masked_threshold), *((cut, t) for t in self.sweep)]
        single = explanandum.task == "multiclass"
        return torch.stack([micro_counts(logits, targets, None if single else t) for logits, t in pairs], dim=1)

    @staticmethod
    def _values(counts: Tensor) -> Tensor:
        return scores_from_counts(counts[:, 1])[:, 3]
