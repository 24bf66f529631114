"""Which classes' masks a training step computes: all present ones and, of many absent ones, a random sample."""

from __future__ import annotations

import torch
from torch import Tensor

from explainer.tasks.draws import Draws

ALL, SOME = 100, 20  # of up to ALL classes all masks are computed by default, of more those of SOME absent ones


def sample_classes(targets: Tensor, absent: int | None, draws: Draws) -> Tensor | None:
    """The classes of each image whose masks are computed. An absent class's mask is pushed to zero; a sample of them does that without
    a cost that grows with K.

    Args:
        targets: multi-hot ``[B,K]``.
        absent: how many absent classes an image needs at least; None: all of up to :data:`ALL` classes, :data:`SOME` of more.
        draws: random numbers of the step.

    Returns:
        Class indices ``[B,n]``, each image's present classes first, n = ``absent`` + the largest number of present ones in the batch;
        None where that is all K anyway.
    """
    present = targets > 0.5
    if absent is None:
        absent = targets.shape[1] if targets.shape[1] <= ALL else SOME
    n = absent + int(present.sum(dim=1).max())
    if n >= targets.shape[1]:
        return None
    order = draws.uniform(targets.shape[1]).to(targets.device) + 2.0 * present
    return order.topk(n, dim=1).indices


def of_classes(values: Tensor, classes: Tensor | None) -> Tensor:
    """The columns of ``values`` ``[B,K]`` that belong to ``classes`` ``[B,n]``; all for None."""
    return values if classes is None else torch.gather(values, 1, classes)
