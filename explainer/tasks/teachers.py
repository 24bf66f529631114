"""Teachers: where the target maps of distillation come from. Any baseline, asked at every step or once into a map cache."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import explainer
from explainer import baselines, plugins
from explainer.attribution import Attributor, one_map

# The cache is evaluation's; it names no method and no protocol, and evaluation and distillation have to agree on it to the byte.
from explainer.attribution.map_cache import MapCache, cache_key, method_key, shares_work
from explainer.config import TeacherConfig
from explainer.data.contract import ExplainerDataset
from explainer.data.datamodule import DataModule
from explainer.data.samplers import spread
from explainer.errors import ConfigError
from explainer.tensors import Batch

log = logging.getLogger(__name__)
Scale = Literal["minmax", "max", "clamp"]
Subject = Literal["masks", "order"]


def to_unit(maps: Tensor, scale: Scale = "minmax") -> Tensor:
    """Raw maps as targets in [0,1]; a map that says nothing (constant under ``minmax``, nowhere positive under ``max``) becomes NaN.

    Args:
        maps: ``[N,H,W]``; NaN stays NaN.
        scale: ``minmax`` (minimum to 0, maximum to 1), ``max`` (negative values to 0, maximum to 1) or ``clamp`` (to [0,1]).
    """
    if scale == "clamp":
        return maps.clamp(0, 1)
    flat = maps.flatten(1)
    low = torch.zeros_like(flat[:, :1]) if scale == "max" else flat.amin(dim=1, keepdim=True)
    reach = flat.amax(dim=1, keepdim=True) - low
    unit = ((flat - low) / reach).clamp(0, 1)
    return torch.where(reach > 0, unit, torch.nan).view_as(maps)


def harden(maps: Tensor, classes: Tensor, thresholds: Tensor) -> Tensor:
    """1 where a map is at least its class's threshold, else 0; where the threshold is NaN the map stays soft, and NaN stays NaN.

    Args:
        maps: ``[N,H,W]`` in [0,1].
        classes: ``[N]``.
        thresholds: ``[K]``.
    """
    level = thresholds.to(maps)[classes][:, None, None]
    hard = torch.where(maps.isnan(), maps, (maps >= level).to(maps))
    return torch.where(level.isnan(), maps, hard)


def thresholds_of(threshold: float | Mapping[str, float] | None, class_names: Sequence[str]) -> Tensor:
    """``[K]`` thresholds, NaN where maps stay soft, from one number or ``{class name: number}``."""
    if threshold is None:
        return torch.full((len(class_names),), torch.nan)
    if not isinstance(threshold, Mapping):
        threshold = dict.fromkeys(class_names, float(threshold))
    for name, value in threshold.items():
        if name not in class_names:
            raise ConfigError(f"teachers.threshold names the class {name!r}; the classes are {', '.join(class_names)}.")
        if not 0 <= value <= 1:
            raise ConfigError(f"teachers.threshold must lie in [0,1], received {value} for {name}.")
    return torch.tensor([threshold.get(name, torch.nan) for name in class_names])


class LiveTeacher:
    """A baseline asked at every step, for the present classes only."""

    def __init__(self, attributor: Attributor) -> None:
        self.attributor = attributor

    def maps(self, batch: Batch, wanted: Tensor, split: str, generator: torch.Generator) -> Tensor:
        """Raw maps ``[P,H,W]`` of the pairs ``wanted.nonzero()``."""
        rows, classes = wanted.nonzero(as_tuple=True)
        if shares_work(self.attributor) and not self.attributor.needs_gradients:
            # All classes cost what one does (RISE); a gradient method pays per class, so there each pair is an image of one batch.
            present = classes.unique()
            maps = self.attributor.all_classes(batch.images, present.tolist(), generator=generator)
            return maps[rows, torch.searchsorted(present, classes)]
        return self.attributor(batch.images[rows], classes, generator=generator)


class CachedTeacher:
    """Maps from a cache, moved as the images are by augmentation. Kept in memory as bytes, up to a limit.

    Args:
        caches: a cache for each split that has one.
        datasets: data sets of the same splits.
        scale: how a raw map becomes [0,1]; see :func:`to_unit`; maps are kept after it.
        memory: bytes to keep; beyond, maps are read from the files at every step.
        chosen: positions of the training images whose maps are used; None for all in the cache.
        empty: positions of the training images that show no class with a region: they need no map to teach that every mask is empty.
    """

    def __init__(
        self,
        caches: dict[str, MapCache],
        datasets: dict[str, Any],
        scale: Scale = "minmax",
        *,
        memory: int = 2**31,
        chosen: Sequence[int] | None = None,
        empty: Collection[int] = (),
    ) -> None:
        self._empty = set(empty)
        self.caches, self.datasets, self.scale, self.memory = caches, datasets, scale, memory
        self._index = {s: {d.sample_id(i): i for i in range(len(d))} for s, d in datasets.items()}
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._usable: dict[str, set[int]] = {s: set() for s in caches}  # positions of images with a map that says something
        wanted = {s: None if chosen is None or s != "train" else set(chosen) for s in caches}
        used = 0
        for split, cache in caches.items():
            index, these = self._index[split], wanted[split]
            pairs = [p for p in cache.pairs() if p[0] in index and (these is None or index[p[0]] in these)]
            for start in range(0, len(pairs), 256):
                part = pairs[start : start + 256]
                for pair, value in zip(part, self._read(cache, part), strict=True):
                    used += value.numel()
                    if value.numel():
                        self._usable[split].add(index[pair[0]])
                    if used <= memory or not value.numel():
                        self._kept[pair] = value
        self._chosen = {s: None if these is None else self._usable[s] for s, these in wanted.items()}

    def _read(self, cache: MapCache, pairs: Sequence[tuple[str, int]]) -> list[Tensor]:
        """uint8 ``[H,W]`` each (255 steps of [0,1]), empty where there is no map or it says nothing."""
        found = cache.get([i for i, _ in pairs], [k for _, k in pairs])
        empty = torch.empty(0, dtype=torch.uint8)
        units = [empty if m is None else to_unit(m[None], self.scale)[0] for m in found]
        return [empty if not len(m) or bool(m.isnan().any()) else (m * 255).round().to(torch.uint8) for m in units]

    def images(self, split: str) -> set[int]:
        """Positions in the split's data set of the images with at least one map that says something, or in which none has to."""
        return self._usable.get(split, set()) | (self._empty if split == "train" else set())

    def maps(self, batch: Batch, wanted: Tensor, split: str, generator: torch.Generator) -> Tensor:
        """Maps ``[P,H,W]`` in [0,1] of the pairs ``wanted.nonzero()``, NaN where the cache has none."""
        rows, classes = wanted.nonzero(as_tuple=True)
        size = batch.images.shape[-2:]
        result = batch.images.new_full((len(rows), *size), torch.nan)
        epochs = batch.epochs or (0,) * len(batch)
        if split not in self.caches:
            return result
        for n, (row, label) in enumerate(zip(rows.tolist(), classes.tolist(), strict=True)):
            pair = (batch.ids[row], label)
            chosen = self._chosen[split]
            if chosen is not None and self._index[split][pair[0]] not in chosen:
                continue
            stored = self._kept[pair] if pair in self._kept else self._read(self.caches[split], [pair])[0]
            if not stored.numel():
                continue
            value = stored.float()[None] / 255
            if split == "train":
                value = self.datasets[split].augmented_maps(self._index[split][pair[0]], value, epochs[row])
            if value.shape[-2:] != size:
                raise ConfigError(
                    f"cached map of {pair[0]} is {tuple(value.shape[-2:])}, the images are {tuple(size)}: fill the cache again."
                )
            result[n] = value[0].to(result)
        return result


@dataclass
class _Member:
    """A teacher with how its maps are used."""

    source: LiveTeacher | CachedTeacher
    weight: float
    scale: Scale
    thresholds: Tensor
    teaches: Subject = "masks"


class Teachers:
    """Several teachers as one for each subject: the weighted mean of those that teach it and know a class."""

    def __init__(self, members: Sequence[_Member]) -> None:
        self.members = list(members)

    def answers(self, split: str) -> bool:
        """Whether any teacher has maps for images of this split."""
        return any(isinstance(m.source, LiveTeacher) or split in m.source.caches for m in self.members)

    def images(self, split: str) -> list[int] | None:
        """Positions in the split's data set of the images for which a teacher has maps; None if all, because one is asked live."""
        sources = [m.source for m in self.members]
        cached = [s for s in sources if isinstance(s, CachedTeacher)]
        return None if len(cached) < len(sources) else sorted(set().union(*(s.images(split) for s in cached)))

    def __call__(
        self, batch: Batch, split: str, generator: torch.Generator, columns: Tensor | None = None, *, subject: Subject = "masks"
    ) -> Tensor:
        """Target maps of the present classes; NaN for absent ones and where no teacher knows.

        Args:
            batch: images with their targets.
            split: whose caches are read.
            generator: source of randomness for teachers that are asked now.
            columns: ``[B,n]`` the classes whose maps are given; every present class is among them. None: all K.
            subject: what the teachers that are asked teach.

        Returns:
            ``[B,K,H,W]`` in [0,1], or ``[B,n,H,W]``.
        """
        wanted = batch.targets > 0.5
        rows, classes = wanted.nonzero(as_tuple=True)
        B, K = wanted.shape
        size = batch.images.shape[-2:]
        out = torch.full((B, K if columns is None else columns.shape[1], *size), torch.nan, device=batch.images.device)
        if len(rows) == 0:
            return out
        total, weights = out.new_zeros(len(rows), *size), out.new_zeros(len(rows), 1, 1)
        for member in self.members:
            if member.teaches != subject:
                continue
            raw = member.source.maps(batch, wanted, split, generator).float()
            unit = raw if isinstance(member.source, CachedTeacher) else to_unit(raw, member.scale)
            target = harden(unit, classes, member.thresholds)
            known = torch.isfinite(target).flatten(1).all(dim=1)[:, None, None]
            total = total + torch.where(known, member.weight * target, 0.0)
            weights = weights + member.weight * known
        places = classes if columns is None else (columns[rows] == classes[:, None]).long().argmax(dim=1)
        out[rows, places] = torch.where(weights > 0, total / weights, torch.nan)
        return out


def check_teachers(configs: Sequence[TeacherConfig], explanandum: Any, data: DataModule) -> None:
    """Everything that is wrong with teachers before the first map is computed or read.

    Raises:
        ConfigError: a weight or threshold out of range; a method that needs ground truth, or gradients that are not there;
            ``images`` without a cache.
    """
    for config in configs:
        if config.weight <= 0:
            raise ConfigError(f"teachers.{config.name}.weight must be positive, received {config.weight}.")
        if config.images < 0 or (config.images and config.cache is None):
            raise ConfigError(
                f"teachers.{config.name}.images is the number of training images whose maps go into its cache, received {config.images} "
                f"and cache {config.cache}: name a folder (cache: runs/maps), or leave images out to ask the method at every step."
            )
        thresholds_of(config.threshold, data.class_names)
        live_attributor(config.name, config.options, explanandum)


def build_teachers(configs: Sequence[TeacherConfig], explanandum: Any, data: DataModule, splits: Sequence[str]) -> Teachers | None:
    """The run's teachers; None if there are none.

    Args:
        configs: configurations of the run.
        explanandum: the classifier, shared with the task.
        data: the run's images.
        splits: splits for which caches are opened: a missing one is an error in ``train`` and leaves ``val`` without targets.

    Raises:
        ConfigError: see :func:`check_teachers`; an empty or incomplete cache (with the command that fills it).
    """
    check_teachers(configs, explanandum, data)
    members = []
    for config in configs:
        thresholds = thresholds_of(config.threshold, data.class_names)
        source: LiveTeacher | CachedTeacher
        if config.cache is None:
            source = LiveTeacher(live_attributor(config.name, config.options, explanandum))
        else:
            source = _cached(config, explanandum, data, splits)
        members.append(_Member(source, config.weight, config.scale, thresholds, config.teaches))
    return Teachers(members) if members else None


def live_attributor(name: str, options: dict[str, Any], explanandum: Any) -> Attributor:
    """A baseline that this classifier allows."""
    attributor = one_map(baselines.build(name, explanandum, **options))
    if attributor.needs_gradients and not explanandum.differentiable:
        inside = "" if attributor.inner is None else f" around {attributor.inner.name}"
        remedy = "rise or occlusion" if attributor.inner is None else "options: {method: occlusion}"
        raise ConfigError(
            f"{name}{inside} backpropagates through the classifier, and this classifier gives scores only: take a method without gradients "
            f"({remedy})."
        )
    if attributor.needs_masks:
        raise ConfigError(f"{name} reads ground truth and cannot teach: the Explainer learns without pixel labels.")
    return attributor


def method_fingerprint(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """What a map cache knows of a baseline."""
    return method_key(name, plugins.find("explainer.baselines", name), options)


def open_cache(config: TeacherConfig, explanandum: Any, data: DataModule, split: str, rank: int = 0) -> MapCache:
    """The cache that ``explainer maps`` fills and evaluation reads, of one method and split."""
    assert config.cache is not None
    method = method_fingerprint(config.name, config.options)
    key = cache_key(
        explanandum.fingerprint(), data.dataset(split).fingerprint(), method, split=split, seed=config.seed, version=explainer.__version__
    )
    return MapCache(config.cache, key, config.dtype, rank)


def _cached(config: TeacherConfig, explanandum: Any, data: DataModule, splits: Sequence[str]) -> CachedTeacher:
    caches = {split: open_cache(config, explanandum, data, split) for split in splits}
    found = {split: cache for split, cache in caches.items() if len(cache)}
    chosen = chosen_images(config, data) if config.images and "train" in splits else None
    empty: list[int] = []
    if "train" in splits:
        empty = _without_regions(data.dataset("train"), chosen)
        present = {i for i, _ in caches["train"].pairs()}
        with_map = set(chosen or ()).difference(empty)
        lacking = [i for i in chosen or () if i in with_map and data.dataset("train").sample_id(i) not in present]
        some = f" --limit {config.images} --spread true --seed {config.seed}" if config.images else ""
        fill = (
            f"explainer maps --method.name {config.name} --split train --cache.folder {config.cache}{some} (and the run's method options, "
            "data and classifier)"
        )
        if not present or (chosen is not None and len(lacking) == len(with_map)):
            raise ConfigError(
                f"teachers.{config.name}: {config.cache} has no maps of this classifier, method, options and training split"
                f"{'' if chosen is None else ' for the chosen images'}. Fill it with: {fill}"
                f"{', or let a run of one process compute some: teachers: images: 400' if chosen is None else ''}."
            )
        if lacking:
            log.warning(
                "teacher %s: %d of %d images have no map (images without labels have none). To fill the cache: %s",
                config.name,
                len(lacking),
                config.images,
                fill,
            )
    for split, cache in found.items():
        log.info("teacher %s: %d maps of %s from %s", config.name, len(cache), split, cache.folder)
    datasets = {split: data.dataset(split) for split in found}
    teacher = CachedTeacher(found, datasets, config.scale, memory=int(config.memory_mib * 2**20), chosen=chosen, empty=empty)
    if "train" in splits and not teacher.images("train"):
        raise ConfigError(
            f"teachers.{config.name}: none of the {len(caches['train'])} maps of train in {config.cache} says anything: each is constant, "
            f"or nowhere positive under scale: max (received scale: {config.scale}). Is the classifier trained? Otherwise take another "
            "method or scale."
        )
    return teacher


def _without_regions(dataset: ExplainerDataset, chosen: Sequence[int] | None) -> list[int]:
    """Positions of the (chosen) images all of whose labels are classes that no pixel belongs to."""
    if not dataset.no_region:
        return []
    silent = torch.tensor([name in dataset.no_region for name in dataset.class_names])
    targets = {i: dataset.target(i) > 0.5 for i in (range(len(dataset)) if chosen is None else chosen)}
    return [i for i, present in targets.items() if present.any() and not (present & ~silent).any()]


def chosen_images(config: TeacherConfig, data: DataModule) -> list[int]:
    """Positions of the training images that the teacher teaches with (``images``), as ``explainer maps --spread true`` takes them."""
    return spread(len(data.dataset("train")), config.images, config.seed)
