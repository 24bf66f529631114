"""Area losses: small masks overall, class masks between a lower and an upper bound (Stalder et al. 2022, eqs. 4-6)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from explainer.errors import ConfigError
from explainer.losses.base import Explanation, LossTerm, Weight

AUTO = "auto"


def mask_area(mask: Tensor) -> Tensor:
    """A(m): mean over pixels, then over the batch (eq. 6).

    Args:
        mask: ``[B,H,W]`` in [0,1].

    Returns:
        Scalar in [0,1].
    """
    return mask.flatten(1).mean(dim=1).mean()


def bound_penalty(masks: Tensor, min_area: float, max_area: float) -> Tensor:
    """Eqs. 4 and 5 for N masks at once.

    With the values sorted in descending order, (1/Z) [ sum_{i < floor(Z a)} (1 - q_i) + sum_{i >= floor(Z b)} q_i ]: the a-share of
    largest values should be 1, everything beyond the b-share should be 0. Only two partial sums are needed, not an order.

    Args:
        masks: ``[N,H,W]`` in [0,1].
        min_area, max_area: a <= b, shares of the image in [0,1].

    Returns:
        ``[N]``, each >= 0.
    """
    _check(min_area, max_area)
    values = masks.flatten(1)
    pixels = values.shape[1]
    low, high = int(pixels * min_area), int(pixels * max_area)
    top = torch.topk(values, max(high, 1), dim=1, sorted=low < high).values[:, :high] if high else values[:, :0]
    beyond_max = values.sum(dim=1) - top.sum(dim=1)
    below_min = (1 - top[:, :low]).sum(dim=1)
    return (below_min + beyond_max) / pixels


def area_bound_loss(
    class_masks: Tensor, targets: Tensor, min_area: float, max_area: float, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """Bound penalty of every present class's own mask (eqs. 4-6).

    Args:
        class_masks: ``[B,K,H,W]`` in [0,1].
        targets: multi-hot ``[B,K]``.
        reduction: over the classes of an image: ``mean`` (eq. 6) or ``sum`` (the published code); then the mean over the batch.

    Returns:
        Scalar >= 0; images without labels contribute 0.
    """
    if reduction not in ("mean", "sum"):
        raise ConfigError(f"reduction must be 'mean' or 'sum', received {reduction!r}.")
    image, label = (targets > 0.5).nonzero(as_tuple=True)
    if len(image) == 0:
        return class_masks.sum() * 0.0
    penalty = bound_penalty(class_masks[image, label], min_area, max_area)
    if reduction == "mean":
        penalty = penalty / (targets > 0.5).sum(dim=1)[image]
    return penalty.sum() / targets.shape[0]


class TargetArea(LossTerm):
    """A(m), the area of the target mask (weight l_m of the published code)."""

    name = "target_area"

    def value(self, e: Explanation) -> Tensor:
        """See :func:`mask_area`."""
        return mask_area(e.target_mask)


class NonTargetArea(LossTerm):
    """A(n), the area of the non-target mask (weight l_n of the published code)."""

    name = "non_target_area"

    def value(self, e: Explanation) -> Tensor:
        """See :func:`mask_area`."""
        return mask_area(e.non_target_mask)


class AreaBound(LossTerm):
    """Bound on every present class's mask (weight l_B of the published code).

    Args:
        weight: see :class:`~explainer.losses.base.LossTerm`.
        min_area, max_area: shares of the image, or ``auto``: each class its own, measured with the classifier's class activation and its
            scores before training (:mod:`explainer.tasks.area_bounds`), never from ground truth.
        reduction: see :func:`area_bound_loss`.
    """

    name = "area_bound"

    def __init__(
        self,
        weight: Weight = 1.0,
        min_area: float | Literal["auto"] = 0.05,
        max_area: float | Literal["auto"] = 0.3,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__(weight)
        for name, value in (("min_area", min_area), ("max_area", max_area)):
            if isinstance(value, str) and value != AUTO:
                raise ConfigError(f"losses.area_bound.{name} must be a share of the image in [0,1] or auto, received {value!r}.")
        if not isinstance(min_area, str) and not isinstance(max_area, str):
            _check(min_area, max_area)
        self.min_area, self.max_area = min_area, max_area
        self.reduction: Literal["mean", "sum"] = reduction
        self.measured: tuple[Tensor, Tensor] | None = None

    @property
    def needs_bounds(self) -> bool:
        """Whether a bound is ``auto`` and was not measured yet."""
        return AUTO in (self.min_area, self.max_area) and self.measured is None

    def use(self, low: Tensor, high: Tensor) -> None:
        """Bounds ``[K]`` each, which take the place of ``auto``; a number that was given stays, and the other one yields to it."""
        if self.min_area != AUTO:
            low = torch.full_like(high, float(self.min_area))
            high = torch.maximum(high, low)
        if self.max_area != AUTO:
            high = torch.full_like(low, float(self.max_area))
            low = torch.minimum(low, high)
        for a, b in zip(low.tolist(), high.tolist(), strict=True):
            _check(a, b)
        self.measured = low, high

    def bounds_of(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of classes ``[P]``.

        Raises:
            ConfigError: a bound is ``auto`` and was not measured.
        """
        if self.measured is not None:
            low, high = (bound.to(classes.device)[classes] for bound in self.measured)
            return low, high
        if isinstance(self.min_area, str) or isinstance(self.max_area, str):
            raise ConfigError(
                "losses.area_bound is auto, and nobody has measured the bounds: explainer.tasks.area_bounds.measure(...) does, or give "
                "min_area and max_area as numbers."
            )
        ones = torch.ones(classes.shape, device=classes.device)
        return ones * self.min_area, ones * self.max_area

    def value(self, e: Explanation) -> Tensor:
        """See :func:`area_bound_loss`; with ``auto`` each class has its own bounds."""
        if not isinstance(self.min_area, str) and not isinstance(self.max_area, str):
            return area_bound_loss(e.class_masks, e.present, self.min_area, self.max_area, self.reduction)
        image, column, label = e.present_pairs()
        total = e.class_masks.sum() * 0.0
        low, high = self.bounds_of(label)
        count = (e.present > 0.5).sum(dim=1)
        for k in label.unique():
            own = label == k
            penalty = bound_penalty(e.class_masks[image[own], column[own]], float(low[own][0]), float(high[own][0]))
            total = total + (penalty / count[image[own]] if self.reduction == "mean" else penalty).sum()
        return total / len(e.targets)


def _check(min_area: float, max_area: float) -> None:
    if not 0 <= min_area <= max_area <= 1:
        raise ConfigError(f"area bounds must satisfy 0 <= min_area <= max_area <= 1, received {min_area} and {max_area}.")
