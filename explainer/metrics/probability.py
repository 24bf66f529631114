"""How decided the classifier is about a masked image: sparsity and entropy of its class probabilities ``[B,K]`` (each row sums to 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from explainer.fills import FillKind
from explainer.metrics.classifier import Classifier, class_outputs, masked
from explainer.metrics.facts import Facts


def prob_sparsity(probabilities: Tensor) -> Tensor:
    """``sum_c p_c^2`` in [1/K,1]: 1 when one class takes all."""
    return probabilities.double().square().sum(1)


def prob_entropy(probabilities: Tensor) -> Tensor:
    """``- sum_c p_c log p_c`` in [0, log K] nats; ``0 log 0 = 0``."""
    p = probabilities.double()
    entropy: Tensor = -torch.special.xlogy(p, p).sum(1)
    return entropy


@Facts("prob_sparsity", higher_is_better=True, bounds=(0.0, 1.0), optimum=1.0)
def masked_sparsity(explanandum: Classifier, images: Tensor, mask: Tensor, *, fill: FillKind | Tensor = "mean") -> Tensor:
    """:func:`prob_sparsity` of the softmax outputs on the masked image, ``[B]`` in [1/K,1]."""
    return prob_sparsity(class_outputs(explanandum, masked(explanandum, images, mask, fill), "softmax"))


@Facts("prob_entropy", higher_is_better=False, bounds=(0.0, float("inf")), optimum=0.0)
def masked_entropy(explanandum: Classifier, images: Tensor, mask: Tensor, *, fill: FillKind | Tensor = "mean") -> Tensor:
    """:func:`prob_entropy` of the softmax outputs on the masked image, ``[B]`` in [0, log K]."""
    return prob_entropy(class_outputs(explanandum, masked(explanandum, images, mask, fill), "softmax"))
