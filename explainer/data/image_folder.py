"""A user's own images with no code: class folders (one label an image), or a CSV of labels (several)."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from explainer.data.contract import SPLITS
from explainer.data.decoding import IMAGE_SUFFIXES, join_inside, read_label_map, read_lines
from explainer.data.files import VOID, ImageFileDataset, Record, checked_names, require_directory
from explainer.errors import ConfigError, CorruptSampleError, DatasetNotFoundError

__all__ = ["CsvDataset", "ImageFolder", "divide"]


def divide(items: Iterable[str], fractions: Sequence[float], seed: int = 0) -> dict[str, list[str]]:
    """Cut items into train, val and test by the order of their hashes: a function of names and seed, whatever the listing's order."""
    valid = len(fractions) == 3 and all(isinstance(f, (int, float)) and f >= 0 for f in fractions)
    if not valid or abs(sum(fractions) - 1) > 1e-6:
        raise ConfigError(f"fractions must be three shares (train, val, test) that add up to 1, got {list(fractions)}.")
    ordered = sorted(items, key=lambda item: hashlib.blake2b(f"{seed}/{item}".encode()).digest())
    first, second = round(len(ordered) * fractions[0]), round(len(ordered) * (fractions[0] + fractions[1]))
    return {"train": sorted(ordered[:first]), "val": sorted(ordered[first:second]), "test": sorted(ordered[second:])}


class ImageFolder(ImageFileDataset):
    """Single-label: ``root/<split>/<class>/*.jpg``, or ``root/<class>/*.jpg`` divided by ``fractions`` within each class.

    Args:
        root: the folder.
        class_names: the classes in order; default the sorted folder names (of the training split).
        layout: "splits", "flat", or "auto": splits if ``root/train`` holds folders.
        fractions: shares of train, val and test in the flat layout.
        split_seed: of that division.
        mask_root: folder with a mask for an image at the same relative path, as PNG; 0 is background.
        mask_void: value of undefined mask pixels, or None; every other value is the object.
        size, augment, masks, cache: see :class:`ImageFileDataset`.
    """

    name = "image_folder"
    task = "multiclass"

    def __init__(
        self,
        split: str = "train",
        size: int = 224,
        root: str = "data/images",
        class_names: Sequence[str] | None = None,
        layout: Literal["auto", "splits", "flat"] = "auto",
        fractions: Sequence[float] = (0.8, 0.1, 0.1),
        split_seed: int = 0,
        mask_root: str | None = None,
        mask_void: int | None = None,
        augment: str | Mapping[str, Any] | None = None,
        masks: bool = True,
        cache: Literal["none", "ram"] = "none",
    ) -> None:
        super().__init__(split, size, augment, masks, cache)
        if layout not in ("auto", "splits", "flat"):
            raise ConfigError(f"layout must be auto, splits or flat, got {layout!r}.")
        self.folder, self.mask_void = Path(root).expanduser(), mask_void
        where = "Put one folder per class there (root/<class>/*.jpg, or root/train/<class>/*.jpg with val and test beside it)."
        require_directory(self.folder, self.name, where)
        if layout == "auto":
            layout = "splits" if (self.folder / "train").is_dir() and _folders(self.folder / "train") else "flat"
        top = self.folder / split if layout == "splits" else self.folder
        require_directory(top, self.name, f"{where} For a random division use layout: flat.")
        reference = self.folder / "train" if layout == "splits" and (self.folder / "train").is_dir() else top
        self.class_names = tuple(_folders(reference)) if class_names is None else checked_names("class_names", class_names)
        if not self.class_names:
            raise DatasetNotFoundError(f"{reference} has no class folders, so there are no classes. {where}")
        mask_base = None if mask_root is None else Path(mask_root).expanduser()
        if mask_base is not None:
            require_directory(mask_base, self.name, "It is given as mask_root: one PNG per image, at the image's relative path.")
        self.records = []
        for folder in _folders(top):
            if folder not in self.class_names:
                raise ConfigError(
                    f"{top / folder}: unknown class {folder!r}. Known: {', '.join(self.class_names)}. "
                    "Remove the folder or add it to class_names."
                )
            files = [p.relative_to(self.folder).as_posix() for p in sorted((top / folder).rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
            chosen = files if layout == "splits" else divide(files, fractions, split_seed)[split]
            label = (self.class_names.index(folder),)
            self.records += [Record(f, self.folder / f, label, _mask(mask_base, f)) for f in chosen]
        self._ready(top, f"Image files end in {', '.join(sorted(IMAGE_SUFFIXES))}; check fractions in the flat layout.")

    def _read_layers(self, index: int, size: tuple[int, int]) -> Tensor:
        record = self.records[index]
        assert record.mask is not None
        values = read_label_map(record.mask, size, record.image)
        layer = (values > 0).to(torch.uint8)
        return (layer if self.mask_void is None else layer.masked_fill(values == self.mask_void, VOID))[None]

    def _expand(self, index: int, layers: Tensor) -> tuple[Tensor, Tensor]:
        masks = torch.zeros(self.num_classes, *layers.shape[-2:], dtype=torch.bool)
        void = layers[0] == VOID
        masks[self.records[index].labels[0]] = layers[0] == 1
        return masks, void


def _folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _mask(base: Path | None, file: str) -> Path | None:
    if base is None:
        return None
    path = (base / file).with_suffix(".png")
    return path if path.is_file() else None


class CsvDataset(ImageFileDataset):
    """Multi-label from a CSV: ``path,labels[,split]`` with labels like ``cat;dog`` (empty: none of the classes).

    A header line is optional where the columns come in this order. With a split column (train, val or test in every row) the rows
    are served as it says; ``labels`` may instead contain ``{split}`` (one file per split); otherwise ``fractions`` divide the rows.

    Args:
        root: folder that the paths are relative to.
        labels: the CSV, relative to ``root``.
        class_names: the classes in order; default all labels of the file(s), sorted.
        separator: between labels.
        mask_folder: folder with ``<path without suffix>.png`` label maps (0 background, i + 1 class i, 255 void), relative to ``root``.
        fractions: shares of train, val and test where the CSV does not say.
        split_seed: of that division.
        size, augment, masks, cache: see :class:`ImageFileDataset`.
    """

    name = "csv"
    task = "multilabel"

    def __init__(
        self,
        split: str = "train",
        size: int = 224,
        root: str = "data/images",
        labels: str = "labels.csv",
        class_names: Sequence[str] | None = None,
        separator: str = ";",
        mask_folder: str | None = None,
        fractions: Sequence[float] = (0.8, 0.1, 0.1),
        split_seed: int = 0,
        augment: str | Mapping[str, Any] | None = None,
        masks: bool = True,
        cache: Literal["none", "ram"] = "none",
    ) -> None:
        super().__init__(split, size, augment, masks, cache)
        self.folder, self.separator = Path(root).expanduser(), separator
        require_directory(self.folder, self.name, "root is the folder that the CSV's paths are relative to.")
        tables = {s: self._read(self.folder / labels.replace("{split}", s)) for s in (SPLITS if "{split}" in labels else ("",))}
        self.source = self.folder / labels.replace("{split}", split)
        every = sorted({name for table in tables.values() for _, names, _ in table for name in names})
        self.class_names = tuple(every) if class_names is None else checked_names("class_names", class_names)
        if not self.class_names:
            raise ConfigError(f"{self.source}: no row has a label. Rows look like: photo.jpg,cat{separator}dog")
        rows = tables[split] if "{split}" in labels else self._choose(tables[""], fractions, split_seed)
        mask_base = None if mask_folder is None else self.folder / mask_folder
        if mask_base is not None:
            require_directory(mask_base, self.name, "It is given as mask_folder: one PNG label map per image.")
        self.records = [self._record(path, names, mask_base) for path, names, _ in rows]
        self._ready(self.source, "Check its split column, or fractions.")

    def _read(self, path: Path) -> list[tuple[str, list[str], str]]:
        if not path.is_file():
            raise DatasetNotFoundError(f"data set 'csv': {path} does not exist. Write lines like: photo.jpg,cat{self.separator}dog")
        try:
            rows = list(csv.reader(io.StringIO("\n".join(read_lines(path)))))
        except csv.Error as error:
            raise CorruptSampleError(f"{path}: not a CSV file ({error}).") from error
        header = [cell.strip().lower() for cell in rows[0]] if rows else []
        columns = ["path", "labels", "split"]
        if header[:1] and header[0] in ("path", "file", "image") and set(header[1:]) <= {"labels", "split"}:
            columns, rows = ["path", *header[1:]], rows[1:]
        table = []
        for number, row in enumerate(rows, start=1):
            if not 1 <= len(row) <= len(columns):
                raise CorruptSampleError(
                    f"{path}: row {number} has {len(row)} cells, expected {', '.join(columns)}. Labels are separated by {self.separator!r}."
                )
            cells = dict(zip(columns, (cell.strip() for cell in row), strict=False))
            names = [n.strip() for n in cells.get("labels", "").split(self.separator) if n.strip()]
            part = cells.get("split", "")
            if part and part not in SPLITS:
                raise ConfigError(f"{path}: row {number} has the unknown split {part!r}; splits are {', '.join(SPLITS)}.")
            table.append((cells["path"], names, part))
        return table

    def _choose(self, table: list[tuple[str, list[str], str]], fractions: Sequence[float], seed: int) -> list[tuple[str, list[str], str]]:
        if any(part for _, _, part in table):
            if missing := next((path for path, _, part in table if not part), None):
                raise ConfigError(f"{self.source}: the row of {missing!r} has no split, other rows have one. Give all rows one, or none.")
            return [row for row in table if row[2] == self.split]
        wanted = set(divide({path for path, _, _ in table}, fractions, seed)[self.split])
        return [row for row in table if row[0] in wanted]

    def _record(self, file: str, names: list[str], mask_base: Path | None) -> Record:
        path = join_inside(self.folder, file, self.source)
        if unknown := next((n for n in names if n not in self.class_names), None):
            raise ConfigError(f"{self.source}: {file} has the unknown class {unknown!r}. class_names: {', '.join(self.class_names)}.")
        return Record(file, path, tuple(sorted({self.class_names.index(n) for n in names})), _mask(mask_base, file))
