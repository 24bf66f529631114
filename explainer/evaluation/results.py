"""Rows: what an evaluation stores, how it survives a kill, and how it is read back. Every reported number is computed from rows alone.

A results folder holds

- ``results.jsonl``: one row per line; protocols about the classifier alone first, then by method, protocol, scale (raw
  first), image (order of the data set) and class::

    {"method": "grad_cam",            label of the method in the configuration ("classifier" for protocols that explain nothing)
     "scale": "raw",                  raw: the map clamped to [0,1] where a mask is needed; minmax: the map rescaled to [0,1] first.
                                      Protocols that use only the order or the sign of a map have "raw" rows alone.
     "protocol": "segmentation",      label of the protocol in the configuration
     "image": "test/000017",          the sample's id
     "index": 17,                     its position in the data set
     "class": 3,                      number of the class whose map was scored; null: the row is about the whole image
     "values": {"iou": 0.81},         one number per column; null: undefined for this row (excluded and counted); infinity as "Infinity"
     "vectors": {"deletion": [...]}}  lists of numbers: curves, matrix rows, counts (absent where the protocol has none)

- ``summary.json``: see :mod:`explainer.evaluation.summary`; ``summary.csv`` and ``table.md`` show the same numbers;
- ``rows/*.jsonl``: the store behind them, one line per (method, protocol, batch) with the batch's rows and a key that ties it to
  classifier, method, data, protocol and options; written line by line, so that a kill loses at most the batch in work;
- ``gallery/``: small pictures, see :mod:`explainer.evaluation.gallery`;
- ``maps/``: the map cache, if it is kept here; ``config.yaml``.

Vectors by protocol: ``insertion_deletion``: ``insertion``, ``deletion`` (score at ``fractions`` of the pixels, 5 digits);
``negative_perturbation``: ``negative``, ``positive``; ``masking_matrix``: ``masking``, row t of the class x class matrix in percent,
last entry "none" (the row's ``class`` is t; the matrix is the mean over rows); ``classification_kept``: ``counts``, tp, fp, fn, tn of
each threshold. ``summary.json`` names the axes. A row may lack a column that does not concern it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from explainer.errors import ConfigError
from explainer.files import parse_json, write_text

log = logging.getLogger(__name__)

RESULTS, ROWS = "results.jsonl", "rows"


def encode(value: float) -> float | str | None:
    """A float as strict JSON: NaN is null, infinity a string."""
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")


def decode(value: float | str | None) -> float:
    """The inverse of :func:`encode`."""
    return math.nan if value is None else float(value)


#: What reading a row raises where a line holds something else.
_NO_ROW = (ValueError, TypeError, LookupError, AttributeError, OverflowError)


@dataclass(frozen=True)
class Row:
    """One line of ``results.jsonl``; see the module's text."""

    method: str
    scale: str
    protocol: str
    image: str
    index: int
    class_index: int | None
    values: dict[str, float]
    vectors: dict[str, list[float]] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        line: dict[str, Any] = {
            "method": self.method,
            "scale": self.scale,
            "protocol": self.protocol,
            "image": self.image,
            "index": self.index,
            "class": self.class_index,
            "values": {k: encode(v) for k, v in self.values.items()},
        }
        if self.vectors:
            line["vectors"] = {k: [encode(x) for x in v] for k, v in self.vectors.items()}
        return line

    @classmethod
    def of(cls, line: dict[str, Any]) -> Row:
        """The inverse of :meth:`record`.

        Raises:
            ValueError, TypeError, LookupError, AttributeError, OverflowError: it is none.
        """
        values = {k: decode(v) for k, v in line["values"].items()}
        vectors = {k: [decode(x) for x in v] for k, v in line.get("vectors", {}).items()}
        row = cls(line["method"], line["scale"], line["protocol"], line["image"], line["index"], line["class"], values, vectors)
        texts = all(type(text) is str for text in (row.method, row.scale, row.protocol, row.image))
        if not (texts and type(row.index) is int and type(row.class_index) in (int, type(None))):
            raise ValueError(f"a name or a number is of another kind: {str(row)[:200]}")
        return row

    def order(self) -> tuple[Any, ...]:
        """Sorting key within one method and protocol."""
        return (self.scale != "raw", self.index, -1 if self.class_index is None else self.class_index)


@dataclass(frozen=True)
class Unit:
    """What is stored at once: the rows of one (method, protocol, batch).

    Attributes:
        key: ties the rows to everything that decides them.
        method, protocol: labels.
        batch: number of the batch.
        rows: the rows; may be empty (no image of the batch has a class, say).
        seconds: time that the method took for the batch's maps; NaN when they came from the cache.
    """

    key: str
    method: str
    protocol: str
    batch: int
    rows: tuple[Row, ...]
    seconds: float = math.nan


class RowStore:
    """The folder ``rows/`` of a results folder. Each process appends to a file of its own, so several can write at once.

    Args:
        folder: the results folder.
        rank: rank of this process, in the file's name.
    """

    def __init__(self, folder: str | Path, rank: int = 0) -> None:
        self.folder = Path(folder) / ROWS
        self.rank = rank
        self._file: Path | None = None

    def load(self) -> dict[str, Unit]:
        """All complete units by key; a partial last line (a kill while writing) is dropped."""
        units: dict[str, Unit] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
                if not line.strip():
                    continue
                try:
                    entry = parse_json(line)
                    rows = tuple(Row.of(r) for r in entry["rows"])
                    unit = Unit(entry["key"], entry["method"], entry["protocol"], entry["batch"], rows, decode(entry["seconds"]))
                except _NO_ROW:
                    log.warning("%s: line %d is incomplete (the run was stopped there); its batch is computed again", path, number)
                    continue
                units[unit.key] = unit
        return units

    def append(self, units: Sequence[Unit]) -> None:
        """Add units durably: when this returns they survive a kill."""
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A fresh file: nothing is ever appended after a partial line.
            self._file = self.folder / f"rank{self.rank:03d}-{uuid.uuid4().hex[:12]}.jsonl"
        lines = []
        for u in units:
            entry = {"key": u.key, "method": u.method, "protocol": u.protocol, "batch": u.batch, "seconds": encode(u.seconds)}
            lines.append(json.dumps({**entry, "rows": [r.record() for r in u.rows]}, allow_nan=False))
        with self._file.open("ab") as file:
            file.write(("\n".join(lines) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())


def write_rows(folder: str | Path, rows: Iterable[Row]) -> Path:
    """Write ``results.jsonl``."""
    path = Path(folder) / RESULTS
    write_text(path, "".join(json.dumps(r.record(), allow_nan=False) + "\n" for r in rows))
    return path


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a results folder or of one ``results.jsonl``; a partial last line is dropped.

    Raises:
        ConfigError: no such file, or a line that is no row.
    """
    path = Path(path)
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{file} does not exist. It is written by: python evaluate.py --config configs/evaluate/quickstart.yaml")
    lines = file.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(Row.of(parse_json(line)))
        except _NO_ROW as error:
            if number == len(lines):  # no newline after it: the writer was stopped here
                log.warning("%s: the last line is incomplete and was left out", file)
                continue
            raise ConfigError(f"{file}, line {number} is not a row of an evaluation ({error}). Run the evaluation again.") from error
    return rows
