"""Shards of any data set: what :class:`~explainer.data.shards.Shards` reads."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from explainer.data.contract import ExplainerDataset
from explainer.data.decoding import MAX_FILE_BYTES, Stored
from explainer.data.files import VOID, ImageFileDataset
from explainer.data.shard_index import INDEX, LABELS, LAYERS, Root, Shard, ShardIndex, SplitIndex
from explainer.errors import ConfigError, CorruptSampleError
from explainer.files import replacing, write_text

__all__ = ["earlier_splits", "write_index", "write_split"]


def write_split(
    dataset: ExplainerDataset,
    out: Path,
    samples: int,
    order: Sequence[int],
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> SplitIndex:
    """Write a split as ``out/<split>-000000.tar`` and so on.

    Image files go in as they are, byte for byte; images that are made (``shapes``) go in as PNG, at the data set's size. Masks go in at the
    image's own size. Planted cues do not go in.

    Args:
        dataset: without augmentation.
        out: the folder.
        samples: per shard; the last one may have fewer.
        order: order in which the samples lie in the shards. Sources are often sorted by class: a shuffled order mixes better.
        progress: called with the number of samples written since the last call.

    Raises:
        ConfigError: ``samples`` is below 1.
        CorruptSampleError: a sample cannot be read.
    """
    if samples < 1:
        raise ConfigError(f"--samples must be at least 1, received {samples}.")
    index = SplitIndex(class_counts=[0] * dataset.num_classes)
    for number, start in enumerate(range(0, len(order), samples)):
        chosen = order[start : start + samples]
        path = out / f"{dataset.split}-{number:06d}.tar"
        with replacing(path) as stream:
            kept = _Counted(stream)
            with tarfile.open(fileobj=kept, mode="w:", format=tarfile.PAX_FORMAT) as tar:  # type: ignore[call-overload]
                for place, i in enumerate(chosen):
                    for extension, data in _files(dataset, i, index.class_counts):
                        # Numbers, not ids: a WebDataset key has no dot, and an id may be anything.
                        member = tarfile.TarInfo(f"{start + place:09d}.{extension}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
                    progress(1)
        index.shards.append(Shard(path.name, len(chosen), kept.length, kept.digest.hexdigest()))
    return index


def earlier_splits(dataset: ExplainerDataset, out: Path) -> dict[str, SplitIndex]:
    """The splits whose shards are in ``out`` already.

    Raises:
        ConfigError: they are of other classes or of another task than ``dataset``.
    """
    if not (out / INDEX).is_file():
        return {}
    found = Root(str(out)).index()
    for name, there, own in (
        ("class_names", found.class_names, list(dataset.class_names)),
        ("task", found.task, dataset.task),
        ("no_region", found.no_region, list(dataset.no_region)),
    ):
        if there != own:
            raise ConfigError(f"{out} has shards with {name} {there}, and this data set has {own}: give another --out.")
    return found.splits


def write_index(dataset: ExplainerDataset, out: Path, splits: dict[str, SplitIndex]) -> None:
    """Write ``index.json``, last: a folder without it is not whole. Other splits that it has stay in it."""
    index = ShardIndex(list(dataset.class_names), dataset.task, list(dataset.no_region), {**earlier_splits(dataset, out), **splits})
    write_text(out / INDEX, index.text())


class _Counted:
    """A stream that knows the length and the digest of what went through it."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.length, self.digest = stream, 0, hashlib.blake2b(digest_size=16)

    def write(self, data: bytes) -> int:
        self.length += len(data)
        self.digest.update(data)
        return int(self.stream.write(data))

    def tell(self) -> int:
        return self.length


def _files(dataset: ExplainerDataset, index: int, counts: list[int]) -> Iterator[tuple[str, bytes]]:
    """Extension and bytes of each file of a sample; its labels are counted."""
    labels = dataset.target(index).nonzero().flatten().tolist()
    told: dict[str, Any] = {"id": dataset.sample_id(index), "labels": labels}
    truth: tuple[Tensor, Tensor] | None
    if isinstance(dataset, ImageFileDataset):
        record = dataset.records[index]
        if record.problem is not None:
            raise record.problem
        yield _stored(record.image)
        truth = dataset.original_masks(index)
    else:
        sample = dataset[index]
        yield "png", _png((sample.image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
        nothing = torch.zeros(sample.image.shape[-2:], dtype=torch.bool)
        truth = None if sample.masks is None else (sample.masks.bool(), nothing if sample.void is None else sample.void)
    if truth is not None:
        masks, void = truth
        present = masks.flatten(1).any(1).nonzero().flatten().tolist()
        layers = masks[present or [0]].to(torch.uint8).masked_fill(void, VOID)  # one layer at least: it says where nothing is known
        told["layers"] = present
        yield LAYERS, _png(layers.flatten(0, 1).numpy())
    for k in labels:
        counts[k] += 1
    yield LABELS, json.dumps(told).encode()


def _stored(image: Path | Stored) -> tuple[str, bytes]:
    """An image file's extension and bytes."""
    if isinstance(image, Stored):
        return image.name.rpartition(".")[2], image.data
    try:
        data = image.read_bytes() if image.stat().st_size <= MAX_FILE_BYTES else b""
    except OSError as error:
        raise CorruptSampleError(f"{image}: the image cannot be read ({error}).") from error
    if not data:
        raise CorruptSampleError(f"{image}: the image is empty, or has more than {MAX_FILE_BYTES} bytes.")
    return image.suffix[1:].lower(), data


def _png(values: np.ndarray[Any, Any]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "png")
    return stream.getvalue()
