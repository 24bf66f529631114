"""Segmentation of a concept by one filter (section 3.2) and by a weighted combination of filters (section 3.3)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from explainer.concepts.iou import SetIoU, iou_counts, ratio
from explainer.concepts.store import ConceptMasks
from explainer.concepts.supports import Supports, upsample

_FILTERS = 256  # whose masks of an image are compared at once


def single_filter_scores(supports: Supports, truth: ConceptMasks) -> Tensor:
    """``IoU_set(c; M_k)`` of every concept and filter on the images that show the concept, ``[C,K]``.

    ``M_k(x) = up(I_k(x)) > 1/2``: the threshold stands before the upsampling. A concept without masks has zeros.
    """
    C, K = truth.labels.shape[1], supports.K
    intersection, union = (torch.zeros(C, K, dtype=torch.float64) for _ in range(2))
    for image in (truth.rows >= 0).any(1).nonzero().flatten().split(1):
        concepts = (truth.rows[image[0]] >= 0).nonzero().flatten()
        target = torch.cat([truth.masks(int(c), image) for c in concepts]).flatten(1).float()
        valid = truth.valid(image)
        if valid is not None:
            target = target * valid.flatten(1)
        # A filter that is on nowhere has no pixel: its union is the concept's.
        union[concepts] += target.sum(1, dtype=torch.float64)[:, None]
        indicators = supports.indicators(image)[0]
        on = indicators.flatten(1).any(1).nonzero().flatten()
        for some in on.split(_FILTERS):
            mask = (upsample(indicators[some], truth.side) > 0.5).flatten(1).float()
            if valid is not None:
                mask = mask * valid.flatten(1)
            both = (target @ mask.T).double()
            intersection[concepts[:, None], some] += both
            union[concepts[:, None], some] += mask.sum(1) - both
    return ratio(intersection, union).float()


def best_filter(scores: Tensor) -> int:
    """``k* = argmax_k`` of training scores ``[K]``, the lowest index on ties. Never choose it on the validation split."""
    return int((scores == scores.max()).nonzero()[0])


def filter_mask(supports: Supports, truth: ConceptMasks, images: Tensor, k: int) -> Tensor:
    """``M_k`` of some images, ``[n,hs,ws]`` bool."""
    one = torch.zeros(supports.K)
    one[k] = 1
    return upsample(supports.only(images).combine(one), truth.side) > 0.5


def combination_logits(part: Supports, weights: Tensor, bias: Tensor | None, side: tuple[int, int]) -> Tensor:
    """``z = up(sum_k w_k I_k + b)``, ``[n,hs,ws]``: combine first, upsample one map."""
    low = part.combine(weights)
    return upsample(low if bias is None else low + bias, side)


def background_share(truth: ConceptMasks, concept: int, images: Tensor) -> float:
    """``alpha = 1 - mean |L_c| / S`` over training images; 1 where the masks are everything, so that foreground still counts."""
    share = float(truth.masks(concept, images).flatten(1).float().mean(1).mean())
    return 1 - share


def segmentation_loss(logits: Tensor, target: Tensor, alpha: float, kind: Literal["linear", "bce"], valid: Tensor | None = None) -> Tensor:
    """Equation 4, summed over pixels, mean over images.

    ``- [alpha M L + (1 - alpha) (1 - M) (1 - L)]`` with ``M = sigmoid(z)``. The paper calls it a cross-entropy, but neither it nor its code
    takes logarithms: ``linear``. ``bce`` has ``log M`` and ``log (1 - M)`` in their places.

    Args:
        logits: ``[n,hs,ws]``.
        target: ``[n,hs,ws]`` bool.
        alpha: weight of the concept's pixels against the others; see :func:`background_share`; 0 (the masks are everything) leaves the
            weights out.
        kind: ``linear`` (equation 4 as printed) or ``bce`` (with logarithms).
        valid: ``[n,hs,ws]`` bool, pixels that count; None: all.
    """
    inside, outside = (1.0, 1.0) if alpha <= 0 else (alpha, 1 - alpha)
    if kind == "linear":
        mask = logits.sigmoid()
        value = -torch.where(target, inside * mask, outside * (1 - mask))
    else:
        value = -torch.where(target, inside * F.logsigmoid(logits), outside * F.logsigmoid(-logits))
    if valid is not None:
        value = value * valid
    return value.sum() / len(logits)


def combination_counts(
    supports: Supports, truth: ConceptMasks, concept: int, images: Tensor, *, weights: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Pixels of intersection and union of ``[z > 0]`` with the concept in each image, two ``[n]`` tensors."""
    both, either = [], []
    for some in images.split(64):
        z = combination_logits(supports.only(some), weights, bias, truth.side)
        i, u = iou_counts(z > 0, truth.masks(concept, some), truth.valid(some))
        both.append(i)
        either.append(u)
    return (torch.cat(both), torch.cat(either)) if both else (torch.zeros(0), torch.zeros(0))


def filter_counts(supports: Supports, truth: ConceptMasks, concept: int, images: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same for the single filter ``k``."""
    both, either = [], []
    for some in images.split(64):
        i, u = iou_counts(filter_mask(supports, truth, some, k), truth.masks(concept, some), truth.valid(some))
        both.append(i)
        either.append(u)
    return (torch.cat(both), torch.cat(either)) if both else (torch.zeros(0), torch.zeros(0))


def set_iou(counts: tuple[Tensor, Tensor]) -> float:
    """``IoU_set`` from counts of images."""
    metric = SetIoU()
    metric.update(*counts)
    return float(metric.compute())
