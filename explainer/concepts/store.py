"""Activations, labels and masks of the probe images, computed once. Every probe reads them from here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from explainer.errors import ConfigError
from explainer.tensors import Batch

Features = Callable[[Tensor], dict[str, Tensor]]


@dataclass
class ConceptMasks:
    """Ground truth of one split; the same for every layer.

    Attributes:
        ids: N stable strings.
        labels: ``[N,C]`` bool, the image shows the concept.
        rows: ``[N,C]`` long, the row of ``bits`` that holds the pair's mask; -1 where there is no mask, or an empty one.
        bits: ``[R, ceil(S/8)]`` uint8, packed masks.
        void: ``[N, ceil(S/8)]`` uint8, packed pixels that are left out of every sum; or None.
        side: ``(hs, ws)`` of the masks; S = hs * ws.
    """

    ids: list[str]
    labels: Tensor
    rows: Tensor
    bits: Tensor
    void: Tensor | None
    side: tuple[int, int]

    def images_with(self, concept: int) -> Tensor:
        """Indices of the images whose mask of the concept is not empty (X_c), ``[n]`` long."""
        return (self.rows[:, concept] >= 0).nonzero().flatten()

    def masks(self, concept: int, images: Tensor) -> Tensor:
        """Masks of a concept in images that have one, ``[n,hs,ws]`` bool."""
        return _unpack(self.bits[self.rows[images, concept]], self.side)

    def valid(self, images: Tensor) -> Tensor | None:
        """Pixels that count, ``[n,hs,ws]`` bool; None: all."""
        return None if self.void is None else ~_unpack(self.void[images], self.side)


@dataclass
class Activations:
    """One layer's activations on one split.

    Attributes:
        maps: ``[N,K,h,w]``, post-ReLU; float16 is enough, since maps are only compared with a threshold. May lie on disk.
        mean, max: ``[N,K]`` float32, pooled over positions before any rounding.
    """

    maps: Tensor
    mean: Tensor
    max: Tensor

    @property
    def filters(self) -> int:
        """Number of classes K."""
        return self.maps.shape[1]


@dataclass
class _Growing:
    masks: list[np.ndarray] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    void: list[np.ndarray | None] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)


def collect(
    batches: Iterable[Batch], features: Features, *, number: int, side: int, folder: Path | None = None, ignore_void: bool = True
) -> tuple[dict[str, Activations], ConceptMasks]:
    """Run the network over a split once.

    Args:
        batches: with labels, and masks where there are any.
        features: images ``[B,3,H,W]`` in [0,1] -> ``{layer: [B,K,h,w]}``.
        number: images that ``batches`` will give at most.
        side: side of the stored masks in pixels; smaller than the images' (the paper: half), by nearest pixel.
        folder: where activations are kept as float16 files instead of in memory.
        ignore_void: leave void pixels out of every sum; False counts them as background.

    Raises:
        ConfigError: no images.
        OSError: the folder cannot be written, or its disk has too little space.
    """
    grown, stores, at = _Growing(), {}, 0
    for batch in batches:
        for layer, maps in features(batch.images).items():
            if layer not in stores:
                stores[layer] = _allocate(folder, layer, (number, *maps.shape[1:]))
            store = stores[layer]
            store.maps[at : at + len(batch)] = maps.to(torch.float16)
            store.mean[at : at + len(batch)] = maps.float().mean((2, 3))
            store.max[at : at + len(batch)] = maps.float().amax((2, 3))
        _grow(grown, batch, side, ignore_void)
        at += len(batch)
    if at == 0:
        raise ConfigError("there are no images to probe: check the split and the limit.")
    layers = {name: Activations(s.maps[:at], s.mean[:at], s.max[:at]) for name, s in stores.items()}
    return layers, _finished(grown, (side, side))


def _allocate(folder: Path | None, layer: str, shape: Sequence[int]) -> Activations:
    N, K = shape[:2]
    if folder is None:
        maps = torch.zeros(*shape, dtype=torch.float16)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{layer.replace('/', '_')}.npy"
        maps = torch.from_numpy(np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=tuple(shape)))
        _reserve(path)
    return Activations(maps, torch.zeros(N, K), torch.zeros(N, K))


def _reserve(path: Path) -> None:
    """Take the disk's space now. Later a full disk would end the process by a signal, at a write into mapped memory."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink()
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error


def _grow(grown: _Growing, batch: Batch, side: int, ignore_void: bool) -> None:
    present = batch.targets > 0.5
    grown.labels.append(present)
    grown.ids += batch.ids or tuple(str(len(grown.ids) + i) for i in range(len(batch)))
    rows = torch.full_like(present, -1, dtype=torch.long)
    if batch.masks is not None:
        small = F.interpolate(batch.masks, (side, side), mode="nearest-exact") > 0.5
        for i, c in small.flatten(2).any(2).nonzero().tolist():
            rows[i, c] = len(grown.masks)
            grown.masks.append(np.packbits(small[i, c].numpy()))
    grown.rows.append(rows)
    if batch.void is not None and ignore_void:
        void = F.interpolate(batch.void[:, None].float(), (side, side), mode="nearest-exact")[:, 0] > 0.5
        grown.void += [np.packbits(v.numpy()) for v in void]
    else:
        grown.void += [None] * len(batch)


def _finished(grown: _Growing, side: tuple[int, int]) -> ConceptMasks:
    width = -(-side[0] * side[1] // 8)
    bits = torch.from_numpy(np.stack(grown.masks)) if grown.masks else torch.zeros(0, width, dtype=torch.uint8)
    void = None
    if any(v is not None for v in grown.void):
        void = torch.from_numpy(np.stack([np.zeros(width, np.uint8) if v is None else v for v in grown.void]))
    return ConceptMasks(grown.ids, torch.cat(grown.labels), torch.cat(grown.rows), bits, void, side)


def _unpack(bits: Tensor, side: tuple[int, int]) -> Tensor:
    flat = np.unpackbits(bits.numpy(), axis=1, count=side[0] * side[1])
    return torch.from_numpy(flat.reshape(len(bits), *side)).bool()
