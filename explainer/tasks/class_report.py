"""How well a classifier knows each class: what a user looks at before explaining it."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from explainer.files import write_text

_PRINTED = 12


@dataclass(frozen=True)
class ClassReport:
    """Counts of one split.

    Attributes:
        names: K class names.
        support: images of each class.
        predicted: images for which it was predicted (single-label: the largest logit; multi-label: probability >= 0.5).
        right: images of the class for which it was predicted.
        confusion: ``[K][K]``, images of the row's class that were given the column's; None for multi-label classifiers, where one image
            has several.
    """

    names: tuple[str, ...]
    support: tuple[int, ...]
    predicted: tuple[int, ...]
    right: tuple[int, ...]
    confusion: tuple[tuple[int, ...], ...] | None

    @classmethod
    def single_label(cls, names: Sequence[str], confusion: Tensor) -> ClassReport:
        """From a confusion matrix ``[K,K]``, true classes in rows."""
        counts = [[int(v) for v in row] for row in confusion.tolist()]
        K = len(counts)
        return cls(
            tuple(names),
            tuple(sum(row) for row in counts),
            tuple(sum(counts[i][k] for i in range(K)) for k in range(K)),
            tuple(counts[k][k] for k in range(K)),
            tuple(tuple(row) for row in counts),
        )

    @classmethod
    def multi_label(cls, names: Sequence[str], tables: Tensor) -> ClassReport:
        """From ``[K,2,2]``: for each class, absent and present in rows, not predicted and predicted in columns."""
        counts = [[[int(v) for v in row] for row in table] for table in tables.tolist()]
        return cls(
            tuple(names),
            tuple(t[1][0] + t[1][1] for t in counts),
            tuple(t[0][1] + t[1][1] for t in counts),
            tuple(t[1][1] for t in counts),
            None,
        )

    @property
    def recall(self) -> tuple[float, ...]:
        """Share of the images of each class for which it was predicted; NaN without images."""
        return tuple(r / n if n else math.nan for r, n in zip(self.right, self.support, strict=True))

    @property
    def precision(self) -> tuple[float, ...]:
        """Share of right ones among the predictions of each class; NaN where it was never predicted."""
        return tuple(r / n if n else math.nan for r, n in zip(self.right, self.predicted, strict=True))

    @property
    def printable(self) -> bool:
        """Whether there is a confusion matrix that a terminal is wide enough for."""
        return self.confusion is not None and len(self.names) <= _PRINTED

    def table(self) -> list[list[str]]:
        """Header and one row a class: images, recall, precision and, single-label, what it is most often taken for."""
        rows = [["class", "images", "recall", "precision"]]
        for k, name in enumerate(self.names):
            rows.append([name, str(self.support[k]), f"{self.recall[k]:.3f}", f"{self.precision[k]:.3f}"])
        if self.confusion is not None:
            rows[0].append("taken most often for")
            for k, row in enumerate(rows[1:]):
                wrong = {j: n for j, n in enumerate(self.confusion[k]) if j != k and n}
                j = max(wrong, key=lambda j: wrong[j], default=None)
                row.append("" if j is None else f"{self.names[j]} ({wrong[j]})")
        return rows

    def matrix(self) -> list[list[str]]:
        """The confusion matrix with its header; true classes in rows. Empty for multi-label classifiers."""
        if self.confusion is None:
            return []
        body = [[name, *map(str, row)] for name, row in zip(self.names, self.confusion, strict=True)]
        return [["true \\ predicted", *self.names], *body]

    def save(self, folder: Path, split: str) -> list[Path]:
        """Write ``classes_<split>.csv`` and, single-label, ``confusion_<split>.csv``; returns the files."""
        written = []
        for stem, rows in (("classes", self.table()), ("confusion", self.matrix())):
            if rows:
                path = folder / f"{stem}_{split}.csv"
                text = io.StringIO(newline="")
                csv.writer(text, lineterminator="\n").writerows(rows)
                write_text(path, text.getvalue())
                written.append(path)
        return written
