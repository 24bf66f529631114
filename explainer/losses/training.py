"""The loss a classifier is trained with before it is explained: cross-entropy, for imbalanced classes too. Pure functions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from explainer.errors import ConfigError


def classifier_loss(
    logits: Tensor,
    targets: Tensor,
    task: Literal["multilabel", "multiclass"],
    *,
    class_weights: Tensor | None = None,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of images ``[B]``, one number, with weights per class and focal weighting (Lin et al., ICCV 2017, eq. 4 and 5).

    Single-label, with p = softmax(logits), w the weights and t the targets after smoothing:
    ``sum_bk w_k t_bk (1 - p_bk)^gamma (-log p_bk) / sum_bk w_k t_bk``. Multi-label, with p = sigmoid(logits):
    ``mean_bk [ w_k t_bk (1 - p_bk)^gamma (-log p_bk) + (1 - t_bk) p_bk^gamma (-log(1 - p_bk)) ]``: weights there act on the images
    that have the class, so that w_k = (images without it) / (images with it) balances the two.

    Args:
        logits: ``[B,K]``.
        targets: ``[B,K]`` in [0,1]; single-label rows sum to 1.
        task: softmax or sigmoid.
        class_weights: ``[K]``, positive; None weighs all alike.
        gamma: exponent in the focal loss; 0 is cross-entropy.
        label_smoothing: s in [0,1): targets become ``(1 - s) t + s / K`` (single-label) or ``(1 - s) t + s / 2``.
    """
    K = logits.shape[1]
    if label_smoothing > 0:
        targets = (1 - label_smoothing) * targets + label_smoothing / (K if task == "multiclass" else 2)
    weights = logits.new_ones(K) if class_weights is None else class_weights.to(logits)
    if task == "multilabel":
        if gamma == 0:
            return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=class_weights)
        present = weights * targets * torch.sigmoid(-logits) ** gamma * -F.logsigmoid(logits)
        absent = (1 - targets) * torch.sigmoid(logits) ** gamma * -F.logsigmoid(-logits)
        return (present + absent).mean()
    if gamma == 0 and class_weights is None:
        return F.cross_entropy(logits, targets)
    log_p = F.log_softmax(logits, dim=1)
    each = weights * targets * (1 - log_p.exp()) ** gamma * -log_p
    return each.sum() / (weights * targets).sum()


def balanced_weights(counts: Tensor, images: int, task: Literal["multilabel", "multiclass"]) -> Tensor:
    """Weights ``[K]`` under which every class counts alike.

    Single-label: ``N / (K n_k)`` (mean over the images 1). Multi-label: ``(N - n_k) / n_k``, at least 1/100 and at most 100.

    Args:
        counts: n_k, images of each class, ``[K]``.
        images: N.
        task: decides the formula.

    Raises:
        ConfigError: a class has no image.
    """
    if bool((counts <= 0).any()):
        empty = [str(k) for k in (counts <= 0).nonzero().flatten().tolist()]
        raise ConfigError(
            f"class_weights: balanced needs images of every class; there is none of class number {', '.join(empty)} in the training split."
        )
    counts = counts.float()
    if task == "multiclass":
        return images / (len(counts) * counts)
    return ((images - counts) / counts).clamp(0.01, 100.0)
