"""How much of a position belongs to each class when the classes compete for it, and maps that spread over positions that look alike."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

LEAST_LOG_PROBABILITY = -8.0  # a class that the classifier excludes stays finite
SHARP = 3  # power of the similarity that shares are spread by: a plain cosine mixes them over the whole image


def class_shares(activations: Tensor, log_probabilities: Tensor, contrast: Tensor | float = 1.0) -> Tensor:
    """``softmax_k(contrast * a_k / s + log p_k)`` at every position, s the standard deviation of all activations of the image.

    Activations of classes that occur together are alike: high on anything, low on background. Their differences tell the classes apart.

    Args:
        activations: ``[B,K,h,w]``, class activations a_k of all classes.
        log_probabilities: ``[B,K]``, log p_k of the classifier on the whole image; below -8 they count as -8.
        contrast: how strongly differences count, > 0.

    Returns:
        ``[B,K,h,w]`` in [0,1] with a sum of 1 over the classes.
    """
    deviation = activations - activations.mean(dim=(1, 2, 3), keepdim=True)
    scale = deviation.square().mean(dim=(1, 2, 3), keepdim=True).add(1e-12).sqrt()
    prior = log_probabilities.clamp_min(LEAST_LOG_PROBABILITY)[..., None, None]
    return (contrast * deviation / scale + prior).softmax(dim=1)


def similarity(features: Tensor, power: int = 1) -> Tensor:
    """How alike the features at two positions are: cosine of the angle between them after the image's mean was subtracted, negative ones
    0, to a power. Symmetric in the two positions.

    Args:
        features: ``[B,C,h,w]``.
        power: a higher one leaves only positions that are much alike.

    Returns:
        ``[B,P,h,w]`` with P = h w the first positions, row by row.
    """
    centred = (features - features.mean(dim=(2, 3), keepdim=True)).flatten(2)
    unit = centred / torch.linalg.vector_norm(centred, dim=1, keepdim=True).clamp_min(1e-6)
    cosine: Tensor = torch.matmul(unit.transpose(1, 2), unit).clamp_min(0)
    # Products, because runtimes compute a power by logarithms, in ten times their time.
    maps: Tensor = functools.reduce(torch.mul, [cosine] * power).unflatten(2, features.shape[-2:])
    return maps


def spread_over_similar(maps: Tensor, similar: Tensor) -> Tensor:
    """Each position's value becomes the mean over all positions, weighted by how alike their features are (the pixel correlation of Wang et
    al., CVPR 2020, section 3.3, without learned weights).

    Args:
        maps: ``[B,n,h,w]``.
        similar: ``[B,P,h,w]`` with P = h w, see :func:`similarity`.

    Returns:
        ``[B,n,h,w]``.
    """
    rows = maps.flatten(2)
    # The sum over the second position is that over the first: the matrix is symmetric. Divided by it are n maps, and not P.
    sums = torch.matmul(torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1), similar.flatten(2))
    spread: Tensor = (sums[:, :-1] / sums[:, -1:].clamp_min(1e-6)).unflatten(2, similar.shape[-2:])
    return spread
