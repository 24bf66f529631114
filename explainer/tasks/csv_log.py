"""``metrics.csv``: rows that survive kills and resumes, none lost and none twice."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
from pytorch_lightning.utilities import rank_zero_only

from explainer.files import write_text
from explainer.lightning_internals import count_logged_steps_from


class AppendingCSVLogger(Logger):
    """Rows by step in ``<folder>/metrics.csv``.

    Lightning's CSVLogger deletes the file when a run resumes in the same folder and rewrites it in place when a column is added: a kill
    at either moment loses the curve. Here the file is only appended to, or replaced at once.

    Args:
        folder: folder of the run.
        every: rows between two writes; :meth:`save` writes at once, and is called before every checkpoint.
    """

    def __init__(self, folder: Path, every: int = 50) -> None:
        super().__init__()
        self.folder, self.file, self.every = folder, folder / "metrics.csv", every
        self._rows: list[dict[str, float]] = []
        self._columns: list[str] = []
        self.train_step: int | None = None  #: of the last training loss in the log

    @property
    def name(self) -> str:
        """Of the run."""
        return self.folder.name

    @property
    def version(self) -> str:
        """None but the run folder itself."""
        return ""

    @property
    def log_dir(self) -> str:
        """The run folder."""
        return str(self.folder)

    @property
    @rank_zero_experiment
    def experiment(self) -> AppendingCSVLogger:
        """The logger itself."""
        return self

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """They are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Add a row."""
        row = {"step": float(step or 0), **{k: float(v) for k, v in metrics.items()}}
        if self._rows and self._rows[-1]["step"] == row["step"] and self._rows[-1].keys() == row.keys():
            self._rows.pop()  # batches whose gradients are accumulated share a step
        self._rows.append(row)
        if "train/loss" in row:
            self.train_step = int(row["step"])
        if len(self._rows) >= self.every:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Write the rows that are waiting."""
        if not self._rows:
            return
        waiting, self._rows = self._rows, []
        new = sorted({key for row in waiting for key in row} - set(self._columns))
        if new or not self.file.is_file():
            self._replace([*read_rows(self.file), *waiting], [*self._columns, *new])
            return
        with self.file.open("a", newline="", encoding="utf-8") as stream:
            csv.DictWriter(stream, self._columns).writerows(waiting)

    @rank_zero_only
    def keep_until(self, step: int) -> None:
        """Drop the file's rows at or beyond the step that training goes on from: they are about to be written again."""
        kept = [row for row in read_rows(self.file) if row["step"] < step]
        self._columns = sorted({key for row in kept for key in row})
        if kept:
            self._replace(kept, self._columns)
        else:
            self.file.unlink(missing_ok=True)

    def _replace(self, rows: list[dict[str, float]], columns: list[str]) -> None:
        self._columns = sorted(columns)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.file, text.getvalue())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.save()


def read_rows(file: Path) -> list[dict[str, float]]:
    """The whole rows of a metrics file; what a kill cut off in the middle of a line is left out. Empty cells are missing keys."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8", errors="replace") as stream:
        text = stream.read()
    lines = text[: text.rfind("\n") + 1].splitlines()
    rows = []
    for record in csv.DictReader(lines):
        row = {k: _number(v) for k, v in record.items() if k is not None and v not in ("", None)}
        if not math.isnan(row.get("step", math.nan)):
            rows.append(row)
    return rows


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


class KeepEarlierRows(pl.Callback):
    """Tell the CSV logger where training resumes, and Lightning which step it is."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After a checkpoint, if any, was loaded."""
        for logger in trainer.loggers:
            if isinstance(logger, AppendingCSVLogger):
                logger.keep_until(trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Lightning counts logged steps apart and guesses after a resume: each would shift the curve by one."""
        count_logged_steps_from(trainer, trainer.global_step)
