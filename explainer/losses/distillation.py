"""Distillation: the class masks learn from the maps of other methods (stochastic amortisation: cheap and noisy targets do)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from explainer.errors import ConfigError, ShapeError
from explainer.losses.base import Explanation, LossTerm, Weight

Distance = Literal["bce", "mse", "dice", "jaccard"]
_SMOOTH = 1e-6


def map_distance(masks: Tensor, maps: Tensor, kind: Distance = "bce") -> Tensor:
    """How far each mask is from its target map.

    ``bce``: pixel mean of - t log s - (1-t) log(1-s), less its minimum over s (the entropy of t), so that 0 is a perfect copy of soft
    targets too. ``mse``: pixel mean of (s-t)^2. ``dice``: 1 - (2 sum s t + eps) / (sum s^2 + sum t^2 + eps) (Milletari et al. 2016).
    ``jaccard``: 1 - (sum min(s,t) + eps) / (sum max(s,t) + eps), the soft IoU of evaluation (Ruzicka 1958). Where binary maps disagree
    on a pixel, its least mean distance lies at 0 or 1 there, and that of ``dice`` can lie between.

    Args:
        masks: ``[N,H,W]`` in [0,1].
        maps: ``[N,H,W]`` in [0,1].

    Returns:
        ``[N]``, each >= 0; 0 where the mask is the map.
    """
    s, t = masks.flatten(1), maps.flatten(1).to(masks.dtype)
    if kind == "mse":
        return (s - t).square().mean(dim=1)
    if kind == "dice":
        return 1 - (2 * (s * t).sum(dim=1) + _SMOOTH) / (s.square().sum(dim=1) + t.square().sum(dim=1) + _SMOOTH)
    if kind == "jaccard":
        return 1 - (torch.minimum(s, t).sum(dim=1) + _SMOOTH) / (torch.maximum(s, t).sum(dim=1) + _SMOOTH)
    if kind == "bce":
        # torch's own clamps the logarithm at -100, which keeps the gradient finite at masks of exactly 0 or 1.
        cross = torch.nn.functional.binary_cross_entropy(s, t, reduction="none")
        least = torch.nn.functional.binary_cross_entropy(t, t, reduction="none")
        return (cross - least).mean(dim=1)
    raise ConfigError(f"kind must be one of {', '.join(get_args(Distance))}, received {kind!r}.")


def distillation_loss(class_masks: Tensor, targets: Tensor, teacher: Tensor, kind: Distance = "bce", absent: float = 1.0) -> Tensor:
    """Mean distance of the present classes' masks to the teacher's maps, plus ``absent`` times that of the other masks to 0.

    A class whose map is not finite is unknown: it counts in neither mean. A finite map of an absent class is a target like any other.

    Args:
        class_masks: ``[B,K,H,W]`` in [0,1].
        targets: multi-hot ``[B,K]``.
        teacher: ``[B,K,H,W]`` in [0,1], NaN where there is no map.
        kind: distance of two maps; see :func:`map_distance`.
        absent: weight of pushing the masks of absent classes without map to 0; 0 leaves them alone.

    Returns:
        Scalar >= 0; 0 if no map is known and ``absent`` is 0.
    """
    if teacher.shape != class_masks.shape:
        raise ShapeError(f"teacher must be [B,K,H,W] like class_masks, received {tuple(teacher.shape)} and {tuple(class_masks.shape)}.")
    known = torch.isfinite(teacher).flatten(2).all(dim=2)
    total = class_masks.sum() * 0.0
    if bool(known.any()):
        total = total + map_distance(class_masks[known], teacher[known], kind).mean()
    silent = ~known & (targets <= 0.5)
    if absent > 0 and bool(silent.any()):
        masks = class_masks[silent]
        # Against an empty map a ratio of overlap is 1 whatever the mask, so there the squares are used.
        total = total + absent * map_distance(masks, torch.zeros_like(masks), "mse" if kind in ("dice", "jaccard") else kind).mean()
    return total


class Distillation(LossTerm):
    """Copy ``Explanation.teacher``. A weight schedule makes it a warm-up (``weight: [[0, 1], [0.3, 0]]``); while the weight is 0 the
    teachers are not asked.

    Args:
        weight: number or schedule.
        kind: ``bce``, ``mse``, ``dice`` or ``jaccard``.
        absent: weight of the masks of absent classes without a map; see :func:`distillation_loss`.
    """

    name = "distillation"
    needs_teacher = True

    def __init__(self, weight: Weight = 1.0, kind: Distance = "bce", absent: float = 1.0) -> None:
        super().__init__(weight)
        if kind not in get_args(Distance):
            raise ConfigError(f"losses.distillation.kind must be one of {', '.join(get_args(Distance))}, received {kind!r}.")
        if absent < 0:
            raise ConfigError(f"losses.distillation.absent must not be negative, received {absent}.")
        self.kind: Distance = kind
        self.absent = absent

    def value(self, e: Explanation) -> Tensor:
        """See :func:`distillation_loss`."""
        if e.teacher is None:
            raise ConfigError("losses.distillation needs teachers: add teachers: [{name: grad_cam}] to the configuration.")
        return distillation_loss(e.class_masks, e.present, e.teacher, self.kind, self.absent)
