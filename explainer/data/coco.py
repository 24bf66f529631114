"""MS COCO 2014 (Lin et al. 2014): multi-label, with the split of the paper made reproducible."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from explainer.data.content import content_digests
from explainer.data.decoding import home_path, join_inside, read_json
from explainer.data.files import VOID, ImageFileDataset, Record, held_out, require_directory
from explainer.data.run_length import decode_runs, fill_polygon
from explainer.errors import ConfigError, CorruptSampleError, DatasetNotFoundError
from explainer.files import write_text
from explainer.geometry import Geometry

__all__ = ["Coco"]

WHERE = (
    "Get train2014.zip, val2014.zip and annotations_trainval2014.zip from cocodataset.org and unpack them into one folder, so that it "
    "holds train2014/, val2014/ and annotations/instances_{train,val}2014.json; point root to it."
)


@dataclass(frozen=True)
class _Index:
    """An annotation file, parsed once for all splits that use it."""

    categories: tuple[tuple[int, str], ...]
    images: dict[int, tuple[str, int, int]]
    objects: dict[int, list[_Object]]


@dataclass(frozen=True)
class _Object:
    """One annotation.

    Attributes:
        label: category id in the file's index, position of the class in a record.
        crowd: many objects in one region.
        segmentation: outline as in the file; empty or None where only a box was drawn.
        box: x, y, width, height as in the file, or None.
    """

    label: int
    crowd: bool
    segmentation: Any
    box: Any


def _outlined(record: Record) -> bool:
    """Whether every class that is present has an outline (or a crowd's region) somewhere: else its pixels are unknown."""
    return {o.label for o in record.extra if o.segmentation} == set(record.labels)


class Coco(ImageFileDataset):
    """COCO-2014 with contiguous classes (80 in the official files, in the order of the category ids).

    train and val are 90 % and 10 % of ``train2014``, test is ``val2014``. The choice is a function of the image ids and
    ``split_seed``; :meth:`save_split` writes it down and ``split_file`` reads it back. Crowd regions are void, and count as presence.
    An object with a box and no outline makes its box void; an image in which a class has boxes only has no masks.

    Args:
        root: the folder that holds ``train2014``, ``val2014`` and ``annotations``.
        unannotated: "drop" leaves images without any object out, "keep" serves them with an empty target.
        split_seed: random seed of the 90/10 choice.
        val_fraction: share of ``train2014`` in the val split.
        split_file: JSON ``{"train": [ids], "val": [ids]}`` that replaces seed and fraction.
        require_masks: drop images whose objects are all crowds, so that every image has object pixels.
        size, augment, masks, cache, geometry, no_region: how files become samples; see :class:`ImageFileDataset`; the cache holds images
            only.
    """

    name = "coco"
    task = "multilabel"
    _cacheable_layers = False

    def __init__(
        self,
        split: str = "train",
        size: int | Sequence[int] = 224,
        *,
        root: str = "data/coco",
        unannotated: Literal["drop", "keep"] = "drop",
        split_seed: int = 0,
        val_fraction: float = 0.1,
        split_file: str | None = None,
        require_masks: bool = False,
        augment: str | Mapping[str, Any] | None = None,
        masks: bool = True,
        cache: Literal["none", "ram"] = "none",
        geometry: Geometry = "squash",
        no_region: Sequence[str] = (),
    ) -> None:
        super().__init__(split, size, augment=augment, masks=masks, cache=cache, geometry=geometry, no_region=no_region)
        if unannotated not in ("drop", "keep"):
            raise ConfigError(f'unannotated must be "drop" or "keep", got {unannotated!r}.')
        self.folder = home_path(root)
        self.split_seed, self.val_fraction, self.split_file = split_seed, val_fraction, split_file
        part = "val2014" if split == "test" else "train2014"
        require_directory(self.folder, self.name, WHERE)
        require_directory(self.folder / part, self.name, WHERE)
        self.source = self.folder / "annotations" / f"instances_{part}.json"
        index = _load(self.source)
        self.class_names = tuple(name for _, name in index.categories)
        contiguous = {category: i for i, (category, _) in enumerate(index.categories)}
        ids = sorted(index.images) if split == "test" else self.split_ids()[split]
        self._sizes = {str(i): index.images[i][1:] for i in ids}
        records = [self._record(i, index, contiguous, part) for i in ids]
        self.records = [
            r
            for r in records
            if r.problem is not None
            or ((unannotated == "keep" or r.extra) and not (require_masks and (all(o.crowd for o in r.extra) or not _outlined(r))))
        ]
        self._ready(self.source, 'Check the annotation file, or set unannotated: "keep".')

    def _record(self, image_id: int, index: _Index, contiguous: dict[int, int], part: str) -> Record:
        file_name, _, _ = index.images[image_id]
        path = join_inside(self.folder / part, file_name, self.source)
        objects, problem = [], None
        for found in index.objects.get(image_id, ()):
            if found.label not in contiguous:
                problem = CorruptSampleError(
                    f"{self.source}: image {file_name} has an object of the unknown category id {found.label}; known ids: "
                    f"{', '.join(map(str, list(contiguous)[:10]))}{', ...' if len(contiguous) > 10 else ''}."
                )
                continue
            objects.append(replace(found, label=contiguous[found.label]))
        labels = tuple(sorted({o.label for o in objects}))
        return Record(str(image_id), path, labels, problem=problem, extra=objects)

    # ------------------------------------------------------------------ the split
    def split_ids(self) -> dict[str, list[int]]:
        """Image ids of train and val, before unannotated images are dropped."""
        index = _load(self.folder / "annotations" / "instances_train2014.json")
        if self.split_file is not None:
            return _read_split(home_path(self.split_file), set(index.images))
        chosen = held_out([f"{i:012d}" for i in index.images], self.val_fraction, self.split_seed)
        parts: dict[str, list[int]] = {"train": [], "val": []}
        for i in sorted(index.images):
            parts["val" if f"{i:012d}" in chosen else "train"].append(i)
        return parts

    def save_split(self, path: str | Path) -> None:
        """Write the ids of train and val as JSON, for ``split_file``."""
        content = {"dataset": "coco2014", "split_seed": self.split_seed, "val_fraction": self.val_fraction, **self.split_ids()}
        write_text(path, json.dumps(content))

    # ------------------------------------------------------------------ masks
    def _has_labels(self, index: int) -> bool:
        return self.records[index].problem is None and _outlined(self.records[index])

    def _labels(self, index: int, size: tuple[int, int]) -> Tensor:
        """Also of an image without any object: one empty layer per present class, and no void."""
        if self._has_labels(index):
            return self._read_layers(index, size)
        return torch.zeros(len(self.records[index].labels) + 1, *size, dtype=torch.uint8)

    def _read_layers(self, index: int, size: tuple[int, int]) -> Tensor:
        """One {0,1} layer per present class, then the void layer: objects of different classes overlap."""
        record = self.records[index]
        known = self._sizes[record.id]
        if known != tuple(size):
            raise CorruptSampleError(
                f"{self.source}: the annotation of {record.image} is for {known[0]} x {known[1]} pixels (height x width), the image has "
                f"{size[0]} x {size[1]}. Both must have the same size."
            )
        layers = np.zeros((len(record.labels) + 1, *size), dtype=bool)
        for item in record.extra:
            try:
                region = _region(item.segmentation, *size) if item.segmentation else _box(item.box, *size)
            except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
                raise CorruptSampleError(
                    f"{self.source}: the segmentation of a {self.class_names[item.label]!r} in {record.image.name} is damaged ({error})."
                ) from error
            layers[-1 if item.crowd or not item.segmentation else record.labels.index(item.label)] |= region
        layers[-1] &= ~layers[:-1].any(0)  # a pixel of an annotated object is defined, whatever crowd surrounds it
        return torch.from_numpy(layers.view(np.uint8))

    def _expand(self, index: int, layers: Tensor) -> tuple[Tensor, Tensor]:
        masks = torch.zeros(self.num_classes, *layers.shape[-2:], dtype=torch.bool)
        masks[list(self.records[index].labels)] = layers[:-1] == 1
        return masks, layers[-1] > 0

    def identity(self) -> dict[str, Any]:
        """Adds the number of objects of each image and the content of the annotations, where the masks are."""
        own = {"objects": [len(r.extra) for r in self.records], "annotations": content_digests([self.source]), "void_value": VOID}
        return super().identity() | own


def _box(box: Any, height: int, width: int) -> np.ndarray:
    """The pixels that a box touches; all of them where there is no box either. Which of them are the object is unknown."""
    region = np.zeros((height, width), dtype=bool)
    if box is None or not len(box):
        return ~region
    x, y, w, h = (float(v) for v in box)
    region[max(0, math.floor(y)) : max(0, math.ceil(y + h)), max(0, math.floor(x)) : max(0, math.ceil(x + w))] = True
    return region


def _region(segmentation: Any, height: int, width: int) -> np.ndarray:
    if isinstance(segmentation, dict):
        return decode_runs(segmentation, height, width)
    region = np.zeros((height, width), dtype=bool)
    for polygon in segmentation:
        points = np.asarray(polygon, dtype=np.float64)
        if points.ndim != 1 or points.size < 6 or points.size % 2 or not np.isfinite(points).all() or np.abs(points).max() > 1e6:
            raise ValueError("a polygon must be a list x1, y1, x2, y2, ... of at least three finite points")
        region |= fill_polygon(points.reshape(-1, 2), height, width)
    return region


def _load(path: Path) -> _Index:
    try:
        return _parse(path, path.stat().st_mtime_ns)
    except FileNotFoundError as error:
        raise DatasetNotFoundError(f"data set 'coco': the annotation file {path} does not exist. {WHERE}") from error


@functools.lru_cache(maxsize=2)
def _parse(path: Path, _modified: int) -> _Index:
    content = read_json(path)
    try:
        categories = tuple(sorted((int(c["id"]), str(c["name"])) for c in content["categories"]))
        images = {int(i["id"]): (str(i["file_name"]), int(i["height"]), int(i["width"])) for i in content["images"]}
        objects: dict[int, list[_Object]] = {}
        for a in content["annotations"]:
            entry = _Object(int(a["category_id"]), bool(a.get("iscrowd", 0)), a.get("segmentation"), a.get("bbox"))
            objects.setdefault(int(a["image_id"]), []).append(entry)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CorruptSampleError(
            f"{path}: not a COCO instances file ({type(error).__name__}: {error}). It needs images (id, file_name, height, width), "
            "categories (id, name) and annotations (image_id, category_id, segmentation)."
        ) from error
    if not categories or len({name for _, name in categories}) != len(categories):
        raise CorruptSampleError(f"{path}: the categories must have different names, and there must be at least one.")
    if len({number for number, _ in categories}) != len(categories):
        twice = next(number for number, count in Counter(number for number, _ in categories).items() if count > 1)
        names = [name for number, name in categories if number == twice]
        raise CorruptSampleError(f"{path}: categories {', '.join(names)} have the same id {twice}. Give each its own.")
    return _Index(categories, images, objects)


def _read_split(path: Path, known: set[int]) -> dict[str, list[int]]:
    if not path.is_file():
        raise DatasetNotFoundError(f"split_file {path} does not exist. Write one with save_split, or leave split_file out.")
    content = read_json(path)
    parts: dict[str, list[int]] = {}
    for split in ("train", "val"):
        ids = content.get(split) if isinstance(content, dict) else None
        if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
            raise ConfigError(f'split_file {path} must hold {{"train": [image ids], "val": [image ids]}}; {split!r} is not a list of ids.')
        if unknown := set(ids) - known:
            raise ConfigError(f"split_file {path} names image id {min(unknown)} in {split!r}, which the annotations do not have.")
        parts[split] = ids
    if both := set(parts["train"]) & set(parts["val"]):
        raise ConfigError(f"split_file {path} has image id {min(both)} in train and in val. An image belongs to one split.")
    return parts
