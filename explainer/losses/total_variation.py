"""Total variation: smooth, compact masks (Stalder et al. 2022, eqs. 7 and 8)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from explainer.errors import ConfigError, ShapeError
from explainer.losses.base import Explanation, LossTerm, Weight


def total_variation(mask: Tensor, padding: Literal["valid", "reflect"] = "valid", power: Literal[1, 2] = 1) -> Tensor:
    """TV(m) = (1/Z) sum |vertical difference| + |horizontal difference| (anisotropic), mean over pixels and batch.

    ``reflect`` counts the last row's vertical and the last column's horizontal difference twice, as the published code's 3x3
    convolution with reflect padding does. ``power`` 2 squares the differences (the RTIS objective).

    Args:
        mask: ``[B,H,W]`` in [0,1] with H, W >= 2.

    Returns:
        Scalar >= 0; 0 for constant masks.
    """
    if mask.ndim != 3 or min(mask.shape[1:]) < 2:
        raise ShapeError(f"mask must be [B,H,W] with H, W >= 2, received {tuple(mask.shape)}: drop the channel axis.")
    if padding not in ("valid", "reflect"):
        raise ConfigError(f"padding must be 'valid' or 'reflect', received {padding!r}.")
    vertical = (mask[:, 1:] - mask[:, :-1]).abs() ** power
    horizontal = (mask[:, :, 1:] - mask[:, :, :-1]).abs() ** power
    total = vertical.sum() + horizontal.sum()
    if padding == "reflect":
        total = total + vertical[:, -1].sum() + horizontal[:, :, -1].sum()
    return total / mask.numel()


class TotalVariation(LossTerm):
    """TV of the target mask plus TV of the non-target mask (L_tv)."""

    name = "total_variation"

    def __init__(self, weight: Weight = 1.0, padding: Literal["valid", "reflect"] = "valid") -> None:
        super().__init__(weight)
        self.padding: Literal["valid", "reflect"] = padding

    def value(self, e: Explanation) -> Tensor:
        """See :func:`total_variation`."""
        return total_variation(e.target_mask, self.padding) + total_variation(e.non_target_mask, self.padding)
