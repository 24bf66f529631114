"""BRODEN, the data set of Network Dissection (Bau et al. 2017) and Net2Vec, in its published layout: ``index.csv``, ``label.csv``,
``images``.

1197 concepts of six categories. Scenes and textures belong to the image, the others to pixels, which may have several.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from explainer.data.content import content_digests
from explainer.data.decoding import home_path, join_inside, read_image
from explainer.data.files import ImageFileDataset, Record, checked_names, require_directory
from explainer.errors import ConfigError, CorruptSampleError, DatasetNotFoundError
from explainer.geometry import Geometry

__all__ = ["CATEGORIES", "Broden"]

PIXELS = ("color", "object", "part", "material")
WHOLE = ("scene", "texture")
CATEGORIES = (*PIXELS, *WHOLE)
WHERE = "It holds index.csv, label.csv and images/, as Network Dissection's broden1_224 and broden1_384 unpack."


class Broden(ImageFileDataset):
    """Multi-label BRODEN. Its lists are train and val; test is val.

    A class of pixels is present where a pixel has it; finding that out reads every label map once. Label maps are smaller than the images
    (112 pixels for 224) and are enlarged without new values. The mask of a scene or texture is the whole image. A batch holds one mask a
    class and image: with all 1197 keep batches small, or choose ``categories`` or ``keep``.

    Args:
        root: the folder with ``index.csv``.
        categories: which of color, object, part, material, scene and texture to read; the classes are those of ``label.csv`` whose first
            category is among them, in its order.
        keep: the classes to read, in order, where only some are wanted.
        size, augment, masks, cache, geometry, no_region: see :class:`ImageFileDataset`.

    Attributes:
        categories: category of each class, by name.
    """

    name = "broden"
    task = "multilabel"
    cheap_targets = False
    _cacheable_layers = False

    def __init__(
        self,
        split: str = "train",
        size: int | Sequence[int] = 224,
        root: str = "data/broden1_224",
        *,
        categories: Sequence[str] = CATEGORIES,
        keep: Sequence[str] | None = None,
        augment: str | Mapping[str, Any] | None = None,
        masks: bool = True,
        cache: Literal["none", "ram"] = "none",
        geometry: Geometry = "squash",
        no_region: Sequence[str] = (),
    ) -> None:
        super().__init__(split, size, augment=augment, masks=masks, cache=cache, geometry=geometry, no_region=no_region)
        if isinstance(categories, str) or not categories or set(categories) - set(CATEGORIES):
            raise ConfigError(f"categories must be some of {', '.join(CATEGORIES)}, got {categories!r}.")
        self.folder = home_path(root)
        require_directory(self.folder, self.name, WHERE)
        self.source = self.folder / "index.csv"
        known = _labels(self.folder / "label.csv")
        chosen = {number: (name, category) for number, (name, category) in known.items() if category in categories}
        names = [name for name, _ in chosen.values()]
        self.class_names = (
            checked_names("the names of label.csv", names, most=None) if keep is None else checked_names("keep", keep, most=None)
        )
        if missing := [name for name in self.class_names if name not in names]:
            raise ConfigError(f"keep names {missing[0]!r}, which label.csv does not have in {', '.join(categories)}.")
        self.categories = {name: category for name, category in chosen.values() if name in self.class_names}
        index = {name: i for i, name in enumerate(self.class_names)}
        self._index = {number: index[name] for number, (name, _) in chosen.items() if name in index}
        self._read_categories = tuple(c for c in CATEGORIES if c in categories)
        listed = "val" if split == "test" else split
        self.records = [self._record(row) for row in _rows(self.source, ("image", "split", *CATEGORIES)) if row["split"] == listed]
        self._present: dict[str, tuple[int, ...]] = {}
        self._ready(self.source, "Check its column split.")

    def _record(self, row: Mapping[str, str]) -> Record:
        base = self.folder / "images"
        files = [path for c in self._read_categories if c in PIXELS for path in row[c].split(";") if path]
        maps = [join_inside(base, path, self.source) for path in files]
        whole = [int(n) for c in self._read_categories if c in WHOLE for n in row[c].split(";") if n.isdecimal()]
        extra = maps, [self._index[n] for n in whole if n in self._index]
        return Record(row["image"], join_inside(base, row["image"], self.source), mask=maps[0] if maps else None, extra=extra)

    # ------------------------------------------------------------------ labels
    def target(self, index: int) -> Tensor:
        """``[K]`` multi-hot labels; the first call for an image reads its label maps."""
        target = torch.zeros(self.num_classes)
        target[list(self._labels_of(index))] = 1
        return target

    def _labels_of(self, index: int) -> tuple[int, ...]:
        record = self.records[index]
        if record.id not in self._present:
            maps, whole = record.extra
            numbers = torch.cat([_numbers(path).unique() for path in maps]).tolist() if maps else []
            self._present[record.id] = tuple(sorted({self._index[n] for n in numbers if n in self._index} | set(whole)))
        return self._present[record.id]

    def _has_labels(self, index: int) -> bool:
        return True

    def _read_layers(self, index: int, size: tuple[int, int]) -> Tensor:
        """One {0,1} layer per present class, then the void layer, which only padding fills: pixels may have several classes."""
        maps, whole = self.records[index].extra
        present = self._labels_of(index)
        layers = torch.zeros(len(present) + 1, *size, dtype=torch.uint8)
        for path in maps:
            values = _numbers(path)
            large = torch.nn.functional.interpolate(values[None, None].double(), size, mode="nearest-exact")[0, 0].long()
            for number in values.unique().tolist():
                if number in self._index:
                    layers[present.index(self._index[number])] |= (large == number).to(torch.uint8)
        for label in whole:
            layers[present.index(label)] = 1
        return layers

    def _expand(self, index: int, layers: Tensor) -> tuple[Tensor, Tensor]:
        masks = torch.zeros(self.num_classes, *layers.shape[-2:], dtype=torch.bool)
        masks[list(self._labels_of(index))] = layers[:-1] == 1
        return masks, layers[-1] > 0

    def identity(self) -> dict[str, Any]:
        """Adds the content of the lists and of every label map."""
        maps = sorted({path for r in self.records for path in r.extra[0]})
        return super().identity() | {"lists": content_digests([self.source, self.folder / "label.csv"]), "maps": content_digests(maps)}


def _numbers(path: Path) -> Tensor:
    """Label numbers ``[h,w]`` long of a map: red plus 256 times green."""
    layers = read_image(path).long()
    return layers[0] + 256 * layers[1]


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file with at least these columns."""
    if not path.is_file():
        raise DatasetNotFoundError(f"data set 'broden': {path} does not exist. {WHERE}")
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            rows = [{key: (row[key] or "").strip() for key in row if key is not None} for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise CorruptSampleError(f"{path}: not a CSV file in UTF-8 ({error}). Download it again.") from error
    if missing := [c for c in columns if not rows or c not in rows[0]]:
        raise CorruptSampleError(f"{path}: the column {missing[0]!r} is missing, or there is no row. {WHERE}")
    return rows


def _labels(path: Path) -> dict[int, tuple[str, str]]:
    """``{number: (name, first category)}``; the file writes categories as ``object(18134);part(12)``."""
    found = {}
    for row in _rows(path, ("number", "name", "category")):
        category = re.split(r"[(;]", row["category"], maxsplit=1)[0]
        if not row["number"].isdecimal() or category not in CATEGORIES:
            raise CorruptSampleError(
                f"{path}: the row of {row['name']!r} has the number {row['number']!r} and the category {row['category']!r}."
            )
        found[int(row["number"])] = (row["name"], category)
    return found
