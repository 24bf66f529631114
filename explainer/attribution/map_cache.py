"""Maps computed once: a folder of compressed shards that evaluation and distillation read alike.

A cache folder belongs to one key: the fingerprints of classifier, method with options, and data. Shards are written to a temporary file
and renamed, under names that no other process uses, so that a kill leaves no half shard and several processes lose nothing. Each shard
carries the key and a SHA-256 of its content; one that is truncated, altered or foreign is set aside with a notice and its maps count as
missing.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from explainer.attribution import Attributor, DenseAttributor
from explainer.errors import ConfigError, FingerprintMismatchError, ShapeError
from explainer.files import replacing, write_text
from explainer.tensors import Batch

log = logging.getLogger(__name__)

MapType = Literal["float32", "float16", "uint8"]
_ARRAYS = ("ids", "classes", "maps", "low", "scale", "key")
_KEPT_IN_MEMORY = 4


def quantize(maps: Tensor, dtype: MapType) -> dict[str, NDArray[Any]]:
    """Maps ``[N,H,W]`` as arrays ``maps``, ``low`` and ``scale`` with ``map = low + scale * stored``.

    ``float16`` is relative to the map's largest absolute value, so that neither tiny gradients nor large scores leave its range (relative
    error of the largest values 5e-4). ``uint8`` has 255 equal steps between minimum and maximum (error at most 0.2 % of the range); a map
    with NaN or infinity becomes NaN as a whole.
    """
    values = maps.detach().cpu().double().numpy()
    flat = values.reshape(len(values), -1)
    if dtype == "float32":
        return {"maps": values.astype(np.float32), "low": np.zeros(len(flat)), "scale": np.ones(len(flat))}
    if dtype == "float16":
        scale = np.where(np.isfinite(flat), np.abs(flat), 0.0).max(1)
        scale = np.where(scale > 0, scale, 1.0)
        return {"maps": (values / scale[:, None, None]).astype(np.float16), "low": np.zeros(len(flat)), "scale": scale}
    sound = np.isfinite(flat).all(1)
    safe = np.where(sound[:, None], flat, 0.0)
    low, high = safe.min(1), safe.max(1)
    scale = np.where(high > low, (high - low) / 255, 1.0)
    stored = np.rint((safe - low[:, None]) / scale[:, None]).astype(np.uint8).reshape(values.shape)
    return {"maps": stored, "low": np.where(sound, low, np.nan), "scale": scale}


def dequantize(arrays: Mapping[str, NDArray[Any]]) -> Tensor:
    """The inverse of :func:`quantize`, float32."""
    low, scale = (np.asarray(arrays[k], dtype=np.float64)[:, None, None] for k in ("low", "scale"))
    return torch.from_numpy((low + scale * arrays["maps"].astype(np.float64)).astype(np.float32))


def key_text(key: Mapping[str, Any]) -> str:
    """A key as canonical JSON."""
    try:
        return json.dumps(dict(key), sort_keys=True)
    except TypeError as error:
        raise ConfigError(f"a map cache's key must hold plain values (texts, numbers, lists), received {dict(key)!r}: {error}") from error


def method_key(name: str, method: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a baseline's maps besides the classifier: its options with the defaults filled in, and the revision of its code.

    Args:
        name: the method's name, as in configurations.
        method: its class.
        options: those that were given.
    """
    parameters = inspect.signature(method).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty and p.kind is not p.VAR_KEYWORD}
    plain = json.loads(json.dumps({**defaults, **options}, sort_keys=True, default=str))
    key = {"name": name, "options": plain, "revision": getattr(method, "revision", 0)}
    inner = [method_key(*one) for one in method.inner_methods(plain)] if issubclass(method, Attributor) else []
    if inner:
        for option in ("method", "options", "methods"):  # said by the inner keys, there with their defaults
            plain.pop(option, None)
        key["inner"] = inner[0] if len(inner) == 1 else inner
    return key


def cache_key(classifier: str, data: str, method: Mapping[str, Any], *, split: str, seed: int, version: str) -> dict[str, Any]:
    """The key under which evaluation, ``explainer maps`` and distillation find the same maps.

    Args:
        classifier, data: fingerprints.
        method: what identifies the method; see :func:`method_key`; of a trained Explainer its name, configuration and a hash of its
            weights.
        split: split of the data: train, val or test.
        seed: seed of random methods.
        version: version of this package.
    """
    return {"classifier": classifier, "data": data, "method": dict(method), "seed": seed, "split": split, "version": version}


class MapCache:
    """Maps of one method on one data set, by image id and class.

    Args:
        folder: shared by all keys; this key's shards are in ``folder/<hash of the key>``.
        key: plain values that decide the maps, e.g. ``{"classifier": ..., "method": ..., "options": ..., "data": ...}``.
        dtype: how maps are stored (part of the key); see :func:`quantize`.
        rank: rank of this process, in the shards' names.

    Raises:
        FingerprintMismatchError: the folder's ``key.json`` is of another key.
    """

    def __init__(self, folder: str | Path, key: Mapping[str, Any], dtype: MapType = "float16", rank: int = 0) -> None:
        if dtype not in get_args(MapType):
            raise ConfigError(f"cache dtype must be one of {', '.join(get_args(MapType))}, received {dtype!r}.")
        self.key, self.dtype, self.rank = key_text({**key, "dtype": dtype}), dtype, rank
        self.folder = Path(folder) / hashlib.sha256(self.key.encode()).hexdigest()[:16]
        self.notices: list[str] = []
        self._place: dict[tuple[str, int], tuple[str, int]] = {}
        self._seen: set[str] = set()
        self._loaded: OrderedDict[str, dict[str, NDArray[Any]]] = OrderedDict()
        self.folder.mkdir(parents=True, exist_ok=True)
        record = self.folder / "key.json"
        if not record.is_file():
            write_text(record, self.key)
        elif (known := record.read_text(encoding="utf-8", errors="replace")) != self.key:
            raise FingerprintMismatchError(f"map cache {self.folder} was made for {known}, not for {self.key}. Delete it.")
        self.refresh()

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, pair: tuple[str, int]) -> bool:
        return pair in self._place

    def pairs(self) -> list[tuple[str, int]]:
        """The (image id, class) pairs that are there, shard by shard: reading them in this order opens each shard once."""
        return list(self._place)

    # ------------------------------------------------------------------ reading
    def refresh(self) -> None:
        """Take note of shards that other processes have written since."""
        for path in sorted(self.folder.glob("shard-*.npz")):
            if path.name in self._seen:
                continue
            self._seen.add(path.name)
            shard = self._read(path)
            if shard is None:
                continue
            for row, pair in enumerate(zip(shard["ids"].tolist(), shard["classes"].tolist(), strict=True)):
                self._place[pair] = (path.name, row)

    def get(self, ids: Sequence[str], classes: Sequence[int]) -> list[Tensor | None]:
        """The map ``[H,W]`` float32 of each (image, class) pair, None where it is not there (or could not be verified)."""
        pairs = list(zip(ids, classes, strict=True))
        if any(pair not in self._place for pair in pairs):
            self.refresh()
        found: list[Tensor | None] = []
        for pair in pairs:
            place = self._place.get(pair)
            shard = self._shard(place[0]) if place is not None else None
            if place is None or shard is None:
                found.append(None)
                continue
            row = slice(place[1], place[1] + 1)
            found.append(dequantize({k: shard[k][row] for k in ("maps", "low", "scale")})[0])
        return found

    def _shard(self, name: str) -> dict[str, NDArray[Any]] | None:
        if name not in self._loaded:
            shard = self._read(self.folder / name)
            if shard is None:
                self._place = {pair: place for pair, place in self._place.items() if place[0] != name}
                return None
            self._remember(name, shard)
        self._loaded.move_to_end(name)
        return self._loaded[name]

    def _remember(self, name: str, shard: dict[str, NDArray[Any]]) -> None:
        self._loaded[name] = shard
        while len(self._loaded) > _KEPT_IN_MEMORY:
            self._loaded.popitem(last=False)

    def _read(self, path: Path) -> dict[str, NDArray[Any]] | None:
        """A verified shard, or None after a notice."""
        try:
            with np.load(path, allow_pickle=False) as file:
                shard = {name: file[name] for name in _ARRAYS}
                digest = str(file["digest"])
        except FileNotFoundError:
            return None  # another process has just set it aside
        except Exception as error:  # zipfile, zlib and numpy raise many types on damaged bytes
            self._reject(path, f"is damaged ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no detail'})")
            return None
        if digest != _digest(shard):
            self._reject(path, "does not match its checksum")
            return None
        if str(shard["key"]) != self.key:
            self._reject(path, "belongs to another classifier, method or data set")
            return None
        return shard

    def _reject(self, path: Path, reason: str) -> None:
        notice = f"map cache: {path} {reason}; its maps are computed again (the file is kept as {path.name}.rejected)"
        log.warning(notice)
        self.notices.append(notice)
        try:
            path.replace(path.with_name(path.name + ".rejected"))
        except FileNotFoundError:
            log.debug("%s was set aside by another process", path)

    # ------------------------------------------------------------------ writing
    def put(self, ids: Sequence[str], classes: Sequence[int], maps: Tensor) -> Tensor:
        """Store one map per (image, class) pair, durably; returns the maps as a later :meth:`get` will give them.

        Args:
            ids: N image ids.
            classes: N class numbers.
            maps: ``[N,H,W]``.
        """
        if maps.ndim != 3 or not len(ids) == len(classes) == len(maps):
            raise ShapeError(f"put takes N ids, N classes and maps [N,H,W], received {len(ids)}, {len(classes)} and {tuple(maps.shape)}.")
        arrays = quantize(maps, self.dtype)
        if len(maps) == 0:
            return dequantize(arrays)
        shard: dict[str, NDArray[Any]] = {
            "ids": np.array(list(ids), dtype=np.str_),
            "classes": np.array(list(classes), dtype=np.int64),
            **arrays,
            "key": np.array(self.key),
        }
        name = f"shard-{self.rank:03d}-{uuid.uuid4().hex[:16]}.npz"
        with replacing(self.folder / name) as file:
            np.savez_compressed(file, digest=np.array(_digest(shard)), **shard)  # type: ignore[arg-type]
        self._seen.add(name)
        self._remember(name, shard)
        for row, pair in enumerate(zip(ids, classes, strict=True)):
            self._place[pair] = (name, row)
        return dequantize(arrays)


def _digest(shard: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in _ARRAYS:
        array = np.ascontiguousarray(shard[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def compute_pairs(
    attributor: Attributor | DenseAttributor,
    images: Tensor,
    wanted: Tensor,
    *,
    generator: Callable[[], torch.Generator] | None = None,
    masks: Tensor | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Maps of the wanted (image, class) pairs, ``[P,H,W]`` in the order of ``wanted.nonzero()``.

    A dense method answers all classes in one pass. A method with an ``all_classes`` of its own shares work between the classes of an
    image: images that want the same classes go together. Other methods get the pairs as one batch.

    Args:
        images: ``[B,3,H,W]``.
        wanted: bool ``[B,K]``.
        generator: makes a fresh generator for each call; None: the methods' own default.
        masks: ground truth for methods that read it.
        batch_size: most pairs (or images, where classes share work) per call.
    """
    rows, classes = wanted.nonzero(as_tuple=True)
    fresh = generator if generator is not None else lambda: None
    if len(rows) == 0:
        return images.new_zeros(0, *images.shape[-2:])
    if isinstance(attributor, DenseAttributor):
        needed = wanted.any(1).nonzero()[:, 0]
        place = torch.full((len(images),), -1, device=images.device)
        place[needed] = torch.arange(len(needed), device=images.device)
        most = int(wanted.sum(1).max())
        if 2 * most > wanted.shape[1]:
            dense = torch.cat([attributor(part) for part in images[needed].split(batch_size)])
            return dense[place[rows], classes]
        # Each image's own few of many classes, first in a rectangle that others fill up.
        own = wanted[needed].float().topk(most, dim=1, sorted=True).indices.sort(dim=1).values
        pieces = zip(images[needed].split(batch_size), own.split(batch_size), strict=True)
        dense = torch.cat([attributor.some(piece, k) for piece, k in pieces])
        return dense[place[rows], (own[place[rows]] == classes[:, None]).long().argmax(dim=1)]
    if not shares_work(attributor):
        parts = [
            attributor(images[r], k, generator=fresh(), masks=None if masks is None else masks[r])
            for r, k in zip(rows.split(batch_size), classes.split(batch_size), strict=True)
        ]
        return torch.cat(parts)
    groups: dict[tuple[int, ...], list[int]] = {}
    for b, row in enumerate(wanted.tolist()):
        if any(row):
            groups.setdefault(tuple(k for k, is_wanted in enumerate(row) if is_wanted), []).append(b)
    out = images.new_empty(len(rows), *images.shape[-2:])
    for chosen, members in groups.items():
        for part in torch.tensor(members, device=images.device).split(batch_size):
            maps = attributor.all_classes(images[part], list(chosen), generator=fresh(), masks=None if masks is None else masks[part])
            for b, own in zip(part.tolist(), maps, strict=True):
                out[rows == b] = own.to(out)
    return out


def shares_work(attributor: Attributor | DenseAttributor) -> bool:
    """Whether the method computes several classes of an image together; of a method around another one, whether that does."""
    while isinstance(attributor, Attributor) and attributor.inner is not None:
        attributor = attributor.inner
    return isinstance(attributor, Attributor) and attributor.classes_share_work


def cached_maps(
    cache: MapCache,
    attributor: Attributor | DenseAttributor,
    batches: Iterable[Batch],
    *,
    wanted: Callable[[Batch], Tensor] | None = None,
    generator: Callable[[], torch.Generator] | None = None,
    batch_size: int = 64,
) -> Iterator[tuple[Batch, Tensor]]:
    """For each batch ``(batch, class maps [B,K,H,W])``, from the cache where possible; what is missing is computed and stored.

    Maps that were not wanted are NaN. Values are those of the stored precision, whether they were just computed or read.

    Args:
        cache: the maps, or None; see :class:`MapCache`; its key must name this attributor, its classifier and the data.
        attributor: the method.
        batches: with ``ids`` that are unique over all batches (no random augmentation: the ids stand for the pixels).
        wanted: ``batch -> [B,K]`` bool; None wants all classes.
        generator: makes the random generator of one method; see :func:`compute_pairs`.
        batch_size: images per call; see :func:`compute_pairs`.
    """
    for batch in batches:
        B, _, H, W = batch.images.shape
        chosen = torch.ones(B, attributor.num_classes, dtype=torch.bool) if wanted is None else wanted(batch).bool().cpu()
        out = batch.images.new_full((B, attributor.num_classes, H, W), torch.nan)
        out[chosen.to(out.device)], _ = fetch_pairs(cache, attributor, batch, chosen, generator=generator, batch_size=batch_size)
        yield batch, out


def fetch_pairs(
    cache: MapCache | None,
    attributor: Attributor | DenseAttributor,
    batch: Batch,
    wanted: Tensor,
    *,
    generator: Callable[[], torch.Generator] | None = None,
    batch_size: int = 64,
) -> tuple[Tensor, int]:
    """``(maps [P,H,W] of wanted.nonzero(), number of maps that had to be computed)``; ``cache=None`` computes all."""
    images = batch.images
    target = wanted.to(images.device)
    if cache is None:
        values = compute_pairs(attributor, images, target, generator=generator, masks=batch.masks, batch_size=batch_size)
        return values.to(images), int(wanted.sum())
    rows, classes = wanted.cpu().nonzero(as_tuple=True)
    ids = [batch.ids[b] for b in rows.tolist()]
    found = cache.get(ids, classes.tolist())
    absent = [i for i, m in enumerate(found) if m is None or m.shape != images.shape[-2:]]
    if absent:
        missing = torch.zeros_like(wanted.cpu())
        missing[rows[absent], classes[absent]] = True
        computed = compute_pairs(
            attributor, images, missing.to(images.device), generator=generator, masks=batch.masks, batch_size=batch_size
        )
        stored = cache.put([ids[i] for i in absent], [int(classes[i]) for i in absent], computed)
        for i, value in zip(absent, stored, strict=True):
            found[i] = value
    maps = torch.stack([m for m in found if m is not None]) if found else torch.zeros(0, *images.shape[-2:])
    return maps.to(images), len(absent)
