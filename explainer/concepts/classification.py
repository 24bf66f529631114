"""Does the image show the concept? A linear probe on pooled activations (equation 5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_accuracy, binary_auroc

from explainer.data.samplers import sample_seed


@dataclass
class Features:
    """Pooled activations and how they were scaled.

    Attributes:
        values: ``[N,K]`` float32; ``sum_k w_k values_k + b`` is the logit.
        mean, std: ``[K]``, of the training split; 0 and 1 for raw features.
    """

    values: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, train: Tensor, standardize: bool) -> Features:
        """From the pooled activations ``[N,K]`` of the training split. A filter that never changes is left as it is (std 1)."""
        if not standardize:
            return cls(train, torch.zeros(train.shape[1]), torch.ones(train.shape[1]))
        std = train.std(0, unbiased=False)
        std = torch.where(std > 1e-8, std, torch.ones_like(std))
        return cls((train - train.mean(0)) / std, train.mean(0), std)

    def of_split(self, pooled: Tensor) -> Tensor:
        """Another split in the same units, ``[N,K]``."""
        return (pooled - self.mean) / self.std

    def raw(self, weights: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The same logit's weights ``[K]`` and bias for activations as they are."""
        own = weights / self.std
        return own, bias - (own * self.mean).sum()


def balanced(labels: Tensor, seed: int, *key: int) -> Tensor:
    """All images of the rarer answer and as many of the other, drawn without replacement and shuffled, as indices ``[n]``.

    Args:
        labels: ``[N]`` bool.
        seed, key: what the draw depends on (the seed, the concept and the epoch).
    """
    generator = torch.Generator().manual_seed(sample_seed(seed, *key))
    yes, no = labels.nonzero().flatten(), (~labels).nonzero().flatten()
    number = min(len(yes), len(no))
    drawn = [side[torch.randperm(len(side), generator=generator)[:number]] for side in (yes, no)]
    both = torch.cat(drawn)
    return both[torch.randperm(len(both), generator=generator)]


def classification_loss(values: Tensor, labels: Tensor, weights: Tensor, bias: Tensor | None, even: bool) -> Tensor:
    """Binary cross-entropy of the logits, mean over images.

    Args:
        values: ``[n,K]``.
        labels: ``[n]`` bool.
        weights: ``[K]``.
        bias: one number, or None.
        even: positives and negatives weigh the same in total, whatever their numbers: what balanced draws amount to on average.
    """
    logits = values @ weights
    if bias is not None:
        logits = logits + bias
    each = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
    if not even:
        return each.mean()
    sides = [each[labels], each[~labels]]
    return torch.stack([s.mean() for s in sides if len(s)]).mean()


def classification_scores(logits: Tensor, labels: Tensor, seed: int, concept: int) -> tuple[float, float]:
    """``(accuracy at 1/2 on a balanced part, area under ROC on all)`` of a validation split; NaN where one answer is missing.

    Args:
        logits: ``[N]``.
        labels: ``[N]`` bool.
        seed, concept: fix the balanced part.
    """
    if bool(labels.all()) or not bool(labels.any()):
        return float("nan"), float("nan")
    part = balanced(labels, seed, concept)
    accuracy = binary_accuracy((logits[part] > 0).long(), labels[part].long())
    return float(accuracy), float(binary_auroc(logits.sigmoid().double(), labels.long()))
