"""Tar shards (WebDataset's layout) of a data set that is too large, or too far away, for single files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from explainer.data.decoding import Stored, home_path, read_label_map
from explainer.data.files import VOID, ImageFileDataset, Record, require_directory
from explainer.data.shard_index import LABELS, LAYERS, Root, ShardOrder, ShardReader
from explainer.errors import ConfigError, CorruptSampleError, DatasetNotFoundError
from explainer.geometry import Geometry

__all__ = ["Shards"]

_IMAGES = ("jpg", "jpeg", "png", "bmp", "gif", "tif", "tiff", "webp", "ppm", "pgm")


class ShardRecords(Sequence[Record]):
    """Records that are read when they are asked for; the last one is kept.

    Args:
        reader: reader of the split.
        classes: number of classes.
        positions: positions of the samples; None: all.
    """

    def __init__(self, reader: ShardReader, classes: int, positions: Sequence[int] | None = None) -> None:
        self.reader, self.classes, self.positions = reader, classes, positions
        self._last: tuple[int, Record] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def __len__(self) -> int:
        return len(self.reader) if self.positions is None else len(self.positions)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        last = self._last  # read once: threads may share the data set
        if last is not None and last[0] == index:
            return last[1]
        record = self._record(self.reader.read(index if self.positions is None else self.positions[index]))
        self._last = (index, record)
        return record

    def _record(self, files: Mapping[str, Stored]) -> Record:
        image = next((files[e] for e in _IMAGES if e in files), None)
        told = files.get(LABELS)
        if image is None or told is None:
            some = next(iter(files.values()))
            raise CorruptSampleError(f"{some}: the sample has no image or no .{LABELS}; it has .{', .'.join(files)}. Make the shards anew.")
        try:
            content = json.loads(told.data)
            labels, layers = tuple(content["labels"]), tuple(content.get("layers", ()))
            known = all(type(k) is int and 0 <= k < self.classes for k in (*labels, *layers))
            if not isinstance(content["id"], str) or not known:
                raise ValueError(f"id or class numbers are not what they should be (there are {self.classes} classes)")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptSampleError(f"{told}: not the labels of a sample ({error}). Make the shards anew.") from error
        return Record(content["id"], image, labels, files.get(LAYERS), extra=layers)


class Shards(ImageFileDataset):
    """What ``explainer data shards`` made of any data set: the same samples, from tar files of some hundred megabytes.

    ``root/index.json`` says which shards, classes and splits there are; a shard holds, for each sample, the image's own file, a JSON file
    (id, labels) and a PNG file with the masks. Training goes through the shards in an order of its own (shuffled shards, ``mixed`` of them
    at a time, shuffled samples), the same for any number of processes and workers, and goes on after a stop at the batch where it stopped.
    Memory grows with the number of shards, not of samples.

    WebDataset's loaders read these shards too. They are not used here: they pass over a stream, and can only go on in the middle of an
    epoch by reading again what came before.

    Args:
        root: folder of the shards, or an address that fsspec opens (``s3://...``, with the package that it asks for).
        shard_cache: folder on this machine where shards from elsewhere are kept; it must have room for those of the split.
        mixed: shards that are read at a time; a multiple of the number of processes lets each read its own.
        size, augment, masks, cache, geometry, no_region: see :class:`ImageFileDataset`; ``no_region`` None: as in the source.
    """

    name = "shards"
    cheap_targets = False

    def __init__(
        self,
        split: str = "train",
        size: int | Sequence[int] = 224,
        *,
        root: str = "data/shards",
        shard_cache: str | None = None,
        mixed: int = 16,
        augment: str | Mapping[str, Any] | None = None,
        masks: bool = True,
        cache: Literal["none", "ram"] = "none",
        geometry: Geometry = "squash",
        no_region: Sequence[str] | None = None,
    ) -> None:
        super().__init__(split, size, augment=augment, masks=masks, cache=cache, geometry=geometry, no_region=no_region or ())
        if type(mixed) is not int or mixed < 1:
            raise ConfigError(f"mixed must be a whole number of shards, at least 1, got {mixed!r}.")
        place = Root(root, shard_cache)
        if not place.remote:
            require_directory(home_path(root), self.name, "Make shards of any data set: explainer data shards CONFIG --out FOLDER.")
        index = place.index()
        self.class_names, self.task = tuple(index.class_names), index.task  # type: ignore[assignment]
        self.no_region = tuple(index.no_region if no_region is None else no_region)
        if split not in index.splits:
            raise DatasetNotFoundError(
                f"{root} has no {split} split, only {', '.join(index.splits) or 'none'}. Make it: explainer data shards --splits {split}."
            )
        self.mixed, self._own = mixed, index.splits[split]
        self.reader = ShardReader(place, self._own.shards, mixed)
        self._records = self.records = ShardRecords(self.reader, len(self.class_names))
        self._ready(root)

    def keep(self, indices: Sequence[int]) -> None:
        """See :meth:`ExplainerDataset.keep`."""
        before = self._records.positions
        chosen = [int(i) for i in indices] if before is None else [before[i] for i in indices]
        self._records = self.records = ShardRecords(self.reader, self.num_classes, chosen)
        self._ready(f"{self.name} after sampling")

    def order(self, seed: int, epoch: int) -> Sequence[int] | None:
        """See :class:`~explainer.data.shard_index.ShardOrder`; of a part of the samples (:meth:`keep`) there is none."""
        if self._records.positions is not None:
            return None
        return ShardOrder([s.samples for s in self.reader.shards], seed, epoch, self.mixed)

    def class_counts(self) -> tuple[Tensor, int]:
        """See :meth:`ExplainerDataset.class_counts`; of a whole split the index knows them."""
        if self._records.positions is not None:
            return super().class_counts()
        return torch.tensor(self._own.class_counts, dtype=torch.float32), len(self)

    def _read_layers(self, index: int, size: tuple[int, int]) -> Tensor:
        """``[P,H,W]``: 1 on the objects of the P classes that are stored, :data:`VOID` where nothing is known."""
        record = self.records[index]
        assert isinstance(record.mask, Stored)
        number = max(1, len(record.extra))
        stacked = read_label_map(record.mask, (number * size[0], size[1]), record.image)
        return stacked.reshape(number, *size)

    def _expand(self, index: int, layers: Tensor) -> tuple[Tensor, Tensor]:
        masks = torch.zeros(self.num_classes, *layers.shape[-2:], dtype=torch.bool)
        for layer, label in zip(layers, self.records[index].extra, strict=False):
            masks[label] = layer == 1
        return masks, layers[0] == VOID

    def image_digests(self) -> list[str]:
        """See :meth:`ImageFileDataset.image_digests`."""
        images = (record.image for record in self.records)
        return [hashlib.blake2b(i.data, digest_size=16).hexdigest() for i in images if isinstance(i, Stored)]

    def identity(self) -> dict[str, Any]:
        """The shards' digests stand for ids, labels and content: none of them is read."""
        shape: dict[str, Any] = {"geometry": self.geometry, "no_region": list(self.no_region), "masks": self.with_masks}
        size = self.size if isinstance(self.size, int) else list(self.size)
        own = {"name": self.name, "split": self.split, "size": size, "classes": list(self.class_names)}
        kept = self._records.positions
        return own | shape | {"shards": [s.digest for s in self.reader.shards], "kept": None if kept is None else list(kept)}
