"""A guided filter as a layer (He, Sun & Tang, TPAMI 2013): differentiable, batched over classes, exportable to any runtime.

Window means are products with banded matrices, so that a map of 28x28 positions costs two small matrix products and every export format
has the operation. What depends on the image alone is computed once for all classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RADIUS, EPS = 0.15, 3e-4


class Guide(NamedTuple):
    """What the filter knows of an image.

    Attributes:
        image: ``[B,3,h,w]``, reduced to the resolution of the maps.
        mean: ``[B,3,h,w]`` of each window.
        inverse: ``[B,3,3,h,w]`` of each window's covariance plus eps.
        rows, columns: ``[h,h]`` and ``[w,w]``; their products with a map give its window means.
    """

    image: Tensor
    mean: Tensor
    inverse: Tensor
    rows: Tensor
    columns: Tensor

    def window_means(self, maps: Tensor) -> Tensor:
        """Mean over the window around each position, of ``[...,h,w]``."""
        return self.rows @ maps @ self.columns.transpose(0, 1)


def window(length: int, radius: float, like: Tensor) -> Tensor:
    """``[length,length]``: row i averages over the positions at most ``radius * length`` from i, at the border over what lies inside."""
    at = torch.arange(length, device=like.device)
    # The reach is computed as a tensor: an exported graph has no rounding of sizes. Double, so that halves stay halves.
    reach = ((at[-1:] + 1).double() * radius).round().clamp_min(1)
    near = ((at[:, None] - at[None]).abs() <= reach).to(like.dtype)
    return near / near.sum(dim=1, keepdim=True)


def pooling(length: int, cells: int, like: Tensor) -> Tensor:
    """``[cells,length]``: row i averages over cell i of adaptive average pooling, positions ``i length // cells`` up to, not including,
    ``(i + 1) length / cells`` rounded up. As a matrix, because exporters know adaptive pooling for fixed sizes only.
    """
    at, cell = torch.arange(length, device=like.device), torch.arange(cells, device=like.device)[:, None]
    # Not `&`: torch.export writes it as an operator that the check of foreign programs refuses.
    inside = torch.logical_and(at >= cell * length // cells, at * cells < (cell + 1) * length).to(like.dtype)
    return inside / inside.sum(dim=1, keepdim=True)


def make_guide(images: Tensor, size: tuple[int, int], radius: float = RADIUS, eps: float = EPS, unit: Tensor | float = 1.0) -> Guide:
    """Statistics of the images for :func:`guided`.

    Args:
        images: ``[B,3,H,W]``, with any offset.
        size: size of the maps that will be filtered.
        radius: radius of the windows, as a share of each side.
        eps: variance below which a window counts as flat.
        unit: ``[1,3,1,1]``; its product with the images has the unit of [0,1] images.
    """
    height, width = images.shape[-2:]
    small = pooling(height, size[0], images) @ images @ pooling(width, size[1], images).transpose(0, 1) * unit
    rows, columns = window(size[0], radius, images), window(size[1], radius, images)
    blank = Guide(small, small, small, rows, columns)
    mean = blank.window_means(small)
    second = blank.window_means((small[:, :, None] * small[:, None]).flatten(1, 2)).unflatten(1, (3, 3))
    return Guide(small, mean, _inverse(second - mean[:, :, None] * mean[:, None], eps), rows, columns)


def _inverse(v: Tensor, eps: float) -> Tensor:
    """Inverse of ``v + eps 1`` for symmetric ``[B,3,3,h,w]``, by cofactors: a solver per position would not export."""
    a, d, f = v[:, 0, 0] + eps, v[:, 1, 1] + eps, v[:, 2, 2] + eps
    b, c, e = v[:, 0, 1], v[:, 0, 2], v[:, 1, 2]
    first, second, third = d * f - e * e, c * e - b * f, b * e - c * d
    entries = [first, second, third, second, a * f - c * c, b * c - a * e, third, b * c - a * e, a * d - b * b]
    determinant = a * first + b * second + c * third
    inverse: Tensor = (torch.stack(entries, dim=1) / determinant[:, None]).unflatten(1, (3, 3))
    return inverse


def guided(maps: Tensor, guide: Guide) -> Tensor:
    """In each window a map becomes the linear function of the image's colours that fits it best; overlapping windows are averaged.

    Args:
        maps: ``[B,n,h,w]``.
        guide: the images' colours, prepared at the same resolution.

    Returns:
        ``[B,n,h,w]``.
    """
    image = guide.image[:, None]  # [B,1,3,h,w]
    mean = guide.window_means(maps)
    covariance = guide.window_means(image * maps[:, :, None]) - guide.mean[:, None] * mean[:, :, None]
    # summed term by term: the product of all nine entries would be three times as large as its result
    first, second, third = (guide.inverse[:, None, :, d] * covariance[:, :, d : d + 1] for d in range(3))
    slope = first + second + third
    offset = mean - (slope * guide.mean[:, None]).sum(dim=2)
    return (guide.window_means(slope) * image).sum(dim=2) + guide.window_means(offset)
