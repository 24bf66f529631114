"""A user's own images with no code: a CSV of labels, several an image."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from explainer.data.contract import SPLITS
from explainer.data.decoding import IMAGE_SUFFIXES, home_path, join_inside, read_lines
from explainer.data.files import VOID, ImageFileDataset, Record, checked_names, mask_beside, require_directory
from explainer.data.image_folder import divide
from explainer.data.listing import report_links
from explainer.errors import ConfigError, CorruptSampleError, DatasetNotFoundError
from explainer.geometry import Geometry

__all__ = ["CsvDataset"]

# What others call the three columns.
HEADERS = {
    **dict.fromkeys(
        ("path", "file", "image", "filename", "file_name", "filepath", "file_path", "image_path", "image_name", "image_id"), "path"
    ),
    **dict.fromkeys(("labels", "label", "class", "classes", "class_name", "category", "categories", "target", "targets", "tags"), "labels"),
    **dict.fromkeys(("split", "subset", "set", "partition"), "split"),
}


class CsvDataset(ImageFileDataset):
    """Multi-label from a CSV: ``path,labels[,split]`` with labels like ``cat;dog`` (empty: none of the classes).

    A header line is optional where the columns come in this order; with one, their order is free and common other names are known
    (``filename``, ``image_id``, ``label``, ``class``, ...). Several rows of one image are one image with all their labels.

    With a split column (train, val or test in every row) the rows are served as it says; ``labels`` may instead contain ``{split}`` (one
    file per split); otherwise ``fractions`` divide the rows.

    Args:
        root: folder that the paths are relative to.
        labels: the CSV, relative to ``root``.
        class_names: the classes in order; default all labels of the file(s), sorted.
        separator: between labels.
        mask_folder: folder with ``<path without suffix>.png`` label maps (0 background, i + 1 class i, 255 void), relative to ``root``.
        fractions: shares of train, val and test where the CSV does not say.
        split_seed: random seed of that division.
        size, augment, masks, cache, geometry, no_region: how files become samples; see :class:`ImageFileDataset`.
    """

    name = "csv"
    task = "multilabel"

    def __init__(
        self,
        split: str = "train",
        size: int | Sequence[int] = 224,
        *,
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
        geometry: Geometry = "squash",
        no_region: Sequence[str] = (),
    ) -> None:
        super().__init__(split, size, augment=augment, masks=masks, cache=cache, geometry=geometry, no_region=no_region)
        self.folder, self.separator = home_path(root), separator
        require_directory(self.folder, self.name, "root is the folder that the CSV's paths are relative to.")
        tables = {s: self._read(self.folder / labels.replace("{split}", s)) for s in (SPLITS if "{split}" in labels else ("",))}
        self.source = self.folder / labels.replace("{split}", split)
        every = sorted({name for table in tables.values() for _, names, _ in table for name in names})
        if class_names is None and not every:
            raise ConfigError(f"{self.source}: no row has a label. Rows look like: photo.jpg,cat{separator}dog")
        most = None if mask_folder is None else VOID - 1
        self.class_names = checked_names("class_names", every if class_names is None else class_names, most)
        rows = tables[split] if "{split}" in labels else self._choose(tables[""], fractions, split_seed)
        mask_base = None if mask_folder is None else self.folder / mask_folder
        if mask_base is not None:
            require_directory(mask_base, self.name, "It is given as mask_folder: one PNG label map per image.")
        self.records = [self._record(path, names, mask_base) for path, names, _ in rows]
        report_links(self.folder, (r.image for r in self.records if isinstance(r.image, Path)))
        self._ready(self.source, "Check its split column, or fractions.")

    def _read(self, path: Path) -> list[tuple[str, list[str], str]]:
        if not path.is_file():
            raise DatasetNotFoundError(f"data set 'csv': {path} does not exist. Write lines like: photo.jpg,cat{self.separator}dog")
        try:
            rows = list(csv.reader(io.StringIO("\n".join(read_lines(path))), strict=True))
        except csv.Error as error:
            raise CorruptSampleError(f"{path}: not a CSV file ({error}). Look for a double quote that is not closed.") from error
        for number, row in enumerate(rows, start=1):
            if broken := next((cell for cell in row if "\n" in cell), None):
                raise CorruptSampleError(f"{path}: row {number} has a line break in a cell ({broken[:50]!r}): close a double quote.")
        columns, rows, first = self._columns(path, rows)
        table: dict[str, tuple[str, list[str], str]] = {}
        for number, row in enumerate(rows, start=first):
            if not 1 <= len(row) <= len(columns):
                raise CorruptSampleError(
                    f"{path}: row {number} has {len(row)} cells, expected {', '.join(columns)}. Labels are separated by {self.separator!r}."
                )
            cells = dict(zip(columns, (cell.strip() for cell in row), strict=False))
            names = [n.strip() for n in cells.get("labels", "").split(self.separator) if n.strip()]
            part = cells.get("split", "")
            if part and part not in SPLITS:
                raise ConfigError(f"{path}: row {number} has the unknown split {part!r}; splits are {', '.join(SPLITS)}.")
            file = cells["path"]
            if file and not file.startswith("/"):  # "./a.jpg" is "a.jpg"; what is no plain path is refused later, as it stands
                file = posixpath.normpath(file) if ".." not in file.split("/") else file
            if file in table and table[file][2] != part:
                raise ConfigError(
                    f"{path}: row {number} puts {file!r} into {part or 'no split'!r}, an earlier row into {table[file][2]!r}."
                )
            table[file] = (file, [*table[file][1], *names] if file in table else names, part)
        return list(table.values())

    @staticmethod
    def _columns(path: Path, rows: list[list[str]]) -> tuple[list[str], list[list[str]], int]:
        """Names of the columns, the rows without a header, and the number of the first of them."""
        header = [cell.strip().lower() for cell in rows[0]] if rows else []
        names = [HEADERS.get(cell) for cell in header]
        if header and None not in names and "path" in names and len(set(names)) == len(names):
            return [str(name) for name in names], rows[1:], 2
        looks = bool(header) and Path(header[0]).suffix not in IMAGE_SUFFIXES and not any("/" in cell for cell in header)
        if looks and (len(rows) == 1 or Path(rows[1][0].strip().lower() if rows[1] else "").suffix in IMAGE_SUFFIXES or None not in names):
            raise ConfigError(
                f"{path}: the first row, {', '.join(rows[0])!r}, is neither an image nor a known header. Call the columns path and labels "
                "(and split, if there is one), separated by commas."
            )
        return ["path", "labels", "split"], rows, 1

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
        return Record(file, path, tuple(sorted({self.class_names.index(n) for n in names})), mask_beside(mask_base, Path(file)))
