"""Intersection over union of a set of images (equation 2), and of each of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


def iou_counts(predicted: Tensor, truth: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Pixels of intersection and union.

    Args:
        predicted: ``[N,...,H,W]`` bool.
        truth: bool, of a shape that broadcasts to it.
        valid: bool, pixels that count; None: all.

    Returns:
        Two ``[N,...]`` float tensors.
    """
    both, either = predicted & truth, predicted | truth
    if valid is not None:
        both, either = both & valid, either & valid
    return both.sum((-2, -1)).float(), either.sum((-2, -1)).float()


def ratio(intersection: Tensor, union: Tensor) -> Tensor:
    """``intersection / union``, 0 where the union is empty."""
    return torch.where(union > 0, intersection / union.clamp(min=1e-12), torch.zeros_like(union))


class SetIoU(Metric):
    """``sum_x |M and L| / sum_x |M or L|`` over all images seen; 0 if the union is empty. In [0,1], 1 is best.

    Example:
        >>> import torch
        >>> metric = SetIoU()
        >>> truth = torch.tensor([[[1, 0], [0, 0]]]).bool()
        >>> metric.update(*iou_counts(torch.tensor([[[1, 1], [0, 0]]]).bool(), truth))
        >>> metric.update(*iou_counts(torch.tensor([[[0, 0], [0, 0]]]).bool(), truth))
        >>> round(float(metric.compute()), 4)
        0.3333
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self.add_state("intersection", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("union", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    intersection: Tensor
    union: Tensor

    def update(self, intersection: Tensor, union: Tensor) -> None:
        """Add images by their counts (:func:`iou_counts`), ``[N]`` each."""
        self.intersection += intersection.double().sum()
        self.union += union.double().sum()

    def compute(self) -> Tensor:
        """The ratio, ``[]``."""
        return ratio(self.intersection, self.union).float()
