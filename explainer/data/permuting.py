"""Labels handed to other images: what a network trained on them has learned by heart, it has not learned from the pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from explainer.data.contract import ExplainerDataset


def labels_of(dataset: ExplainerDataset) -> list[tuple[int, ...]]:
    """The classes of each image, in the data set's order."""
    return [tuple(dataset.target(i).nonzero()[:, 0].tolist()) for i in range(len(dataset))]


def permuted(labels: Sequence[tuple[int, ...]], seed: int) -> list[tuple[int, ...]]:
    """The same label sets in a random order, fixed by the seed and their number."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    return [labels[i] for i in order]
