"""What a search of extremal masks found, and the smallest area that suffices (Fong, Patrick and Vedaldi, ICCV 2019, eq. 5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from explainer.baselines.kernels.mask_search import History


@dataclass(frozen=True)
class ExtremalMasks:
    """Masks of several areas and what they achieve.

    Attributes:
        masks: ``[B,A,H,W]`` in [0,1].
        rewards: ``[B,A]``, the game's reward of each mask on the unflipped image.
        preserved: ``[B,A]``, the class's logit of the image seen through the mask, whatever the reward.
        original: ``[B]``, the class's logit of the untouched image.
        areas: A fractions of the image.
        parameters: ``[B,A,h,w]``, grid parameters: a later search can start from them.
        iterations: ``[B,A]``, iterations that each mask took.
        history: ``reward`` and ``area`` (the penalty R_a, unweighted) per iteration, ``[T,B*A]``.
    """

    masks: Tensor
    rewards: Tensor
    preserved: Tensor
    original: Tensor
    areas: tuple[float, ...]
    parameters: Tensor
    iterations: Tensor
    history: History

    def smallest_area(self, tau: float = 1.0) -> Tensor:
        """a* of each image ``[B]``: the smallest area whose preserved logit is at least ``tau`` times the image's; NaN if none is."""
        found, reached = smallest_sufficient(self.preserved, self.original, self.areas, tau)
        return torch.tensor(self.areas, dtype=self.original.dtype, device=found.device)[found].masked_fill(~reached, torch.nan)

    def smallest_masks(self, tau: float = 1.0) -> Tensor:
        """m_a* of each image, ``[B,H,W]``; the largest area's mask where none suffices (see :meth:`smallest_area`)."""
        found, _ = smallest_sufficient(self.preserved, self.original, self.areas, tau)
        return self.masks[torch.arange(len(found), device=found.device), found]


def smallest_sufficient(preserved: Tensor, original: Tensor, areas: tuple[float, ...], tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """Eq. 5, ``a* = min {a : Phi(m_a x) >= Phi_0}`` with ``Phi_0 = tau Phi(x)``.

    Args:
        preserved: ``[B,A]``, the class's logit behind each mask.
        original: ``[B]``, the class's logit of the image.
        areas: A areas in any order.
        tau: share of the image's logit that suffices.

    Returns:
        Index of a* ``[B]``, the largest area's where none suffices, and whether one does ``[B]`` bool.
    """
    order = torch.tensor(sorted(range(len(areas)), key=lambda k: areas[k]), device=preserved.device)
    reached = preserved[:, order] >= tau * original[:, None]
    first = torch.where(reached.any(1), reached.to(torch.uint8).argmax(1), len(areas) - 1)
    return order[first], reached.any(1)
