"""A probe that reads a label from a feature vector: cross-validated ridge classifier with a permutation test, in closed form.

Everything that depends on the features alone (one matrix per fold) is computed once, so hundreds of label permutations cost hardly more
than one fit, and the result is a function of the data and the seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class ProbeResult:
    """What a probe reads.

    Attributes:
        accuracy: mean over classes of the share of their samples that are recognised, out of sample; NaN if undecidable.
        permuted: the ``level`` quantile of the same number when the labels are shuffled.
        chance: 1 / number of classes.
        samples, classes: sizes.
    """

    accuracy: float
    permuted: float
    chance: float
    samples: int
    classes: int


def balanced_accuracy(predicted: Labels, labels: Labels, classes: int) -> float:
    """Mean recall over classes ``0..classes-1`` that occur."""
    count = np.bincount(labels, minlength=classes)
    hits = np.bincount(labels[predicted == labels], minlength=classes)
    return float((hits[count > 0] / count[count > 0]).mean())


def place_features(masks: Array) -> Array:
    """``[N,h,w]`` -> ``[N,h*w]``: every cell of the mask."""
    return masks.reshape(len(masks), -1)


def form_features(masks: Array) -> Array:
    """``[N,h,w]`` -> magnitudes of the Fourier transform: what stays the same wherever the mask lies (the torus makes it exact)."""
    spectrum = np.abs(np.fft.rfft2(masks, norm="ortho"))
    return spectrum.reshape(len(masks), -1)


def probe(
    features: Array,
    labels: Sequence[int],
    groups: Sequence[int],
    *,
    folds: int = 5,
    strength: float = 1.0,
    permutations: int = 200,
    level: float = 0.99,
    seed: int = 0,
) -> ProbeResult:
    """How well a linear probe reads ``labels`` from ``features``.

    Args:
        features: ``[N,D]``.
        labels: class of each sample; classes with fewer than ``folds`` samples are left out.
        groups: samples of one group (image) are never split between training and test.
        folds: number of folds of the cross-validation.
        strength: ridge penalty, relative to the mean variance of the features.
        permutations: label shuffles for the threshold; 0 gives NaN.
        level: quantile of the shuffled accuracies.
        seed: random seed of folds and shuffles.
    """
    values, counts = np.unique(np.asarray(labels), return_counts=True)
    kept = np.isin(labels, values[counts >= folds])
    names, target = np.unique(np.asarray(labels)[kept], return_inverse=True)
    X, group = np.asarray(features, dtype=np.float64)[kept], np.asarray(groups)[kept]
    K, N = len(names), len(target)
    members = np.unique(group)
    if K < 2 or len(members) < folds:
        return ProbeResult(math.nan, math.nan, math.nan, N, K)
    random = np.random.default_rng(seed)
    order = dict(zip(random.permutation(members).tolist(), range(len(members)), strict=True))
    fold = np.array([order[g] % folds for g in group.tolist()])
    weights = [_response(X, fold == f, strength) for f in range(folds)]

    # All label sets at once, [N, 1 + permutations]: the first are the true ones.
    sets = np.stack([target, *(target[random.permutation(N)] for _ in range(permutations))], axis=1)
    predicted = np.empty_like(sets)
    for f, response in enumerate(weights):
        test = fold == f
        onehot = np.eye(K)[sets[~test]]
        prior = onehot.mean(0)
        centred = (onehot - prior).reshape(len(onehot), -1)
        # Distance from the prior in units of its own spread, so that a rare class can win.
        score = (response @ centred).reshape(-1, *prior.shape) / np.sqrt(prior * (1 - prior) + 1e-12)
        predicted[test] = score.argmax(2)
    accuracy = [balanced_accuracy(p, t, K) for p, t in zip(predicted.T, sets.T, strict=True)]
    permuted = float(np.quantile(accuracy[1:], level)) if permutations else math.nan
    return ProbeResult(accuracy[0], permuted, 1 / K, N, K)


def _response(X: Array, test: NDArray[np.bool_], strength: float) -> Array:
    """``[T,M]``: test predictions are this matrix times the training targets (centred ridge regression, kernel form)."""
    center = X[~test].mean(0)
    train, held_out = X[~test] - center, X[test] - center
    kernel = train @ train.T
    penalty = strength * max(float(np.trace(kernel)) / len(kernel), 1e-12)
    solved: Array = np.linalg.solve(kernel + penalty * np.eye(len(kernel)), train @ held_out.T).T
    return solved
