"""How decided the classifier is about a masked image: sparsity and entropy of its class probabilities ``[B,K]`` (each row sums to 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from explainer.fills import FillKind
from explainer.metrics.base import PerImageMetric
from explainer.metrics.classifier import Classifier, class_outputs, masked


def prob_sparsity(probabilities: Tensor) -> Tensor:
    """``sum_c p_c^2`` in [1/K,1]: 1 when one class takes all."""
    return probabilities.double().square().sum(1)


def prob_entropy(probabilities: Tensor) -> Tensor:
    """``- sum_c p_c log p_c`` in [0, log K] nats; ``0 log 0 = 0``."""
    p = probabilities.double()
    entropy: Tensor = -torch.special.xlogy(p, p).sum(1)
    return entropy


class ProbSparsity(PerImageMetric):
    """Mean :func:`prob_sparsity` of softmax outputs on the masked image. Range [0,1], optimum 1."""

    name = "prob_sparsity"
    higher_is_better = True
    bounds = (0.0, 1.0)
    optimum = 1.0

    def __init__(self, fill: FillKind = "mean", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fill: FillKind = fill

    def values(self, explanandum: Classifier, images: Tensor, mask: Tensor) -> Tensor:
        """See :func:`prob_sparsity`."""
        return prob_sparsity(class_outputs(explanandum, masked(explanandum, images, mask, self.fill), "softmax"))


class ProbEntropy(PerImageMetric):
    """Mean :func:`prob_entropy` of softmax outputs on the masked image. Range [0,inf), optimum 0."""

    name = "prob_entropy"
    higher_is_better = False
    bounds = (0.0, float("inf"))
    optimum = 0.0

    def __init__(self, fill: FillKind = "mean", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fill: FillKind = fill

    def values(self, explanandum: Classifier, images: Tensor, mask: Tensor) -> Tensor:
        """See :func:`prob_entropy`."""
        return prob_entropy(class_outputs(explanandum, masked(explanandum, images, mask, self.fill), "softmax"))
