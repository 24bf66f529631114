"""How much of a position belongs to each class, when the classes compete for it."""

from __future__ import annotations

from torch import Tensor

LEAST_LOG_PROBABILITY = -8.0  # a class that the classifier excludes stays finite


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
