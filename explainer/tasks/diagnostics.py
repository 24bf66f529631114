"""Signs of health of a training step: what masks keep and leave, how grey and how large they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from explainer.losses.base import Explanation


def diagnostics(e: Explanation) -> dict[str, Tensor]:
    """Per-image signs of health, ``[B]`` each.

    ``kept``: share of the shown labels detected through the mask (multi-label: logit >= 0; single-label: the largest logit, as in
    :func:`explainer.metrics.classifier.correct`). ``left``: share of them still detected through the inverse mask. ``drop``: mean
    probability lost between the two. ``grey``: share of target-mask values in [0.1, 0.9]. ``area``: mean of the target mask, ``own_area``:
    mean over the labels' own masks (the target mask is their maximum, and covers all of a picture whose every pixel has a label). All
    but ``grey`` and ``area`` are NaN for images without labels; the first three also where no term asked for the two classifier passes.
    """
    with torch.no_grad():
        shown = e.shown
        count = shown.sum(dim=1)
        probability = torch.sigmoid if e.task == "multilabel" else (lambda logits: logits.softmax(dim=1))
        change = probability(e.logits_masked) - probability(e.logits_inverse)
        unseen = e.logits_masked.detach() * 0  # NaN where the classifier was not run
        return {
            "kept": (_detected(e.logits_masked, e.task) * shown + unseen).sum(dim=1) / count,
            "left": (_detected(e.logits_inverse, e.task) * shown + unseen).sum(dim=1) / count,
            "drop": (change * shown).sum(dim=1) / count,
            "grey": ((e.target_mask > 0.1) & (e.target_mask < 0.9)).float().flatten(1).mean(dim=1),
            "area": e.target_mask.flatten(1).mean(dim=1),
            "own_area": (e.class_masks.flatten(2).mean(dim=2) * e.present).sum(dim=1) / e.present.sum(dim=1),
        }


def _detected(logits: Tensor, task: str) -> Tensor:
    """Classes that logits ``[B,K]`` stand for, bool ``[B,K]``. A single-label classifier's logits have no meaningful zero."""
    return logits >= 0 if task == "multilabel" else nn.functional.one_hot(logits.argmax(dim=1), logits.shape[1]).bool()
