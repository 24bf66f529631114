"""``explainer maps``: fill a map cache that evaluation and distillation read."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import explainer
from explainer.attribution.map_cache import MapCache, cache_key, cached_maps
from explainer.commands import assembly
from explainer.commands.maps_config import MapsConfig
from explainer.commands.numbers import require_least
from explainer.data.samplers import spread
from explainer.errors import ConfigError
from explainer.evaluation.config import EvaluateConfig
from explainer.evaluation.progress import Progress
from explainer.metrics.classifier import predicted_classes
from explainer.tensors import Batch

log = logging.getLogger(__name__)


def wanted_classes(batch: Batch, explanandum: Any, classes: str, no_region: Sequence[str] = ()) -> Tensor:
    """The (image, class) pairs to explain.

    Args:
        batch: images with their targets.
        explanandum: the classifier, asked for ``predicted`` only.
        classes: ``labels``, ``predicted`` (see :func:`~explainer.metrics.classifier.predicted_classes`) or ``all``.
        no_region: names of the classes that no pixel belongs to: they have no map.

    Returns:
        bool ``[B,K]``.
    """
    if classes == "labels":
        wanted = batch.targets > 0.5
    elif classes == "all":
        wanted = torch.ones_like(batch.targets, dtype=torch.bool)
    else:
        with torch.no_grad():
            wanted = predicted_classes(explanandum(batch.images), explanandum.task)
    if no_region:
        wanted = wanted & torch.tensor([name not in no_region for name in explanandum.class_names], device=wanted.device)
    return wanted


def run(config: MapsConfig) -> int:
    """Compute what is missing; returns the exit code (1 if the time budget cut it short)."""
    if config.method.name is None:
        raise ConfigError("method.name is missing: say whose maps, e.g. --method.name rise.")
    if config.cache.folder is None:
        raise ConfigError("cache.folder is missing: say where the maps go, e.g. --cache.folder runs/maps.")
    require_least(config, 1, "batch_size", "limit", "threads")
    if not 0 <= config.share < config.shares:
        raise ConfigError(f"share must lie in 0..shares-1, received share {config.share} of {config.shares} shares.")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    plain = replace(config.data, options=_unaugmented(config.data.options), train_options=_unaugmented(config.data.train_options))
    setting = EvaluateConfig(
        data=plain, split=config.split, classifier=config.classifier, seed=config.seed, device=config.device, batch_size=config.batch_size
    )
    with assembly.process_group() as (rank, world):
        data = assembly.data_module(setting)
        device = assembly.device_of(config.device)
        explanandum = assembly.classifier(setting, data).to(device)
        method = assembly.build_method(config.method.name, config.method, setting, explanandum, data, option="method")
        dataset = data.dataset(config.split)
        key = cache_key(
            explanandum.fingerprint(),
            dataset.fingerprint(),
            method.fingerprint,
            split=config.split,
            seed=config.seed,
            version=explainer.__version__,
        )
        own, all_shares = config.share * world + rank, config.shares * world
        cache = MapCache(config.cache.folder, key, config.cache.dtype, own)
        number = len(dataset) if config.limit is None else min(config.limit, len(dataset))
        indices = spread(len(dataset), number, config.seed) if config.spread else list(range(number))
        parts = [indices[i : i + config.batch_size] for i in range(0, number, config.batch_size)][own::all_shares]
        batches = (batch.to(device) for batch in data.batches(config.split, parts))
        start, done = time.monotonic(), 0
        maps = cached_maps(
            cache,
            method.attributor,
            batches,
            wanted=lambda b: wanted_classes(b, explanandum, config.classes, dataset.no_region),
            generator=lambda: torch.Generator().manual_seed(config.seed),
            batch_size=method.batch_size,
        )
        with Progress(sum(len(p) for p in parts), rank == 0, f"maps of {config.method.name}") as progress:
            for batch, _ in maps:
                done += len(batch)
                progress.advance(len(batch))
                if config.time_budget is not None and time.monotonic() - start > config.time_budget:
                    break
    complete = done >= sum(len(p) for p in parts) - len(data.skipped[config.split])
    print(f"{cache.folder}: {len(cache)} maps of {config.method.name}; {done} images in {time.monotonic() - start:.1f} s")
    if not complete:
        log.warning("the time budget of %g s is used up: run the same command again to go on", config.time_budget)
    return int(not complete)


def _unaugmented(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k != "augment"}
