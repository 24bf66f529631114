"""Methods x images x protocols -> rows. An interruption loses at most one batch; a rerun computes only what is missing.

The unit of work is one fixed batch (images i*B ... of the split): it is computed in the same way whichever process takes it and however
often the run was interrupted, so the numbers do not depend on either. Process r of n takes every n-th batch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import explainer
from explainer.attribution.map_cache import MapCache, MapType, cache_key, fetch_pairs, key_text
from explainer.errors import ConfigError, ExplainerError
from explainer.evaluation.gallery import FOLDER, Gallery, evenly, short_hash
from explainer.evaluation.progress import Progress
from explainer.evaluation.protocol import Protocol
from explainer.evaluation.results import Row, RowStore, Unit
from explainer.evaluation.scene import Maps, Method, Scene
from explainer.tensors import Batch

log = logging.getLogger(__name__)
#: Label of the rows of protocols that explain nothing.
CLASSIFIER = "classifier"


@dataclass(frozen=True)
class Settings:
    """How to run; see :class:`explainer.evaluation.config.EvaluateConfig`.

    Attributes:
        out: results folder.
        split, limit, classes, seed, batch_size, device, time_budget, progress, gallery: as in the configuration.
        cache: folder of the map cache, or None.
        cache_dtype: number format of the cache.
        rank, world: this process, and the number of processes.
    """

    out: Path
    split: str = "test"
    limit: int | None = None
    classes: Literal["labels", "predicted"] = "labels"
    seed: int = 0
    batch_size: int = 50
    device: str = "cpu"
    cache: Path | None = None
    cache_dtype: MapType = "float16"
    time_budget: float | None = None
    progress: bool = False
    gallery: int = 0
    rank: int = 0
    world: int = 1


@dataclass
class Outcome:
    """What a run left.

    Attributes:
        complete: every expected unit is stored.
        computed: units that this process computed.
        failures: ``{method: message}`` of methods that refused this classifier or these images.
        skipped: ``{(method, protocol): reason}`` of combinations that do not apply.
        refused: ``{(method, protocol): message}`` of combinations that turned out not to work; the method's other protocols go on.
        notices: messages of the map cache.
    """

    complete: bool = False
    computed: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    skipped: dict[tuple[str, str], str] = field(default_factory=dict)
    refused: dict[tuple[str, str], str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


class Runner:
    """One evaluation.

    Args:
        methods: ready-made, in the order of the tables.
        protocols: protocols by label, in the order of the tables.
        explanandum: the classifier, on the device.
        data: :class:`explainer.data.datamodule.DataModule`.
        settings: how to run.
    """

    def __init__(
        self, methods: Sequence[Method], protocols: Mapping[str, Protocol], explanandum: Any, data: Any, settings: Settings
    ) -> None:
        self.methods, self.protocols = list(methods), dict(protocols)
        self.explanandum, self.data, self.settings = explanandum, data, settings
        if len({m.label for m in methods}) != len(methods) or CLASSIFIER in {m.label for m in methods}:
            raise ConfigError(f"methods need labels of their own, and {CLASSIFIER!r} is taken: {[m.label for m in methods]}.")
        if settings.batch_size < 1 or (settings.limit is not None and settings.limit < 1):
            raise ConfigError(f"batch_size and limit must be at least 1, received {settings.batch_size} and {settings.limit}.")
        self.dataset = data.dataset(settings.split)
        for label, protocol in self.protocols.items():
            for unknown in set(protocol.methods or []) - {m.label for m in methods}:
                raise ConfigError(f"protocols.{label}: methods names {unknown!r}; the methods are {', '.join(m.label for m in methods)}.")
        number = len(self.dataset) if settings.limit is None else min(settings.limit, len(self.dataset))
        if number == 0:
            raise ConfigError(f"the {settings.split} split has no images.")
        self.images = number
        self.batches = [range(i, min(i + settings.batch_size, number)) for i in range(0, number, settings.batch_size)]
        self.fingerprints = {"classifier": explanandum.fingerprint(), "data": self.dataset.fingerprint()}
        self.store = RowStore(settings.out, settings.rank)
        self._caches: dict[str, MapCache] = {}
        self.gallery = self._gallery()
        #: Of the run in work, so that an interrupted one can still be told.
        self.outcome = Outcome(skipped=self.skipped())

    # ------------------------------------------------------------------ what there is to do
    def combinations(self) -> list[tuple[Method | None, str]]:
        """(method, protocol label) in the order of the tables; the method is None for protocols about the classifier alone."""
        alone: list[tuple[Method | None, str]] = [(None, label) for label, p in self.protocols.items() if not p.uses_maps]
        return alone + [(m, label) for m in self.methods for label, p in self.protocols.items() if self._applies(m, p)]

    def _applies(self, method: Method, protocol: Protocol) -> bool:
        asked = protocol.methods is None or method.label in protocol.methods
        return protocol.uses_maps and asked and self._reason(method, protocol) is None

    def _reason(self, method: Method, protocol: Protocol) -> str | None:
        """Why the protocol says nothing about this method or this classifier, or None."""
        return protocol.unsuited(self.explanandum) or protocol.not_applicable(method)

    def skipped(self) -> dict[tuple[str, str], str]:
        """Combinations that do not apply, with the reason."""
        found = {}
        for method in self.methods:
            for label, protocol in self.protocols.items():
                reason = self._reason(method, protocol) if protocol.uses_maps else None
                if reason is not None:
                    found[method.label, label] = reason
        return found

    def key(self, method: Method | None, label: str, batch: int) -> str:
        """Stands for everything that decides a unit's rows."""
        protocol, s = self.protocols[label], self.settings
        indices = self._cut(protocol, batch)
        plain = {
            **self.fingerprints,
            "version": explainer.__version__,
            "images": [s.split, indices.start, indices.stop, s.batch_size],
            "ids": [self.dataset.sample_id(indices[0]), self.dataset.sample_id(indices[-1])] if len(indices) else [],
            "method": None if method is None else [method.label, method.fingerprint, list(method.scales), method.batch_size],
            "protocol": [label, protocol.identity()],
            **({"threshold": method.threshold} if method is not None and method.threshold is not None else {}),
            "classes": s.classes,
            "seed": s.seed,
            "cache": s.cache_dtype if s.cache is not None and protocol.uses_maps else None,
        }
        return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:24]

    def _cut(self, protocol: Protocol, batch: int) -> range:
        """The batch's images that the protocol looks at; empty beyond its limit."""
        indices = self.batches[batch]
        return indices if protocol.images is None else range(indices.start, max(indices.start, min(indices.stop, protocol.images)))

    def expected(self, batch: int) -> list[tuple[Method | None, str, str]]:
        """``(method, protocol label, key)`` of every unit of a batch."""
        return [(m, p, self.key(m, p, batch)) for m, p in self.combinations() if len(self._cut(self.protocols[p], batch))]

    def collect(self, without: Collection[tuple[str, str]] = ()) -> tuple[dict[str, list[Unit]], bool]:
        """``({"<method>/<protocol>": units in order of the data}, complete)`` from the store: what every summary is made of.

        Args:
            without: (method, protocol) pairs that need not be complete.
        """
        stored = self.store.load()
        found: dict[str, list[Unit]] = {f"{_label(m)}/{p}": [] for m, p in self.combinations()}
        complete = True
        for batch in range(len(self.batches)):
            for method, label, key in self.expected(batch):
                if key in stored:
                    found[f"{_label(method)}/{label}"].append(stored[key])
                elif (_label(method), label) not in without:
                    complete = False
        return found, complete

    # ------------------------------------------------------------------ doing it
    def run(self) -> Outcome:
        """Compute what is missing of this process's batches. KeyboardInterrupt passes through; everything finished is stored."""
        s, stored = self.settings, self.store.load()
        outcome = self.outcome = Outcome(skipped=self.skipped())
        todo: dict[int, list[tuple[Method | None, str, str]]] = {}
        for batch in range(s.rank, len(self.batches), s.world):
            missing = [entry for entry in self.expected(batch) if entry[2] not in stored]
            if missing or any(self.gallery.lacking(m.label, self.batches[batch]) for m in self.methods):
                todo[batch] = missing
        start = time.monotonic()
        number = {self.dataset.sample_id(i): i for b in todo for i in self.batches[b]}
        batch_of = {i: b for b in todo for i in self.batches[b]}
        loader = self.data.batches(s.split, [self.batches[b] for b in todo]) if todo else []
        with Progress(sum(len(m) for m in todo.values()), s.progress and s.rank == 0) as progress:
            for loaded in loader:
                if s.time_budget is not None and time.monotonic() - start > s.time_budget:
                    log.warning("the time budget of %g s is used up: run the same command again to go on", s.time_budget)
                    break
                indices = [number[i] for i in loaded.ids]
                batch = batch_of[indices[0]]
                self._batch(batch, loaded, indices, todo[batch], outcome, progress)
        outcome.notices = [notice for cache in self._caches.values() for notice in cache.notices]
        return outcome

    def _batch(
        self,
        batch: int,
        loaded: Batch,
        indices: list[int],
        missing: list[tuple[Method | None, str, str]],
        outcome: Outcome,
        progress: Progress,
    ) -> None:
        whole = Scene(loaded.to(self.settings.device), indices, self.explanandum, self.settings.classes, self.settings.seed, self.dataset)
        scenes = {len(indices): whole}

        self.gallery.save(whole)

        def scene_of(label: str) -> Scene:
            size = sum(i in self._cut(self.protocols[label], batch) for i in indices)
            if size not in scenes:
                scenes[size] = replace(whole, batch=whole.batch[:size], indices=indices[:size])
            return scenes[size]

        by_method: dict[str, tuple[Method | None, list[tuple[str, str]]]] = {}
        for method, label, key in missing:
            by_method.setdefault(_label(method), (method, []))[1].append((label, key))
        for name, (method, wanted) in by_method.items():
            progress.show(name)
            if name not in outcome.failures:
                try:
                    units = self._method(batch, method, wanted, scene_of, whole, outcome)
                except ExplainerError as error:
                    outcome.failures[name] = str(error)
                    log.error("%s cannot be evaluated and is left out: %s", name, error)
                else:
                    if units:
                        self.store.append(units)
                    outcome.computed += len(units)
            progress.advance(len(wanted))
        for method in self.methods:
            if method.label not in outcome.failures:
                self._pictures(batch, method, whole, outcome)

    def _method(
        self,
        batch: int,
        method: Method | None,
        missing: list[tuple[str, str]],
        scene_of: Callable[[str], Scene],
        whole: Scene,
        outcome: Outcome,
    ) -> list[Unit]:
        """The units of one method on one batch; the maps are made once for all protocols. A protocol that does not work with the method,
        the classifier or the data is noted in the outcome and the others go on.
        """
        name = _label(method)
        missing = [(label, key) for label, key in missing if (name, label) not in outcome.refused]
        usable = {label: self._has_truth(self.protocols[label], method, scene_of(label)) for label, _ in missing}
        raw, seconds = torch.empty(0), math.nan
        if method is not None:
            wanted = self._wanted(method, [label for label, _ in missing if usable[label]], scene_of, whole, outcome)
            raw, seconds = self._maps(method, wanted, whole)
            self.gallery.save_maps(whole, method, raw)
        units = []
        for label, key in missing:
            protocol, scene = self.protocols[label], scene_of(label)
            rows: list[Row] = []
            if (name, label) in outcome.refused:
                continue
            if usable[label]:
                try:
                    for scale in method.scales if method is not None and protocol.uses_scale else ("raw",):
                        maps = None if method is None else Maps(method, scene, raw[: len(scene.images)], scale, self._generator)
                        rows += [score.labelled(name, scale, label, scene) for score in protocol.score(scene, maps)]
                except ExplainerError as error:
                    self._refuse(name, label, error, outcome)
                    continue
            units.append(Unit(key, name, label, batch, tuple(sorted(rows, key=Row.order)), seconds))
        return units

    def _wanted(self, method: Method, labels: Sequence[str], scene_of: Callable[[str], Scene], whole: Scene, outcome: Outcome) -> Tensor:
        """Classes ``[B,K]`` whose maps the protocols ask for."""
        wanted = torch.zeros(len(whole.images), self.explanandum.num_classes, dtype=torch.bool, device=whole.images.device)
        for label in labels:
            scene = scene_of(label)
            try:
                wanted[: len(scene.images)] |= self.protocols[label].wanted(scene)
            except ExplainerError as error:
                self._refuse(method.label, label, error, outcome)
        return wanted

    @staticmethod
    def _refuse(name: str, label: str, error: ExplainerError, outcome: Outcome) -> None:
        outcome.refused[name, label] = str(error)
        log.error("%s: protocol %s is left out: %s", name, label, error)

    def _pictures(self, batch: int, method: Method, whole: Scene, outcome: Outcome) -> None:
        """The gallery's maps that the batch's units did not leave, image by image: rows from an earlier run come without pictures."""
        for index in self.gallery.lacking(method.label, self.batches[batch]):
            labels = [
                label
                for m, label in self.combinations()
                if m is method and index in self._cut(self.protocols[label], batch) and (method.label, label) not in outcome.refused
            ]
            if index in whole.indices:
                b = whole.indices.index(index)
                try:
                    self._picture(method, replace(whole, batch=whole.batch[b : b + 1], indices=[index]), labels, outcome)
                except ExplainerError as error:
                    log.warning("%s: no picture of image %d: %s", method.label, index, error)
            if self.gallery.lacking(method.label, [index]):
                self.gallery.note_none(method.label, index)

    def _picture(self, method: Method, one: Scene, labels: Sequence[str], outcome: Outcome) -> None:
        """The gallery's maps of a scene of one image."""
        usable = [label for label in labels if self._has_truth(self.protocols[label], method, one)]
        # Protocols may want all classes; the gallery shows the explained ones.
        wanted = self._wanted(method, usable, lambda _: one, one, outcome) & one.explained
        self.gallery.save_maps(one, method, self._maps(method, wanted, one)[0])

    @staticmethod
    def _has_truth(protocol: Protocol, method: Method | None, scene: Scene) -> bool:
        """Whether the ground truth that protocol and method read is there; without it the batch gives no rows."""
        return scene.batch.masks is not None or not (protocol.needs_truth or (method is not None and method.needs_truth))

    def _maps(self, method: Method, wanted: Tensor, whole: Scene) -> tuple[Tensor, float]:
        """``(raw maps [B,K,H,W], seconds)`` of the wanted classes ``[B,K]``; NaN elsewhere."""
        B, _, H, W = whole.images.shape
        K = self.explanandum.num_classes
        if not bool(wanted.any()):
            # Nothing is read: a view of one NaN takes no memory.
            return whole.images.new_full((), torch.nan).expand(B, K, H, W), math.nan
        start = time.perf_counter()
        pairs, computed = fetch_pairs(
            self._cache(method), method.attributor, whole.batch, wanted, generator=self._generator, batch_size=method.batch_size
        )
        seconds = time.perf_counter() - start if computed else math.nan
        raw = whole.images.new_full((B, K, H, W), torch.nan)
        raw[wanted] = pairs
        return raw, seconds

    def _cache(self, method: Method) -> MapCache | None:
        s = self.settings
        if s.cache is None:
            return None
        if method.label not in self._caches:
            self._caches[method.label] = MapCache(s.cache, self._map_key(method), s.cache_dtype, s.rank)
        return self._caches[method.label]

    def _map_key(self, method: Method) -> dict[str, Any]:
        f, s = self.fingerprints, self.settings
        return cache_key(f["classifier"], f["data"], method.fingerprint, split=s.split, seed=s.seed, version=explainer.__version__)

    def _gallery(self) -> Gallery:
        """Pictures are taken of images that a protocol with maps looks at."""
        reach = max(
            (self.images if p.images is None else min(p.images, self.images) for p in self.protocols.values() if p.uses_maps), default=0
        )
        folders = {m.label: short_hash(key_text(self._map_key(m))) for m in self.methods}
        indices = tuple(evenly(reach, self.settings.gallery))
        return Gallery(Path(self.settings.out) / FOLDER, indices, reach, short_hash(self.fingerprints["data"]), folders)

    def _generator(self) -> torch.Generator:
        # The same seed for every call: a map then does not depend on which batch, process or rerun computed it.
        return torch.Generator().manual_seed(self.settings.seed)


def _label(method: Method | None) -> str:
    return CLASSIFIER if method is None else method.label
