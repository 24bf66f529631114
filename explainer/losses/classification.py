"""Classification loss on the masked image (Stalder et al. 2022, eq. 2)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from explainer.errors import ConfigError
from explainer.losses.base import Explanation, LossTerm


def classification_loss(logits: Tensor, targets: Tensor, task: Literal["multilabel", "multiclass"] = "multilabel") -> Tensor:
    """L_c: does the classifier still see the labels through the mask?

    Multi-label: binary cross-entropy of sigmoid(logits), mean over classes and batch (eq. 2). Multi-class: cross-entropy of
    softmax(logits) against one-hot targets, mean over the batch.

    Args:
        logits: ``[B,K]`` of the image with only the target mask kept.
        targets: multi-hot or one-hot ``[B,K]``.

    Returns:
        Scalar >= 0; 0 is a confident and right classifier.
    """
    if task == "multilabel":
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))
    if task == "multiclass":
        return F.cross_entropy(logits, targets.to(logits.dtype))
    raise ConfigError(f"task must be 'multilabel' or 'multiclass', received {task!r}.")


class Classification(LossTerm):
    """L_c on the masked image, against the classes that were shown."""

    name = "classification"
    needs_passes = True

    def value(self, e: Explanation) -> Tensor:
        """See :func:`classification_loss`. Whether a class without a region is there, several labels an image, a mask cannot decide."""
        if e.task == "multilabel":
            return classification_loss(e.with_region(e.logits_masked), e.with_region(e.shown), e.task)
        return classification_loss(e.logits_masked, e.shown, e.task)


class Remainder(LossTerm):
    """Binary cross-entropy on the inverse-masked image against the labels that were not shown: what is removed must vanish, what is
    not removed must stay. With the ``subset`` option it ties each class mask to its own class; without, it asks for "nothing left".
    With one label an image it needs classes without a region, and asks that what remains is one of them: -log of their summed probability
    (a surface without its defect is free of defects). Ours, not the paper's.
    """

    name = "remainder"
    needs_passes = True

    def value(self, e: Explanation) -> Tensor:
        """Scalar >= 0."""
        if e.task == "multilabel":
            return F.binary_cross_entropy_with_logits(e.with_region(e.logits_inverse), e.with_region(e.targets - e.shown))
        if e.no_region is None:
            raise ConfigError(
                "losses.remainder needs a multilabel classifier, or with a multiclass one the classes that no pixel belongs to "
                "(data.options.no_region); else use losses.entropy."
            )
        rest = e.logits_inverse.logsumexp(dim=1) - e.logits_inverse[:, e.no_region].logsumexp(dim=1)
        return (rest * (e.shown.sum(dim=1) > 0)).mean()
