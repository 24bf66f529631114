"""What a metric asks of the classifier, and masked forward passes.

No score depends on the other images of the batch (the fill ``shuffle`` excepted).
"""

from __future__ import annotations

from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from explainer.attribution import check_class_index
from explainer.errors import ConfigError
from explainer.fills import FillKind, blend, make_fill

Output = Literal["probability", "softmax", "sigmoid", "logit"]


class Classifier(Protocol):
    """The part of ``explainer.Explanandum`` that metrics use."""

    mean: Tensor
    std: Tensor
    num_classes: int

    @property
    def task(self) -> str:
        """``multilabel`` or ``multiclass``."""

    def __call__(self, images: Tensor) -> Tensor:
        """Images ``[B,3,H,W]`` in [0,1] -> logits ``[B,K]``."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """Sigmoid or softmax, as the task says."""


@torch.no_grad()
def class_outputs(explanandum: Classifier, images: Tensor, output: Output = "probability") -> Tensor:
    """Outputs ``[B,K]``: the task's probabilities, softmax (the paper's tables, also for multi-label nets), sigmoid, or logits."""
    if output not in get_args(Output):
        raise ConfigError(f"output must be one of {', '.join(get_args(Output))}, received {output!r}.")
    logits = explanandum(images)
    if output == "probability":
        return explanandum.probabilities(logits)
    return {"softmax": logits.softmax(1), "sigmoid": logits.sigmoid(), "logit": logits}[output]


def class_scores(explanandum: Classifier, images: Tensor, class_index: Tensor | int | list[int], output: Output = "probability") -> Tensor:
    """The output of one class per image, ``[B]``."""
    index = check_class_index(class_index, images, explanandum.num_classes)
    return class_outputs(explanandum, images, output).gather(1, index[:, None])[:, 0]


def predicted_classes(logits: Tensor, task: str, threshold: float = 0.5, at_least_one: bool = True) -> Tensor:
    """Predicted classes, bool ``[B,K]``; the one definition of evaluation, selection and predicted targets.

    Args:
        logits: ``[B,K]``.
        task: ``multiclass``: the class with the largest logit; ``multilabel``: all with a probability of at least ``threshold``.
        threshold: least probability of a predicted class, in (0,1); multi-label only.
        at_least_one: multi-label: the most probable class counts even below the threshold, so that an evaluation leaves no image out.
            ``explainer explain`` and predicted targets leave such an image without a class.
    """
    best = torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]).bool()
    if task == "multiclass":
        return best
    seen = logits.sigmoid() >= threshold
    return seen | best if at_least_one else seen


@torch.no_grad()
def correct(explanandum: Classifier, images: Tensor, class_index: Tensor | int | list[int]) -> Tensor:
    """1.0 where the class is predicted (multi-class: arg max; multi-label: logit >= 0), else 0.0; NaN logits stay NaN. ``[B]``."""
    index = check_class_index(class_index, images, explanandum.num_classes)
    logits = explanandum(images)
    own = logits.gather(1, index[:, None])[:, 0]
    hit = logits.argmax(1) == index if explanandum.task == "multiclass" else own >= 0
    return torch.where(logits.isnan().any(1), torch.full_like(own, torch.nan), hit.to(own.dtype))


def removal_fill(explanandum: Classifier, images: Tensor, fill: FillKind | Tensor) -> Tensor:
    """Replacement colours for :func:`explainer.fills.blend`.

    ``noise`` is one fixed picture for all images, so that scores do not depend on how images are batched. ``shuffle`` needs a second image:
    a batch of one is filled with NaN, which makes the score undefined.
    """
    if isinstance(fill, Tensor):
        return fill.to(images)
    if fill == "noise":
        return make_fill(images[:1], "noise", generator=torch.Generator().manual_seed(0))
    if fill == "shuffle" and len(images) < 2:
        return torch.full_like(images, torch.nan)
    return make_fill(images, fill, mean=explanandum.mean)


def masked(explanandum: Classifier, images: Tensor, mask: Tensor, fill: FillKind | Tensor = "mean") -> Tensor:
    """Images with the pixels outside ``mask`` replaced."""
    return blend(images, mask.to(images), removal_fill(explanandum, images, fill))
