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


def _box_mean(values: Tensor, radius: int) -> Tensor:
    """Mean of ``[B,C,H,W]`` over windows of ``2 radius + 1``, at the border over what lies inside. One axis after the other is exact."""
    size = 2 * radius + 1
    rows = functional.avg_pool2d(values, (size, 1), stride=1, padding=(radius, 0), count_include_pad=False)
    return functional.avg_pool2d(rows, (1, size), stride=1, padding=(0, radius), count_include_pad=False)


def guided_filter(maps: Tensor, images: Tensor, radius: float, eps: float = 1e-3) -> Tensor:
    """He, Sun and Tang (ECCV 2010; TPAMI 2013, eq. 19-21, colour guide): in each window the map becomes the linear function of the
    image's channels that fits it best, ``a . I + b``, with ``a = (Cov(I) + eps 1)^-1 cov(I, map)``, and overlapping windows are averaged.

    Args:
        maps: ``[B,H,W]``, or ``[B,n,H,W]`` for several maps of each image; float32 or float64.
        images: the guide ``[B,C,H,W]`` in [0,1], of the same type.
        radius: of the windows, as a share of the longer side (at least one pixel).
        eps: variance of the guide below which a window counts as flat, in squared units of the image.

    Returns:
        As ``maps``; may leave the range of a map by a little.
    """
    if radius <= 0 or eps <= 0:
        raise ConfigError(f"radius (a fraction of the longer side) and eps must be positive, received {radius} and {eps}.")
    if maps.ndim == 3:
        return guided_filter(maps[:, None], images, radius, eps)[:, 0]
    pixels = max(1, round(radius * max(maps.shape[-2:])))
    C = images.shape[1]
    mean_image = _box_mean(images, pixels)
    products = _box_mean((images[:, :, None] * images[:, None]).flatten(1, 2), pixels).unflatten(1, (C, C))
    variance = products - mean_image[:, :, None] * mean_image[:, None]
    damped = variance.permute(0, 3, 4, 1, 2) + eps * torch.eye(C, dtype=maps.dtype, device=maps.device)
    factors = torch.linalg.lu_factor(damped)  # once for all maps of an image
    filtered = []
    for target in maps.split(1, dim=1):
        mean_map = _box_mean(target, pixels)
        covariance = _box_mean(images * target, pixels) - mean_image * mean_map
        slope = torch.linalg.lu_solve(*factors, covariance.permute(0, 2, 3, 1)[..., None])[..., 0].permute(0, 3, 1, 2)
        offset = mean_map - (slope * mean_image).sum(1, keepdim=True)
        filtered.append((_box_mean(slope, pixels) * images).sum(1, keepdim=True) + _box_mean(offset, pixels))
    return torch.cat(filtered, dim=1)


def min_max(maps: Tensor, epsilon: float = 1e-7) -> Tensor:
    """Rescale over the last two axes to [0,1): ``(m - min) / (epsilon + max - min)``; a constant map becomes 0."""
    shifted = maps - maps.amin((-2, -1), keepdim=True)
    return shifted / (epsilon + shifted.amax((-2, -1), keepdim=True))
