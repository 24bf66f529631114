"""Preparation of raw maps before a metric reads them. Every function keeps NaN and works per image on ``[B,H,W]`` (or ``[B,K,H,W]``).

The order of the SRD paper (section B of its protocol): divide by the maximum, resize bilinearly to the input, clamp to [-1,1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from explainer.errors import ConfigError, ShapeError
from explainer.tensors import min_max

Norm = Literal["max", "max_abs", "min_max", "none"]


def divide_by_max(saliency: Tensor) -> Tensor:
    """``saliency / max`` per map where the maximum is positive; other maps stay as they are."""
    return _divide(saliency, saliency.amax(dim=(-2, -1), keepdim=True))


def divide_by_max_abs(saliency: Tensor) -> Tensor:
    """``saliency / max|saliency|`` per map, in [-1,1]; an all-zero map stays zero."""
    return _divide(saliency, saliency.abs().amax(dim=(-2, -1), keepdim=True))


def clamp(saliency: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Values limited to ``[low, high]``."""
    return saliency.clamp(low, high)


def resize(saliency: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear (align_corners=False) resampling of ``[B,H,W]`` or ``[B,K,H,W]`` to ``size``; unchanged when it fits."""
    if saliency.ndim not in (3, 4):
        raise ShapeError(f"saliency must be [B,H,W] or [B,K,H,W], received {tuple(saliency.shape)}; add the batch axis.")
    if tuple(saliency.shape[-2:]) == tuple(size):
        return saliency
    maps = saliency if saliency.ndim == 4 else saliency.unsqueeze(1)
    maps = torch.nn.functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    return maps if saliency.ndim == 4 else maps.squeeze(1)


def prepare(saliency: Tensor, size: tuple[int, int] | None = None, norm: Norm = "max") -> Tensor:
    """Raw map ``[B,h,w]`` -> normalised, resized, clamped map ``[B,H,W]``.

    Args:
        saliency: raw maps at any resolution.
        size: ``(H, W)`` of the input; None keeps the resolution.
        norm: ``max`` (the SRD paper), ``max_abs`` (Quantus), ``min_max`` (to [0,1]) or ``none``.
    """
    if norm not in get_args(Norm):
        raise ConfigError(f"norm must be one of {', '.join(get_args(Norm))}, received {norm!r}.")
    functions: dict[str, Callable[[Tensor], Tensor]] = {"max": divide_by_max, "max_abs": divide_by_max_abs, "min_max": min_max}
    maps = functions[norm](saliency) if norm in functions else saliency
    return clamp(maps if size is None else resize(maps, size))


def _divide(saliency: Tensor, scale: Tensor) -> Tensor:
    return saliency / torch.where(scale <= 0, torch.ones_like(scale), scale)
