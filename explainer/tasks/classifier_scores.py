"""The scores that a classifier is watched by while it trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassRecall,
    MultilabelAveragePrecision,
    MultilabelConfusionMatrix,
    MultilabelF1Score,
    MultilabelPrecision,
    MultilabelRecall,
)

_IGNORED = -1  # the label that every score leaves out


def nothing(task: str, K: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A prediction that every metric of :func:`scores` ignores."""
    labels = torch.full((1, K) if task == "multilabel" else (1,), _IGNORED, device=device)
    return torch.zeros(1, K, device=device), labels


def scores(task: str, K: int, stage: str) -> MetricCollection:
    """The scores of one stage.

    Args:
        task: ``multilabel`` or ``multiclass``.
        K: number of classes.
        stage: prefix of their names, ``val`` or ``test``.

    Returns:
        A collection that is updated with logits ``[B,K]`` and labels: ``[B,K]`` in {0,1} (multi-label) or class indices ``[B]``.
    """
    prefix = f"{stage}/"
    if task == "multilabel":
        # Their formulas hold for one label, which their check of arguments refuses.
        same: Any = {"ignore_index": _IGNORED, "validate_args": K > 1}
        return MetricCollection(
            {
                "f1": MultilabelF1Score(K, average="micro", **same),
                "precision": MultilabelPrecision(K, average="micro", **same),
                "recall": MultilabelRecall(K, average="micro", **same),
                "confusion": MultilabelConfusionMatrix(K, **same),
                "ap_per_class": MultilabelAveragePrecision(K, average="none", **same),
            },
            prefix=prefix,
        )
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(K, average="micro", ignore_index=_IGNORED),
            "f1": MulticlassF1Score(K, average="macro", ignore_index=_IGNORED),
            "recall_macro": MulticlassRecall(K, average="macro", ignore_index=_IGNORED),
            "confusion": MulticlassConfusionMatrix(K, ignore_index=_IGNORED),
        },
        prefix=prefix,
    )
