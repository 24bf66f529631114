"""The configuration of ``explainer concepts fit`` as a plain dataclass; importing it does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from explainer.config import ClassifierConfig, DataConfig


@dataclass
class ConceptsConfig:
    """Probe how a classifier's filters encode concepts (Net2Vec).

    Attributes:
        data: images with labels or masks; the concepts are its classes. Augmentation is switched off.
        classifier: whose layers are probed; its own classes may be others than the data's.
        layers: module paths whose outputs are probed, after a ReLU (features.29, layer4); several are compared.
        out: results folder.
        concepts: names of the data's classes to probe; null: all.
        tasks: segmentation (needs masks), classification (needs labels).
        preset: converged fits to the end (binary cross-entropy, bias, L-BFGS); published is the paper's recipe (equation 4 without
            logarithms or bias, SGD, 30 epochs, learning rate 1e-4).
        tau: share of a filter's activations above its threshold; 0: the threshold is 0.
        mask_side: side of the masks in pixels; null: half the images' side.
        void: ignore leaves void pixels out of every sum; background counts them as not the concept.
        pooling: how activations become one number per filter, for classification.
        train_split: split on which filters are chosen and weights fitted.
        val_split: split on which all numbers are reported.
        limit: images per split, drawn from all over it; null: all.
        subsets: fit the largest weights alone, for the paper's numbers of filters, to see how many a concept needs.
        halves: fit on two halves of the training images, too: how far apart two fits of one space are.
        queries: arithmetic of concept vectors, e.g. "grass + blue - green".
        clusters: groups of concept vectors (k-means).
        similarities: other similarities that the concept spaces are compared with, by name: a CSV file, concepts by concepts.
        hierarchy: CSV file of a child and its parent in each line; compared are 1 / (1 + edges) between two concepts.
        pictures: images shown for each concept, and at each tenth of its single-image IoU; 0: none.
        bootstrap: resamples of validation images behind the intervals.
        confidence: confidence level of the intervals.
        store: folder for activations as files, for data sets that do not fit into memory; null: memory.
        seed: random seed of initial weights, order, draws and resamples.
        device: torch device of the classifier: auto, cpu, cuda, ...
        batch_size: images per pass through the classifier.
        threads: CPU threads of torch.
    """

    data: DataConfig = field(default_factory=DataConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    layers: list[str] = field(default_factory=list)
    out: str = "results/concepts"
    concepts: list[str] | None = None
    tasks: list[Literal["segmentation", "classification"]] = field(default_factory=lambda: ["segmentation", "classification"])
    preset: Literal["converged", "published"] = "converged"
    tau: float = 0.005
    mask_side: int | None = None
    void: Literal["ignore", "background"] = "ignore"
    pooling: Literal["mean", "max"] = "mean"
    train_split: Literal["train", "val", "test"] = "train"
    val_split: Literal["train", "val", "test"] = "val"
    limit: int | None = None
    subsets: bool = True
    halves: bool = True
    queries: list[str] = field(default_factory=list)
    clusters: int = 3
    similarities: dict[str, str] = field(default_factory=dict)
    hierarchy: str | None = None
    pictures: int = 5
    bootstrap: int = 1000
    confidence: float = 0.95
    store: str | None = None
    seed: int = 0
    device: str = "auto"
    batch_size: int = 32
    threads: int | None = None
