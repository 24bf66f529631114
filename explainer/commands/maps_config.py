"""The configuration of ``explainer maps`` as a plain dataclass; importing it does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from explainer.config import ClassifierConfig, DataConfig
from explainer.evaluation.config import CacheConfig, MethodConfig


@dataclass
class MapsConfig:
    """Fill a map cache: one method, one split.

    Attributes:
        method: the baseline (or trained Explainer) whose maps are wanted.
        data: images; augmentation is switched off, because the cache knows an image by its id.
        split: split of the data: train, val or test.
        limit: number of images; null takes all.
        spread: take them from all over the split, as ``teachers: images`` does, instead of from its start.
        classifier: the Explanandum.
        classes: explain the image's labels, the classes that the classifier predicts, or all.
        cache: where to; the folder is needed.
        seed: seed of random methods; distillation asks for the same (teachers: seed).
        device: auto, cpu, cuda, ...
        batch_size: images per step.
        share: which of the ``shares`` of the images this process takes, from 0: for arrays of jobs that fill one cache.
        shares: number of jobs that divide the images among them.
        time_budget: seconds after which no new batch is started; running again goes on.
        threads: CPU threads of torch.
    """

    method: MethodConfig = field(default_factory=MethodConfig)
    data: DataConfig = field(default_factory=DataConfig)
    split: Literal["train", "val", "test"] = "train"
    limit: int | None = None
    spread: bool = False
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    classes: Literal["labels", "predicted", "all"] = "labels"
    cache: CacheConfig = field(default_factory=CacheConfig)
    seed: int = 0
    device: str = "auto"
    batch_size: int = 50
    share: int = 0
    shares: int = 1
    time_budget: float | None = None
    threads: int | None = None
