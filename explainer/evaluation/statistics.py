"""From rows to numbers: means, how many rows they rest on, and bootstrap intervals over images.

An image is resampled with all its rows (its classes are not independent), and all methods see the same resamples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from explainer.evaluation.protocol import Column, Protocol
from explainer.evaluation.results import Row

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Statistic:
    """One number of a table.

    Attributes:
        value: as the column averages it; NaN without rows.
        low, high: bootstrap percentile interval; NaN without.
        used, excluded: rows behind the value, and rows where it is undefined.
        images: images behind the value.
        per_class: mean of each class, by class number.
    """

    value: float
    low: float
    high: float
    used: int
    excluded: int
    images: int
    per_class: dict[int, float] = field(default_factory=dict)


@functools.lru_cache(maxsize=8)
def resamples(images: int, samples: int, seed: int) -> Array:
    """How often each image is drawn in each bootstrap sample, ``[samples, images]``."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=samples).astype(np.float64)


def interval(values: Array, confidence: float) -> tuple[float, float]:
    """Percentile interval of bootstrap values ``[S]``; NaN where no sample is defined."""
    sound = values[~np.isnan(values)]
    if len(sound) == 0:
        return math.nan, math.nan
    tail = 50 * (1 - confidence)
    low, high = np.percentile(sound, [tail, 100 - tail])
    return float(low), float(high)


def statistic(
    rows: Sequence[Row],
    name: str,
    column: Column,
    *,
    protocol: Protocol | None = None,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Statistic:
    """One column of the rows of one method, scale and protocol.

    Args:
        rows: all of them; rows that do not have the column do not count as excluded.
        name: name of the column.
        column: how it is averaged.
        protocol: scores summed counts (only for columns with ``counts``).
        bootstrap: number of resamples; 0 gives no interval, and one image has none.
        confidence: confidence level of the interval.
        seed: random seed of the resamples.
    """
    images = {index: i for i, index in enumerate(sorted({r.index for r in rows}))}
    if column.counts is not None:
        return _from_counts(rows, images, column, protocol, bootstrap, confidence, seed)
    key = column.value or name
    present = [r for r in rows if key in r.values]
    image = np.array([images[r.index] for r in present], dtype=np.int64)
    value = np.array([r.values[key] for r in present], dtype=np.float64)
    label = np.array([-1 if r.class_index is None else r.class_index for r in present], dtype=np.int64)
    sound = ~np.isnan(value)
    groups = np.unique(label[sound]) if column.average == "classes" else np.array([0])
    slot = np.searchsorted(groups, label) if column.average == "classes" else np.zeros(len(label), dtype=np.int64)
    total, count = (np.zeros((len(images), max(len(groups), 1))) for _ in range(2))
    np.add.at(total, (image[sound], slot[sound]), value[sound])
    np.add.at(count, (image[sound], slot[sound]), 1)
    used = int(sound.sum())
    low = high = math.nan
    if bootstrap and used and len(images) > 1:
        weights = resamples(len(images), bootstrap, seed)
        low, high = interval(_mean(weights @ total, weights @ count), confidence)
    per_class = {int(k): float(value[sound & (label == k)].mean()) for k in np.unique(label[sound]) if k >= 0}
    point = float(_mean(total.sum(0), count.sum(0)))
    return Statistic(point, low, high, used, int((~sound).sum()), int((count.sum(1) > 0).sum()), per_class)


def _mean(total: Array, count: Array) -> Array:
    """Mean over groups (last axis) of total / count, empty groups left out."""
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(count > 0, total / np.where(count > 0, count, 1), np.nan)
    some = (~np.isnan(means)).any(-1)
    number = np.maximum((~np.isnan(means)).sum(-1), 1)
    return np.where(some, np.nansum(means, -1) / number, np.nan)


def _from_counts(
    rows: Sequence[Row], images: dict[int, int], column: Column, protocol: Protocol | None, bootstrap: int, confidence: float, seed: int
) -> Statistic:
    assert column.counts is not None and protocol is not None
    vector, entry = column.counts
    present = [r for r in rows if vector in r.vectors]
    sound = [r for r in present if not any(math.isnan(x) for x in r.vectors[vector])]
    if not sound:
        return Statistic(math.nan, math.nan, math.nan, 0, len(present), 0)
    total = np.zeros((len(images), len(sound[0].vectors[vector])))
    for r in sound:
        total[images[r.index]] += r.vectors[vector]

    def scored(summed: Array) -> Array:
        return protocol.from_counts(vector, torch.from_numpy(summed))[..., entry].numpy()

    low = high = math.nan
    if bootstrap and len(images) > 1:
        low, high = interval(scored(resamples(len(images), bootstrap, seed) @ total), confidence)
    return Statistic(float(scored(total.sum(0))), low, high, len(sound), len(present) - len(sound), len({r.index for r in sound}))


def paired_difference(
    first: Sequence[Row],
    second: Sequence[Row],
    name: str,
    column: Column,
    *,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Statistic:
    """Mean of ``first - second`` over the (image, class) rows that both have, with its interval; NaN where either is undefined."""
    key = column.value or name
    other = {(r.index, r.class_index): r.values[key] for r in second if key in r.values}
    shared = [r for r in first if key in r.values and (r.index, r.class_index) in other]
    rows = [
        Row(r.method, r.scale, r.protocol, r.image, r.index, r.class_index, {name: r.values[key] - other[r.index, r.class_index]})
        for r in shared
    ]
    return statistic(
        rows, name, Column(column.title, average=column.average), protocol=None, bootstrap=bootstrap, confidence=confidence, seed=seed
    )


def mean_vector(rows: Sequence[Row], name: str) -> list[float]:
    """Entry by entry mean over the rows that have the vector; NaN entries are left out."""
    found = np.array([r.vectors[name] for r in rows if name in r.vectors], dtype=np.float64)
    if not len(found):
        return []
    count = (~np.isnan(found)).sum(0)
    return [float(t / n) if n else math.nan for t, n in zip(np.nansum(found, 0), count, strict=True)]
