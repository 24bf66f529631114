"""Sparseness: the Gini index of a map. Chalasani et al., ICML 2020; SRD (ICLR 2024) eq. 26."""

from __future__ import annotations

import torch
from torch import Tensor

from explainer.metrics.facts import Facts


@Facts("sparseness", higher_is_better=True, bounds=(0.0, 1.0), optimum=1.0)
def sparseness(saliency: Tensor, offset: float = 0.0) -> Tensor:
    """``sum_k (2k - d - 1) v_(k) / (d sum v)`` with ``v = |saliency|`` sorted ascending and d pixels, ``[B]`` in [0, 1-1/d].

    ``offset`` is added to v (Quantus: 1e-7). A constant map, also all zero, scores 0; one pixel alone scores 1 - 1/d. Maps upsampled from a
    low resolution are less sparse by construction.
    """
    v = saliency.double().abs().flatten(1).sort(dim=1).values + offset
    d = v.shape[1]
    k = torch.arange(1, d + 1, device=v.device, dtype=v.dtype)
    total = v.sum(1)
    value = ((2 * k - d - 1) * v).sum(1) / (d * total)
    # A constant map's terms cancel only up to rounding; 0 is the exact value.
    return torch.where((total == 0) | (v[:, 0] == v[:, -1]), torch.zeros_like(total), value)
