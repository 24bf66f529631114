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


def _reduced(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Adaptive average pooling to ``size``. Whole cells as two means: onnxruntime needs an eighth of its average pooling's time for them
    (three channels fill no vector), and half of that of products with :func:`pooling`.
    """
    height, width = images.shape[-2:]
    if all(type(side) is int for side in (height, width, *size)) and height % size[0] == 0 and width % size[1] == 0:
        cells: Tensor = images.unflatten(2, (size[0], -1)).mean(3).unflatten(3, (size[1], -1)).mean(4)
        return cells
    return pooling(height, size[0], images) @ images @ pooling(width, size[1], images).transpose(0, 1)


def make_guide(images: Tensor, size: tuple[int, int], radius: float = RADIUS, eps: float = EPS, unit: Tensor | float = 1.0) -> Guide:
    """Statistics of the images for :func:`guided`.

    Args:
        images: ``[B,3,H,W]``, with any offset.
        size: size of the maps that will be filtered.
        radius: radius of the windows, as a share of each side.
        eps: variance below which a window counts as flat.
        unit: ``[1,3,1,1]``; its product with the images has the unit of [0,1] images.
    """
    small = _reduced(images, size) * unit
    rows, columns = window(size[0], radius, images), window(size[1], radius, images)
    blank = Guide(small, small, small, rows, columns)
    mean = blank.window_means(small)
    second = blank.window_means((small[:, :, None] * small[:, None]).flatten(1, 2)).unflatten(1, (3, 3))
    return Guide(small, mean, _inverse(second - mean[:, :, None] * mean[:, None], eps), rows, columns)


#: Where the cofactor of each entry of a 3x3 matrix, row by row, finds its four factors: ``v[p] v[q] - v[r] v[s]``.
_FACTORS = tuple(
    [3 * ((i + down) % 3) + (j + right) % 3 for i in range(3) for j in range(3)] for down, right in ((1, 1), (2, 2), (1, 2), (2, 1))
)


def _inverse(v: Tensor, eps: float) -> Tensor:
    """Inverse of ``v + eps 1`` for symmetric ``[B,3,3,h,w]``, by cofactors: a solver per position would not export.

    All nine entries at once: a runtime needs longer for the calls of single entries than for their arithmetic.
    """
    entries = v.flatten(1, 2) + eps * torch.eye(3, dtype=v.dtype, device=v.device).view(1, 9, 1, 1)
    p, q, r, s = (entries.index_select(1, torch.tensor(where, device=v.device)) for where in _FACTORS)
    cofactors = p * q - r * s
    determinant = (entries[:, :3] * cofactors[:, :3]).sum(dim=1, keepdim=True)
    inverse: Tensor = (cofactors / determinant).unflatten(1, (3, 3))
    return inverse


def guided(maps: Tensor, guide: Guide) -> Tensor:
    """In each window a map becomes the linear function of the image's colours that fits it best; overlapping windows are averaged.

    Args:
        maps: ``[B,n,h,w]``.
        guide: the images' colours, prepared at the same resolution.

    Returns:
        ``[B,n,h,w]``.
    """
    image, middle = guide.image[:, :, None], guide.mean[:, :, None]  # [B,3,1,h,w]: colours come first, so that one is cut out in one piece
    mean = guide.window_means(maps)
    covariance = guide.window_means(image * maps[:, None]) - middle * mean[:, None]
    # summed term by term: the product of all nine entries would be three times as large as its result
    terms = zip(guide.inverse[:, :, :, None].unbind(1), covariance[:, :, None].unbind(1), strict=True)
    first, second, third = (inverse * part for inverse, part in terms)
    slope = first + second + third
    offset = mean - (slope * middle).sum(dim=1)
    return (guide.window_means(slope) * image).sum(dim=1) + guide.window_means(offset)
