"""Negative entropy on the inverse-masked image (Stalder et al. 2022, eq. 3)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from explainer.errors import ConfigError
from explainer.losses.base import Explanation, LossTerm, Weight


def entropy_loss(logits: Tensor, kind: Literal["softmax", "bernoulli"] = "softmax") -> Tensor:
    """L_e: what the mask leaves over should tell the classifier nothing.

    ``softmax``: (1/K) sum_c q_c log q_c with q = softmax(logits), mean over the batch (eq. 3; the published code uses it for
    multi-label classifiers too). Range [-log(K)/K, 0].
    ``bernoulli``: the same with each class's own (q, 1-q), q = sigmoid(logits), averaged over classes. Range [-log 2, 0].

    Log-probabilities come from log_softmax / logsigmoid, not from a clamped logarithm, so that it holds in half precision.

    Args:
        logits: ``[B,K]`` of the image with the target mask removed.

    Returns:
        Scalar <= 0; the minimum is a maximally uncertain classifier.
    """
    if kind == "softmax":
        log_q = F.log_softmax(logits, dim=1)
        return (log_q.exp() * log_q).mean()
    if kind == "bernoulli":
        log_q, log_not_q = F.logsigmoid(logits), F.logsigmoid(-logits)
        return (log_q.exp() * log_q + log_not_q.exp() * log_not_q).mean()
    raise ConfigError(f"kind must be 'softmax' or 'bernoulli', received {kind!r}.")


class Entropy(LossTerm):
    """L_e on the inverse-masked image, over the images all of whose labels were shown (others have evidence left by intention).

    With one class the kind is ``bernoulli``: the softmax of one logit is 1 whatever the mask leaves over.
    """

    name = "entropy"
    needs_passes = True

    def __init__(self, weight: Weight = 1.0, kind: Literal["softmax", "bernoulli"] = "softmax") -> None:
        super().__init__(weight)
        self.kind: Literal["softmax", "bernoulli"] = kind

    def value(self, e: Explanation) -> Tensor:
        """See :func:`entropy_loss`."""
        kind: Literal["softmax", "bernoulli"] = self.kind if e.logits_inverse.shape[1] > 1 else "bernoulli"
        complete = (e.shown == e.targets).all(dim=1)
        if bool(complete.all()):
            return entropy_loss(e.logits_inverse, kind)
        if not bool(complete.any()):
            return e.logits_inverse.sum() * 0.0
        return entropy_loss(e.logits_inverse[complete], kind) * complete.float().mean()
