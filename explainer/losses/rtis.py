"""Real-time image saliency (Dabkowski & Gal, NeurIPS 2017), in the multi-label form of Stalder et al.'s public code."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from explainer.errors import ConfigError
from explainer.losses.base import Explanation, LossTerm, Weight
from explainer.losses.total_variation import total_variation


def _log_probability(logits: Tensor, task: str) -> Tensor:
    if task == "multilabel":
        return F.logsigmoid(logits)
    if task == "multiclass":
        return F.log_softmax(logits, dim=1)
    raise ConfigError(f"task must be 'multilabel' or 'multiclass', received {task!r}.")


def preserver_loss(logits: Tensor, targets: Tensor, task: Literal["multilabel", "multiclass"] = "multilabel") -> Tensor:
    """- mean over the (image, present class) pairs of the batch of log p_c, on the image with only the target mask kept.

    Args:
        logits: ``[B,K]``.
        targets: multi-hot ``[B,K]``.

    Returns:
        Scalar >= 0; 0 without any label.
    """
    present = (targets > 0.5).to(logits.dtype)
    return -(_log_probability(logits, task) * present).sum() / present.sum().clamp(min=1)


def destroyer_loss(logits: Tensor, targets: Tensor, power: float = 0.3, task: Literal["multilabel", "multiclass"] = "multilabel") -> Tensor:
    """(mean over the (image, present class) pairs of p_c) ** power, on the image with the target mask removed.

    Computed from log-probabilities: the power's slope is infinite at 0, where a probability that underflows would give NaN.

    Args:
        logits: ``[B,K]``.
        targets: multi-hot ``[B,K]``.
        power: below 1 it keeps pressing when little is left.

    Returns:
        Scalar in [0,1]; 0 without any label.
    """
    present = targets > 0.5
    count = int(present.sum())
    if count == 0:
        return logits.sum() * 0.0
    log_mean = torch.logsumexp(_log_probability(logits, task)[present], dim=0) - math.log(count)
    return (power * log_mean).exp()


class RTIS(LossTerm):
    """The whole objective as one term: ``tv TV2(m) + area A(m) + preserver + destroyer * (...)^power`` (spec: RTIS).

    TV2 sums squared differences with reflect padding, as published. The alternative image is ``masking.fill``: ``alternative`` gives the
    published mixture of blur and coloured noise.

    Args:
        weight: weight of the whole objective.
        tv, area, preserver, destroyer: weights of its parts.
        power: exponent in the destroyer's term.
        padding: how the total variation treats the border.
    """

    name = "rtis"
    needs_passes = True

    def __init__(
        self,
        weight: Weight = 1.0,
        *,
        tv: float = 10.0,
        area: float = 1.0,
        preserver: float = 1.0,
        destroyer: float = 5.0,
        power: float = 0.3,
        padding: Literal["valid", "reflect"] = "reflect",
    ) -> None:
        super().__init__(weight)
        if power <= 0:
            raise ConfigError(f"losses.rtis.power must be positive, received {power}.")
        self.tv, self.area, self.preserver, self.destroyer, self.power = tv, area, preserver, destroyer, power
        self.padding: Literal["valid", "reflect"] = padding

    def value(self, e: Explanation) -> Tensor:
        """Scalar."""
        return (
            self.tv * total_variation(e.target_mask, self.padding, power=2)
            + self.area * e.target_mask.flatten(1).mean(dim=1).mean()
            + self.preserver * preserver_loss(e.logits_masked, e.shown, e.task)
            + self.destroyer * destroyer_loss(e.logits_inverse, e.shown, self.power, e.task)
        )
