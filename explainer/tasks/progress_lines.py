"""Training without a terminal: a line an epoch and one a minute, for files that someone follows (CI, nohup, SLURM)."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import pytorch_lightning as pl

from explainer.tensors import Batch

_SECONDS_BETWEEN_LINES = 60.0


def in_terminal() -> bool:
    """Whether someone watches: Lightning's progress bar goes to the standard output."""
    return sys.stdout.isatty()


class ProgressLines(pl.Callback):
    """Print to stderr where a run is: at the end of every training epoch, and after :data:`_SECONDS_BETWEEN_LINES` of silence."""

    def __init__(self) -> None:
        self._start = self._said = time.monotonic()
        self._first = self._images = 0
        self._validated = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The clock starts; a resumed run counts its own steps alone."""
        self._start = self._said = time.monotonic()
        self._first, self._images = trainer.global_step, 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """A line if it is time."""
        self._images += len(batch) * trainer.world_size
        if self._due():
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs
            self._say(trainer, self._training(trainer, {"train/loss": loss}))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A line always."""
        names = ("train/loss", *(("val/loss",) if self._validated else ()))  # else it is an earlier epoch's
        self._validated = False
        self._say(trainer, self._training(trainer, {name: trainer.callback_metrics.get(name) for name in names}))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember that this epoch has a validation."""
        self._validated = True

    def on_validation_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, i: int, *_: Any) -> None:
        """A line if it is time."""
        self._evaluated(trainer, "validation", i, trainer.num_val_batches)

    def on_test_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, i: int, *_: Any) -> None:
        """A line if it is time."""
        self._evaluated(trainer, "test", i, trainer.num_test_batches)

    def on_predict_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, i: int, *_: Any) -> None:
        """A line if it is time."""
        self._evaluated(trainer, "prediction", i, trainer.num_predict_batches)

    def _evaluated(self, trainer: pl.Trainer, what: str, index: int, batches: Any) -> None:
        if self._due():
            number = sum(batches) if isinstance(batches, list) else batches
            self._say(trainer, f"{what}: batch {index + 1} of {number}")

    def _training(self, trainer: pl.Trainer, losses: dict[str, Any]) -> str:
        if not trainer.is_global_zero:
            return ""
        seconds, total, step = time.monotonic() - self._start, trainer.estimated_stepping_batches, trainer.global_step
        known = 0 < total < math.inf
        epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else None
        parts = [f"epoch {trainer.current_epoch + 1}{'' if epochs is None else f' of {epochs}'}"]
        parts += [f"step {step}{f' of {total:.0f}' if known else ''}"]
        parts += [f"{name} {float(value):.4f}" for name, value in losses.items() if value is not None]
        parts += [f"{self._images / seconds:.1f} images/s"] if seconds > 0 else []
        parts += [f"{duration(seconds * (total - step) / (step - self._first))} left"] if known and step > self._first else []
        return ", ".join(parts)

    def _due(self) -> bool:
        return time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES

    def _say(self, trainer: pl.Trainer, line: str) -> None:
        self._said = time.monotonic()
        if trainer.is_global_zero:
            print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A time in words of two units at most: ``41 s``, ``3 min 5 s``, ``2 h 10 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
