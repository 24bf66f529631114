"""How a run is saved: checkpoints that no kill and no full disk can damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from explainer.errors import CheckpointError, NumericalError
from explainer.files import replacing, second_name
from explainer.lightning_internals import checkpoint_content, log_step_again, logged_step
from explainer.models.checkpoints import read_weights
from explainer.tasks.csv_log import AppendingCSVLogger
from explainer.tasks.stopping import GracefulStop

LAST, PREVIOUS, BEST = "last.ckpt", "last-previous.ckpt", "best.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs to the disk and renames: at every moment the target is the old or the new file, whole.

    What ``last.ckpt`` was before is kept as ``last-previous.ckpt``. Lightning's own writer renames too, but does not sync (a power
    cut can leave an empty file under the final name), keeps a second copy in memory and no previous file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises CheckpointError if the disk is full or the folder is not writable; earlier checkpoints are then untouched."""
        path = Path(path)
        try:
            with replacing(path) as stream:
                torch.save(checkpoint, stream)
                if path.name == LAST and path.is_file():
                    second_name(path, path.with_name(PREVIOUS))
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"checkpoint {path} could not be written ({reason}). The checkpoints written before it are untouched: free some space or "
                "make the folder writable, then go on with --ckpt_path last."
            ) from error

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """Only tensors and plain values, whatever Lightning asks for."""
        return read_weights(path)


class SafeCheckpoint(ModelCheckpoint):
    """ModelCheckpoint whose metrics are on the disk before the checkpoint that goes on behind them is.

    Args:
        folder: folder of the checkpoints.
        every_steps: besides the ends of epochs, save whenever so many optimiser steps are done; None never.
        arguments: keyword arguments of ModelCheckpoint.
    """

    def __init__(self, folder: Path, every_steps: int | None = None, **arguments: Any) -> None:
        arguments["enable_version_counter"] = False
        super().__init__(folder, **arguments)
        self.every_steps = every_steps

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Save here and not when a batch ends: only now has Lightning logged that batch."""
        step = trainer.global_step
        if self.every_steps and step and step % self.every_steps == 0 and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What no epoch's end has saved: Lightning saves nothing by itself with ``fast_dev_run``."""
        if self.monitor is None and self._last_global_step_saved != trainer.global_step:
            self._save_checkpoint(trainer, self.format_checkpoint_name(self._monitor_candidates(trainer)))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save where the weights can be trusted, without waiting for processes that may not come.

        Between the last step of an epoch and its validation, that validation is lost: Lightning goes on with the next epoch.
        """
        untrusted = isinstance(exception, NumericalError | CheckpointError | KeyboardInterrupt)
        if untrusted or trainer.state.fn != "fit" or not trainer.global_step or not self._should_save_on_exception(trainer):
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        alone = trainer.world_size == 1 or any(isinstance(c, GracefulStop) and c.agreed for c in callbacks)
        _log_batch_in_progress(trainer)
        path = self.format_checkpoint_name(self._monitor_candidates(trainer))
        if alone:
            self._save_checkpoint(trainer, path)
        elif trainer.is_global_zero and isinstance(trainer.strategy, pl.strategies.DDPStrategy):
            # One process failed and the others are about to: a barrier would wait for ever.
            trainer.strategy.save_checkpoint(checkpoint_content(trainer), path)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()
        super()._save_checkpoint(trainer, filepath)


def _log_batch_in_progress(trainer: pl.Trainer) -> None:
    """The row of a batch that has moved the weights and was stopped before Lightning logged it: a resumed run does not meet it again.

    The values were reduced over the processes in the training step, so that no process has to be waited for.
    """
    step = logged_step(trainer)
    logged = [logger.train_step for logger in trainer.loggers if isinstance(logger, AppendingCSVLogger)]
    if trainer.training and trainer.global_step > step and logged and step not in logged:
        log_step_again(trainer)
