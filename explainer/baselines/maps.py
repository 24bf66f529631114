"""From channels at some layer to one map at the image's size: reduction, resizing, smoothing, rescaling."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from explainer.errors import ConfigError

Reduction = Literal["max_abs", "sum", "sum_abs", "mean", "l2"]
Interpolation = Literal["bilinear", "nearest"]


def reduce_channels(channels: Tensor, reduction: Reduction) -> Tensor:
    """``[B,C,h,w]`` -> ``[B,h,w]``.

    ``max_abs`` is TorchRay's (and Simonyan et al.'s) ``max_c |.|``; ``sum`` keeps the sign and the completeness of additive methods
    (captum leaves the channels to its user and sums them for display); ``sum_abs``, ``mean`` and ``l2`` are the other common ones.
    """
    if reduction == "max_abs":
        return channels.abs().amax(1)
    if reduction == "sum":
        return channels.sum(1)
    if reduction == "sum_abs":
        return channels.abs().sum(1)
    if reduction == "mean":
        return channels.mean(1)
    if reduction == "l2":
        return torch.linalg.vector_norm(channels, dim=1)
    raise ConfigError(f"reduction must be one of {', '.join(get_args(Reduction))}, received {reduction!r}.")


def resize_map(maps: Tensor, size: tuple[int, int] | torch.Size, mode: Interpolation = "bilinear") -> Tensor:
    """``[B,h,w]`` -> ``[B,H,W]``; bilinear samples pixel centres (``align_corners=False``, as TorchRay and OpenCV do)."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    if mode not in get_args(Interpolation):
        raise ConfigError(f"interpolation must be one of {', '.join(get_args(Interpolation))}, received {mode!r}.")
    aligned = None if mode == "nearest" else False
    return functional.interpolate(maps[:, None], tuple(size), mode=mode, align_corners=aligned)[:, 0]


def smooth_map(maps: Tensor, fraction: float) -> Tensor:
    """Gaussian blur of ``[B,H,W]`` with sigma = ``fraction`` of the longer side, borders replicated; 0 leaves the map as it is.

    The kernel is cut at ``ceil(4 sigma)`` and sums to one. TorchRay adds the float32 epsilon to ``sqrt(2) sigma``; so do we.
    """
    if fraction < 0:
        raise ConfigError(f"smooth must be at least 0 (a fraction of the longer side), received {fraction}.")
    if fraction == 0:
        return maps
    sigma = fraction * max(maps.shape[-2:])
    radius = math.ceil(4 * sigma)
    steps = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
    kernel = torch.exp(-((steps / (math.sqrt(2) * sigma + torch.finfo(torch.float32).eps)) ** 2))
    kernel = kernel / kernel.sum()
    padded = functional.pad(maps[:, None], [radius] * 4, mode="replicate")
    return functional.conv2d(functional.conv2d(padded, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))[:, 0]


def min_max(maps: Tensor, epsilon: float = 1e-7) -> Tensor:
    """Rescale over the last two axes to [0,1): ``(m - min) / (epsilon + max - min)``; a constant map becomes 0."""
    shifted = maps - maps.amin((-2, -1), keepdim=True)
    return shifted / (epsilon + shifted.amax((-2, -1), keepdim=True))
