"""The configuration of an evaluation as plain dataclasses; importing it does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from explainer.config import ClassifierConfig, DataConfig


@dataclass
class MethodConfig:
    """One method to evaluate; its key in ``methods`` is the label in the tables.

    Attributes:
        name: explainer (a trained Explainer), or a baseline such as grad_cam, rise, constant; default: the label itself.
        options: keyword options of the baseline (layer, n_masks, value, ...).
        checkpoint: file of a trained Explainer: a .ckpt, a .safetensors file or an export folder.
        train_with: configuration that trains the Explainer; named in the message when the checkpoint is missing.
        rescale: overrides the evaluation's rescale for this method.
        threshold: where agf_segmentation cuts this method's maps: zero (the positive part) or mean (of the map); null: zero for methods
            whose maps have signs, else mean.
        batch_size: most (image, class) pairs per call of this method; null takes the evaluation's batch_size.
        allow_mismatch: evaluate an Explainer although it was trained for another classifier.
    """

    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    train_with: str | None = None
    rescale: Literal["raw", "minmax", "both"] | None = None
    threshold: Literal["zero", "mean"] | None = None
    batch_size: int | None = None
    allow_mismatch: bool = False


@dataclass
class CacheConfig:
    """Where maps are kept, so that each is computed once.

    Attributes:
        folder: folder of the cache, shared between evaluations and distillation; null computes maps without keeping them.
        dtype: float32 (exact), float16 (relative to each map's maximum) or uint8 (256 steps between minimum and maximum).
    """

    folder: str | None = None
    dtype: Literal["float32", "float16", "uint8"] = "float16"


@dataclass
class EvaluateConfig:
    """One evaluation: methods x images x protocols.

    Attributes:
        out: results folder: results.jsonl, summary.json, summary.csv, table.md.
        data: images.
        split: split of the data: train, val or test.
        limit: number of images; null takes all. Where labels are known without decoding, every class in turn gives one (by ``seed``), else
            they come from the start of the split.
        sample: number of images drawn at random from the whole split (by ``seed``, in the data's order), before ``limit``; null: all.
        classifier: the Explanandum. Its task and classes are the data's.
        methods: what is evaluated, by label.
        protocols: names, or {label: {protocol: name, option: value}}; the label is the name where no protocol is given.
        mode: paper, code (where the public code differs from its paper) or corrected; protocols without differences ignore it.
        classes: explain the image's labels or the classes that the classifier predicts.
        rescale: raw maps clamped to [0,1], maps rescaled per map to [0,1] (minmax), or both, where a protocol needs masks.
        seed: seed of random methods and of the bootstrap.
        device: auto, cpu, cuda, cuda:1, ...
        batch_size: images per step. Batches are fixed, so it is part of what identifies a result.
        bootstrap: resamples of the images behind each interval; 0 gives none.
        confidence: confidence level of the intervals.
        cache: map cache.
        time_budget: seconds after which no new batch is started; running again goes on. null: none.
        threads: CPU threads of torch; null leaves torch's choice.
        progress: show the progress bar.
        gallery: number of images, evenly spread over the evaluated ones, whose maps are kept as small pictures for the report; 0: none.
            A larger number on finished results adds pictures and computes no number again.
    """

    out: str = "results/evaluation"
    data: DataConfig = field(default_factory=DataConfig)
    split: Literal["train", "val", "test"] = "test"
    limit: int | None = None
    sample: int | None = None
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    methods: dict[str, MethodConfig] = field(default_factory=dict)
    protocols: list[str | dict[str, dict[str, Any]]] = field(default_factory=list)
    mode: Literal["paper", "code", "corrected"] = "corrected"
    classes: Literal["labels", "predicted"] = "labels"
    rescale: Literal["raw", "minmax", "both"] = "both"
    seed: int = 0
    device: str = "auto"
    batch_size: int = 50
    bootstrap: int = 1000
    confidence: float = 0.95
    cache: CacheConfig = field(default_factory=CacheConfig)
    time_budget: float | None = None
    threads: int | None = None
    progress: bool = True
    gallery: int = 24
