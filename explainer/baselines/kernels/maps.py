"""From channels at some layer to one map at the image's size: reduction, resizing, smoothing, rescaling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from explainer.errors import ConfigError

Reduction = Literal["max_abs", "sum", "sum_abs", "mean", "l2"]
Interpolation = Literal["bilinear", "nearest"]
#: What pytorch-grad-cam adds to the range of a map before it divides by it.
CAM_EPSILON = 1e-7


def shares(given: Sequence[float] | str, number: int, method: str, of: str) -> list[float]:
    """Weights that together are 1.

    Args:
        given: one a map, at least 0, not all 0.
        number: number of maps.
        method: name of the method whose option ``weights`` this is.
        of: what the maps are made by, in the plural, for the message.

    Raises:
        ConfigError: their number or a value is wrong.
    """
    if isinstance(given, str) or len(given) != number or min(given) < 0 or not sum(given) > 0:
        raise ConfigError(f"{method}: weights must be a number of at least 0 for each of the {number} {of}, received {given!r}.")
    return [float(w) / sum(given) for w in given]


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
        lengths: Tensor = torch.linalg.vector_norm(channels, dim=1)
        return lengths
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
    """Mean of ``[B,C,H,W]`` over windows of ``2 radius + 1``, at the border over what lies inside.

    Differences of running sums, one axis after the other: the cost does not depend on the radius. The sums are float64, because
    differences of large float32 sums would lose the small variances of flat windows.
    """
    means = values.double()
    for axis in (-2, -1):
        length = means.shape[axis]
        sums = functional.pad(means.cumsum(axis), (1, 0) if axis == -1 else (0, 0, 1, 0))
        at = torch.arange(length, device=values.device)
        first, last = (at - radius).clamp_min(0), (at + radius + 1).clamp_max(length)
        count = (last - first).to(means)
        means = (sums.index_select(axis, last) - sums.index_select(axis, first)) / (count if axis == -1 else count[:, None])
    return means.to(values)


def _solver(matrices: Tensor) -> Callable[[Tensor], Tensor]:
    """Solves symmetric systems ``[B,C,C,H,W]`` for right-hand sides ``[B,C,H,W]``.

    With three channels by the adjugate (Cramer's rule), pixel by pixel in vector operations: a factorisation of 50,000 small matrices one
    after the other takes ten times as long.
    """
    if matrices.shape[1] != 3:
        factors = torch.linalg.lu_factor(matrices.permute(0, 3, 4, 1, 2))  # once for all maps of an image
        return lambda right: torch.linalg.lu_solve(*factors, right.permute(0, 2, 3, 1)[..., None])[..., 0].permute(0, 3, 1, 2)
    (a, b, c), (_, d, e), (_, _, f) = (matrices.double()[:, i].unbind(1) for i in range(3))
    rows = [
        (d * f - e * e, c * e - b * f, b * e - c * d),
        (c * e - b * f, a * f - c * c, b * c - a * e),
        (b * e - c * d, b * c - a * e, a * d - b * b),
    ]
    determinant = a * rows[0][0] + b * rows[0][1] + c * rows[0][2]
    inverse = torch.stack([torch.stack([entry / determinant for entry in row], dim=1) for row in rows], dim=1).to(matrices)
    return lambda right: (inverse * right[:, None]).sum(dim=2)


def guided_filter(maps: Tensor, images: Tensor, radius: float, eps: float = 1e-3) -> Tensor:
    """He, Sun and Tang (ECCV 2010; TPAMI 2013, eq. 19-21, colour guide): in each window the map becomes the linear function of the
    image's channels that fits it best, ``a . I + b``, with ``a = (Cov(I) + eps 1)^-1 cov(I, map)``, and overlapping windows are averaged.

    Args:
        maps: ``[B,H,W]``, or ``[B,n,H,W]`` for several maps of each image; float32 or float64.
        images: the guide ``[B,C,H,W]`` in [0,1], of the same type.
        radius: radius of the windows, as a share of the longer side (at least one pixel).
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
    solve = _solver(variance + eps * torch.eye(C, dtype=maps.dtype, device=maps.device)[:, :, None, None])
    filtered = []
    for target in maps.split(1, dim=1):
        mean_map = _box_mean(target, pixels)
        covariance = _box_mean(images * target, pixels) - mean_image * mean_map
        slope = solve(covariance)
        offset = mean_map - (slope * mean_image).sum(1, keepdim=True)
        filtered.append((_box_mean(slope, pixels) * images).sum(1, keepdim=True) + _box_mean(offset, pixels))
    return torch.cat(filtered, dim=1)
