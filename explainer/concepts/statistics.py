"""Numbers about weights and scores: sparsity, sharing of filters, and correlations with their significance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

#: Upper ends of the bins of the sharing histogram: 0, 1, 2-4, 5-9, 10-19, 20-29, 30 and more.
_BINS = ((0, 0), (1, 1), (2, 4), (5, 9), (10, 19), (20, 29), (30, None))


def hoyer(weights: Tensor) -> float:
    """Sparsity ``(sqrt(K) - |w|_1 / |w|_2) / (sqrt(K) - 1)``: 1 for one filter, 0 for all alike; NaN for zeros or K = 1."""
    K, l1, l2 = weights.numel(), float(weights.abs().sum()), float(weights.norm())
    return (math.sqrt(K) - l1 / l2) / (math.sqrt(K) - 1) if l2 > 0 and K > 1 else math.nan


def effective_number(weights: Tensor) -> float:
    """``exp(entropy)`` of ``|w| / |w|_1``: the number of filters that carry the weight; NaN for zeros."""
    total = float(weights.abs().sum())
    return float(torch.special.entr(weights.abs().double() / total).sum().exp()) if total > 0 else math.nan


def sharing(best: Sequence[int], K: int) -> tuple[list[int], list[tuple[str, int]]]:
    """For each of K filters the number of concepts for which it is the single best; and filters by such numbers in bins."""
    served = [0] * K
    for k in best:
        served[k] += 1
    bins = []
    for low, high in _BINS:
        name = f"{low}" if low == high else f"{low} and more" if high is None else f"{low} to {high}"
        bins.append((name, sum(low <= n <= (math.inf if high is None else high) for n in served)))
    return served, bins


def pearson(x: Tensor, y: Tensor) -> tuple[float, float]:
    """``(r, p)`` of two ``[n]`` samples, two-sided; NaN for a constant sample or n < 3.

    Under independence r has the density of ``sin(u)`` with ``u`` of density ``cos(u)^(n-3)``, which is integrated here: the t test's p.
    """
    n = len(x)
    if n < 3 or float(x.std()) == 0 or float(y.std()) == 0:
        return math.nan, math.nan
    r = float(pearson_corrcoef(x.double(), y.double()).clamp(-1, 1))
    return r, _tail(math.asin(abs(r)), n) / _tail(0.0, n)


def _tail(start: float, n: int, steps: int = 4000) -> float:
    u = torch.linspace(start, math.pi / 2, steps, dtype=torch.float64)
    return float(torch.trapezoid(u.cos().clamp(min=0) ** (n - 3), u))


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation of the pairs that are defined; NaN for fewer than three, or a constant side."""
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if len(pairs) < 3 or min(len({p[side] for p in pairs}) for side in (0, 1)) < 2:
        return math.nan
    first, second = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True))
    return float(spearman_corrcoef(first, second))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error over concepts; NaN values are left out, and one value has no error (NaN)."""
    sound = torch.tensor([v for v in values if math.isfinite(v)], dtype=torch.float64)
    if not len(sound):
        return math.nan, math.nan
    return float(sound.mean()), float(sound.std() / math.sqrt(len(sound))) if len(sound) > 1 else math.nan
