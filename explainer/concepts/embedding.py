"""Concept vectors: distances, nearest neighbours, arithmetic, clusters, and how alike two networks' spaces are (section 5)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from explainer.errors import ConfigError


def unit_vectors(weights: Tensor) -> Tensor:
    """``w / ||w||_2``, ``[C,K]``; a vector of zeros stays zero and is like nothing."""
    return torch.nn.functional.normalize(weights, dim=1, eps=1e-12)


def similarity(weights: Tensor) -> Tensor:
    """Cosines ``[C,C]``."""
    unit = unit_vectors(weights)
    return unit @ unit.T


def nearest(weights: Tensor, concept: int, number: int = 5) -> list[tuple[int, float]]:
    """The most similar other concepts with their cosines, most similar first; zero vectors are left out."""
    found = similarity(weights)[concept].clone()
    found[concept] = -torch.inf
    found[weights.abs().sum(1) == 0] = -torch.inf
    order = torch.sort(found, descending=True, stable=True).indices
    return [(int(i), float(found[i])) for i in order[:number] if torch.isfinite(found[i])]


def parse_query(text: str, names: Sequence[str]) -> list[tuple[int, float]]:
    """``"grass + blue - green"`` -> ``[(concept, sign), ...]``. Signs stand between spaces, so that names may hold a hyphen.

    Raises:
        ConfigError: no such concept, or nothing between two signs.
    """
    parts = re.split(r"(?:^|\s)([+-])\s", " " + text.strip() if text.strip()[:1] in "+-" else f" + {text.strip()}")
    terms = []
    for sign, name in zip(parts[1::2], parts[2::2], strict=True):
        if name.strip() not in names:
            raise ConfigError(f"the query {text!r} names {name.strip()!r}, which is not a concept. Concepts: {', '.join(names)}.")
        terms.append((list(names).index(name.strip()), 1.0 if sign == "+" else -1.0))
    return terms


def arithmetic(weights: Tensor, terms: Sequence[tuple[int, float]], number: int = 3) -> list[tuple[int, float]]:
    """Concepts closest to ``+- w'_a +- w'_b ...``, not counting those in the query, with their cosines."""
    unit = unit_vectors(weights)
    vector = sum((sign * unit[c] for c, sign in terms), torch.zeros(unit.shape[1]))
    return nearest(torch.cat([_without(weights, [c for c, _ in terms]), vector[None]]), len(weights), number)


def _without(weights: Tensor, concepts: Sequence[int]) -> Tensor:
    left = weights.clone()
    left[list(concepts)] = 0
    return left


def kmeans(weights: Tensor, k: int, restarts: int = 10, seed: int = 0, steps: int = 100) -> tuple[Tensor, float]:
    """``(cluster of each concept [C], inertia)``: Lloyd's algorithm on unit vectors, the best of several random starts."""
    unit = unit_vectors(weights)
    generator = torch.Generator().manual_seed(seed)
    best: tuple[Tensor, float] | None = None
    for _ in range(restarts):
        centers = unit[torch.randperm(len(unit), generator=generator)[:k]]
        label = torch.cdist(unit, centers).argmin(1)
        for _ in range(steps):
            centers = torch.stack([unit[label == j].mean(0) if bool((label == j).any()) else centers[j] for j in range(len(centers))])
            new = torch.cdist(unit, centers).argmin(1)
            if torch.equal(new, label):
                break
            label = new
        inertia = float(((unit - centers[label]) ** 2).sum())
        if best is None or inertia < best[1]:
            best = label, inertia
    assert best is not None
    return best


def purity(label: Tensor, categories: Sequence[str]) -> float:
    """Share of the concepts that belong to the commonest category of their cluster."""
    hits = 0
    for cluster in label.unique().tolist():
        inside = [c for c, own in zip(categories, label.tolist(), strict=True) if own == cluster]
        hits += max(inside.count(c) for c in set(inside))
    return hits / len(categories)


def plane(weights: Tensor) -> Tensor:
    """The unit vectors in the plane of their largest spread (principal components), ``[C,2]``; signs are fixed by the largest entry."""
    unit = unit_vectors(weights)
    _, _, axes = torch.linalg.svd(unit - unit.mean(0), full_matrices=False)
    axes = axes[:2]
    axes = axes * torch.sign(axes.gather(1, axes.abs().argmax(1, keepdim=True)))
    placed = (unit - unit.mean(0)) @ axes.T
    return torch.nn.functional.pad(placed, (0, 2 - placed.shape[1]))


def space_distance(first: Tensor, second: Tensor) -> tuple[float, Tensor]:
    """``(D, D_c)`` between two ``[C,C]`` similarities: the squared Frobenius norm of their difference, and its rows' shares ``[C]``."""
    rows = ((first - second) ** 2).sum(1)
    return float(rows.sum()), rows


def cooccurrence(labels: Tensor) -> Tensor:
    """Phi coefficient of the labels ``[N,C]`` bool, ``[C,C]``: the correlation of two concepts over images; 0 for constant labels."""
    centred = labels.double() - labels.double().mean(0)
    norm = centred.norm(dim=0)
    phi: Tensor = centred.T @ centred / (norm[:, None] * norm[None]).clamp(min=1e-12)
    phi[torch.arange(len(phi)), torch.arange(len(phi))] = 1
    return phi.float()
