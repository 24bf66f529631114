"""The probes of one layer with their scores: what ``explainer concepts fit`` repeats for every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from explainer.commands.concepts_config import ConceptsConfig
from explainer.concepts import segmentation as seg
from explainer.concepts.classification import Features, classification_scores
from explainer.concepts.iou import ratio
from explainer.concepts.statistics import effective_number, hoyer, pearson, sharing
from explainer.concepts.store import ConceptMasks
from explainer.concepts.subsets import CLASSIFICATION_SIZES, SEGMENTATION_SIZES, filters_needed, order, sizes, top
from explainer.concepts.supports import Supports
from explainer.evaluation.statistics import interval, resamples
from explainer.tasks.concepts import Fitted, Recipe, fit_classification, fit_segmentation

_SHOWN = 5  # filters named per concept


@dataclass
class Probed:
    """One layer and task.

    Attributes:
        concepts: numbers of those with a probe.
        fitted: all filters' weights, in the units they were fitted in.
        summary: numbers, as JSON values.
        comparable: ``[C,K]`` weights in units that other layers share (of standardised features).
        halves: the same, fitted on either half of the training images; empty if not asked for.
        limits: ``[K]`` thresholds; None for classification.
        images: per concept, what pictures are chosen by: ``[N_val]`` share of the image (segmentation), or the logit.
        supports: filter supports of the validation split, for pictures.
        best: per concept, the single filter.
    """

    concepts: list[int]
    fitted: Fitted
    summary: dict[str, Any]
    comparable: Tensor
    halves: list[Tensor] = field(default_factory=list)
    limits: Tensor | None = None
    images: dict[int, Tensor] = field(default_factory=dict)
    supports: Supports | None = None
    best: dict[int, int] = field(default_factory=dict)


def _set_interval(config: ConceptsConfig, *counts: tuple[Tensor, Tensor]) -> list[list[float]]:
    """``[value, low, high]`` of each method's set IoU, and of the first minus the second, over resampled images."""
    found, n = [], len(counts[0][0])
    weights = resamples(n, config.bootstrap, config.seed) if config.bootstrap and n else None
    drawn = []
    for i, u in counts:
        value = seg.set_iou((i, u))
        if weights is None:
            found.append([value, float("nan"), float("nan")])
            continue
        top_, bottom = weights @ i.double().numpy(), weights @ u.double().numpy()
        drawn.append(np.divide(top_, bottom, out=np.zeros_like(top_), where=bottom > 0))
        found.append([value, *interval(drawn[-1], config.confidence)])
    bounds = interval(drawn[0] - drawn[1], config.confidence) if drawn else (float("nan"), float("nan"))
    return [*found, [found[0][0] - found[1][0], *bounds]]


def _about_weights(w: Tensor) -> dict[str, Any]:
    share = w.abs() / w.abs().sum().clamp(min=1e-12)
    return {
        "top": [[int(k), float(w[k]), float(share[k])] for k in order(w)[:_SHOWN]],
        "hoyer": hoyer(w),
        "effective": effective_number(w),
    }


def _curves(
    wanted: Sequence[int],
    K: int,
    concepts: Sequence[int],
    fitted: Fitted,
    fit: Callable[[dict[int, Tensor]], Fitted],
    score: Callable[[Fitted, int], float],
) -> dict[int, dict[int, float]]:
    """``{concept: {F: score}}``; K filters are the full fit."""
    curves: dict[int, dict[int, float]] = {c: {} for c in concepts}
    for f in sizes(wanted, K):
        own = fitted if f == K else fit({c: top(fitted.weights[c], f) for c in concepts})
        for c in concepts:
            curves[c][f] = score(own, c)
    return curves


def _needed(curve: dict[int, float]) -> dict[str, Any]:
    return {"curve": {str(f): s for f, s in curve.items()}, "n90": filters_needed(curve, 0.9), "n95": filters_needed(curve, 0.95)}


def probe_segmentation(
    config: ConceptsConfig, supports: dict[str, Supports], truth: dict[str, ConceptMasks], concepts: list[int], limits: Tensor
) -> Probed:
    """Single filters and combinations.

    Args:
        config: the command's.
        supports, truth: filter supports and concept masks of the splits ``train`` and ``val``.
        concepts: numbers of those with masks in both.
        limits: the thresholds.
    """
    recipe = Recipe.named(config.preset, config.seed)
    train, val, held = supports["train"], supports["val"], truth["val"]
    on_train, on_val = seg.single_filter_scores(train, truth["train"]), seg.single_filter_scores(val, held)
    fitted = fit_segmentation(train, truth["train"], concepts, recipe)
    best = {c: seg.best_filter(on_train[c]) for c in concepts}
    everyone = torch.arange(len(held.ids))
    rows: dict[int, dict[str, Any]] = {}
    images = {}
    for c in concepts:
        w, b = fitted.of(c)
        some = held.images_with(c)
        both = seg.combination_counts(val, held, c, some, weights=w, bias=b)
        alone = seg.filter_counts(val, held, c, some, best[c])
        combination, single, difference = _set_interval(config, both, alone)
        r, p = pearson(w.clamp(min=0), on_val[c])
        rows[c] = {
            "filter": best[c],
            "single_train": float(on_train[c, best[c]]),
            "single": single,
            "combination": combination,
            "difference": difference,
            "exclusivity": single[0] / combination[0] if combination[0] > 0 else float("nan"),
            "images": {"combination": ratio(*both).tolist(), "single": ratio(*alone).tolist(), "index": some.tolist()},
            "pearson": [r, p],
            **_about_weights(w),
        }
        images[c] = torch.cat([(seg.combination_logits(val.only(i), w, b, held.side) > 0).float().mean((1, 2)) for i in everyone.split(64)])

    def fit(allowed: dict[int, Tensor]) -> Fitted:
        return fit_segmentation(train, truth["train"], concepts, recipe, allowed)

    def score(own: Fitted, c: int) -> float:
        weights, bias = own.of(c)
        return seg.set_iou(seg.combination_counts(val, held, c, held.images_with(c), weights=weights, bias=bias))

    if config.subsets:
        for c, curve in _curves(SEGMENTATION_SIZES, train.K, concepts, fitted, fit, score).items():
            rows[c] |= _needed(curve)
    served, bins = sharing(list(best.values()), train.K)
    scale = _spread_of(train)
    halves = []
    if config.halves:
        halves = [fit_segmentation(train, _half(truth["train"], part), concepts, recipe).weights * scale for part in (0, 1)]
        halves = [] if any(bool(h[concepts].isnan().any()) for h in halves) else halves
    summary = {"rows": rows, "sharing": {"bins": bins, "most": sorted(((n, k) for k, n in enumerate(served) if n), reverse=True)[:10]}}
    return Probed(concepts, fitted, summary, fitted.weights * scale, halves, limits, images, val, best)


def _spread_of(supports: Supports) -> Tensor:
    """Standard deviation of each indicator, ``[K]``: turns weights into those of standardised features."""
    share = torch.bincount(supports.filters, minlength=supports.K) / max(1, len(supports.offsets) - 1)
    return (share * (1 - share)).sqrt()


def _half(truth: ConceptMasks, part: int) -> ConceptMasks:
    """Every second image that shows a concept, concept by concept, so that neither half lacks one with two images."""
    rows = torch.full_like(truth.rows, -1)
    for c in range(rows.shape[1]):
        mine = truth.images_with(c)[part::2]
        rows[mine, c] = truth.rows[mine, c]
    return ConceptMasks(truth.ids, truth.labels, rows, truth.bits, truth.void, truth.side)


def probe_classification(config: ConceptsConfig, pooled: dict[str, Tensor], truth: dict[str, ConceptMasks], concepts: list[int]) -> Probed:
    """Linear probes on pooled activations.

    Args:
        config: the command's.
        pooled: ``[N,K]`` of the splits ``train`` and ``val``.
        truth: labels of both.
        concepts: numbers of those that some images show and others do not, in both splits.
    """
    recipe = Recipe.named(config.preset, config.seed)
    features = Features.of(pooled["train"], config.preset == "converged")
    values, labels, held = features.of_split(pooled["val"]), truth["train"].labels, truth["val"].labels
    fitted = fit_classification(features, labels, concepts, recipe)

    def logits(own: Fitted, c: int) -> Tensor:
        return values @ own.weights[c] + own.bias[c]

    def fit(allowed: dict[int, Tensor]) -> Fitted:
        return fit_classification(features, labels, concepts, recipe, allowed)

    def score(own: Fitted, c: int) -> float:
        return classification_scores(logits(own, c), held[:, c], config.seed, c)[0]

    alone = fit({c: top(fitted.weights[c], 1) for c in concepts})
    rows: dict[int, dict[str, Any]] = {}
    best = {c: int(order(fitted.weights[c])[0]) for c in concepts}
    for c in concepts:
        accuracy, auc = classification_scores(logits(fitted, c), held[:, c], config.seed, c)
        single, single_auc = classification_scores(logits(alone, c), held[:, c], config.seed, c)
        raw, bias = features.raw(fitted.weights[c], fitted.bias[c])
        rows[c] = {
            "filter": best[c],
            "accuracy": accuracy,
            "auc": auc,
            "single": single,
            "single_auc": single_auc,
            "raw_bias": float(bias),
            "raw_top": [[int(k), float(raw[k])] for k in order(fitted.weights[c])[:_SHOWN]],
            **_about_weights(fitted.weights[c]),
        }
    if config.subsets:
        for c, curve in _curves(CLASSIFICATION_SIZES, values.shape[1], concepts, fitted, fit, score).items():
            rows[c] |= _needed(curve)
    served, bins = sharing(list(best.values()), values.shape[1])
    halves = []
    if config.halves:
        for part in (0, 1):
            half = torch.arange(len(labels))[part::2]
            usable = all(0 < int(labels[half, c].sum()) < len(half) for c in concepts)
            if usable:
                own = Features(features.values[half], features.mean, features.std)
                halves.append(fit_classification(own, labels[half], concepts, recipe).weights)
    scale = torch.ones(values.shape[1]) if config.preset == "converged" else pooled["train"].std(0)
    summary = {"rows": rows, "sharing": {"bins": bins, "most": sorted(((n, k) for k, n in enumerate(served) if n), reverse=True)[:10]}}
    images = {c: logits(fitted, c) for c in concepts}
    return Probed(
        concepts, fitted, summary, fitted.weights * scale, [h * scale for h in halves] if len(halves) == 2 else [], None, images, None, best
    )
