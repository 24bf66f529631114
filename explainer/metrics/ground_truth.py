"""How a mask meets its ground truth: shapes are checked, void pixels drop out, thresholds keep NaN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from explainer.errors import ShapeError

#: 0.1, 0.2, ... 0.9 with the rounding of ``numpy.arange(0.1, 1, 0.1)`` that the paper's code compares with.
THRESHOLDS: tuple[float, ...] = tuple(0.1 + 0.1 * i for i in range(9))


class Pixels(NamedTuple):
    """Mask and ground truth of the pixels that count; ``[B,N]`` float64, 0 at void pixels."""

    mask: Tensor
    truth: Tensor
    weight: Tensor

    def ratio(self, numerator: Tensor, denominator: Tensor, empty: float = torch.nan) -> Tensor:
        """``numerator / denominator`` ``[B]``; ``empty`` where the denominator is 0; NaN where every pixel is void."""
        value = torch.where(denominator == 0, torch.full_like(denominator, empty) + 0 * numerator, numerator / denominator)
        return torch.where(self.weight.sum(1) == 0, torch.full_like(value, torch.nan), value)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the pixels that count, ``[B]``."""
        return self.ratio((values * self.weight).sum(1), self.weight.sum(1))

    def above(self, threshold: float) -> Pixels:
        """Both binarised, strictly above ``threshold``; NaN stays NaN."""
        return Pixels(_above(self.mask, threshold) * self.weight, _above(self.truth, threshold) * self.weight, self.weight)

    def counts_above(self, thresholds: Sequence[float]) -> tuple[Tensor, Tensor]:
        """How many pixels lie strictly above each threshold in both, and in either, ``[B,T]`` each; the first is NaN where a value is NaN.

        How many thresholds lie below a value says at which it counts, so that the pixels are read once for all thresholds.
        """
        at, place = torch.tensor(list(thresholds), dtype=torch.float64, device=self.mask.device).sort()
        m, g = (torch.bucketize(values.contiguous(), at) * (self.weight > 0) for values in (self.mask, self.truth))
        both, either = (_above_each(levels, len(at))[:, place.argsort()] for levels in (torch.minimum(m, g), torch.maximum(m, g)))
        unknown = (self.mask + self.truth).isnan().any(1)
        return both.masked_fill(unknown[:, None], torch.nan), either


def align(mask: Tensor, truth: Tensor, void: Tensor | None = None) -> Pixels:
    """Flatten mask, ground truth and void of ``[B,H,W]`` each.

    float64, because thresholds such as 0.3 are compared exactly and sums over 50 000 pixels lose digits in float32.
    """
    for label, value in (("truth", truth), ("void", void)):
        if value is not None and value.shape != mask.shape:
            raise ShapeError(f"{label} is {tuple(value.shape)} but the mask is {tuple(mask.shape)}; both must be (B,H,W).")
    if mask.ndim != 3:
        raise ShapeError(f"the mask is {tuple(mask.shape)}, expected (B,H,W): select one class per image or add the batch axis.")
    valid = torch.ones_like(mask, dtype=torch.bool) if void is None else ~void.bool()
    zero = torch.zeros((), dtype=torch.float64, device=mask.device)
    flat = [torch.where(valid, value.double(), zero).flatten(1) for value in (mask, truth, torch.ones_like(mask))]
    return Pixels(*flat)


def _above(values: Tensor, threshold: float) -> Tensor:
    return torch.where(values.isnan(), values, (values > threshold).to(values.dtype))


def _above_each(levels: Tensor, number: int) -> Tensor:
    """How many entries of ``[B,N]`` are above 0, 1, .. ``number`` - 1, ``[B,number]`` float64."""
    counts = torch.zeros(len(levels), number + 1, dtype=torch.long, device=levels.device)
    counts.scatter_add_(1, levels, torch.ones_like(levels))
    return counts.flip(1).cumsum(1).flip(1)[:, 1:].double()
