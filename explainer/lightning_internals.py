"""What this project uses of Lightning beyond its documented interface, all of it here.

Nothing of Lightning is imported: the functions take its objects. ``tests/unit/tasks/test_lightning_internals.py`` holds
what each relies on, so that a version that moves something fails there and not in the middle of a night.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

#: Loggers through which Lightning advertises.
_CHATTY = (
    "pytorch_lightning.utilities.rank_zero",
    "lightning.pytorch.utilities.rank_zero",
    "pytorch_lightning.trainer.connectors",
)
#: Notes on choices that this project makes on purpose.
_EXPECTED = (
    r".*does not have many workers.*",
    r".*Checkpoint directory .* exists.*",
    r".*number of training batches.*",
    r".*LeafSpec.*",
    r".*isinstance\(treespec.*",
    r".*Detected call of `lr_scheduler.step\(\)`.*",
    r".*litlogger.*",
    r".*Starting from v1.9.0.*",
    r".*tensorboard.*",
    r".*Experiment logs directory.*",
    r".*in eval mode at the start of training.*",
    r".*ended before the epoch ended and your dataloader is not resumable.*",
    r".*callbacks used to create the checkpoint need to be.*",
)


def quiet_lightning() -> None:
    """Drop Lightning's advertisements and the notes on choices that this project makes on purpose."""
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in _EXPECTED:
        warnings.filterwarnings("ignore", message=text)


def stop_after_this_step(trainer: Any) -> None:
    """Let Lightning raise its SIGTERMException at the place where the step in progress is logged and counted."""
    trainer._signal_connector.received_sigterm = True


def count_logged_steps_from(trainer: Any, step: int) -> None:
    """Set the step under which the next training values are logged.

    Lightning counts logged steps apart from optimiser steps and guesses after a resume.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def logged_step(trainer: Any) -> int:
    """The step under which the next training values are logged."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def log_step_again(trainer: Any) -> None:
    """Log the training values of the batch in progress now, as Lightning does at its end."""
    trainer._logger_connector.update_train_step_metrics()


def checkpoint_content(trainer: Any) -> dict[str, Any]:
    """What a checkpoint of this moment holds, without waiting for other processes as ``save_checkpoint`` does."""
    return trainer._checkpoint_connector.dump_checkpoint(False)  # type: ignore[no-any-return]


def resume_position(trainer: Any) -> tuple[int, int]:
    """``(epoch, batch)`` where training goes on; (epoch, 0) unless a checkpoint from the middle of an epoch was loaded.

    ``processed`` counts the batches whose optimiser step is in the checkpoint, also where it was written inside
    ``on_train_batch_end`` (one more than ``completed``) or after an exception in the middle of a batch (one less than
    ``ready``).
    """
    epochs = trainer.fit_loop.epoch_progress.current
    if epochs.ready == epochs.processed:
        return epochs.processed, 0
    return epochs.processed, trainer.fit_loop.epoch_loop.batch_progress.current.processed


def is_last_batch(trainer: Any) -> bool:
    """Whether the training batch in progress is the epoch's last."""
    return bool(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)


def training_ends(trainer: Any) -> bool:
    """Whether the training batch in progress is the run's last: of its steps, its epochs or its time."""
    fit_loop = trainer.fit_loop
    epoch_loop = fit_loop.epoch_loop
    if 0 <= fit_loop.max_steps <= trainer.global_step:
        return True
    if trainer.should_stop and fit_loop._can_stop_early:
        return True
    epochs = fit_loop.max_epochs
    return bool(epoch_loop.batch_progress.is_last_batch and epochs is not None and 0 <= epochs <= trainer.current_epoch + 1)


def validate_at_the_end(trainer: Any) -> None:
    """Let training end with a validation also where Lightning's intervals leave it out (``check_val_every_n_epoch``, ``max_steps``,
    ``max_time``), unless validation is switched off.
    """
    loop = trainer.fit_loop.epoch_loop
    by_interval = loop._should_check_val_fx
    loop._should_check_val_fx = lambda fetcher: by_interval(fetcher) or (trainer.enable_validation and training_ends(trainer))


def without_old_settings(wandb_logger: Any) -> Any:
    """Lightning's WandbLogger without the setting that it passes unasked and wandb warns of."""
    wandb_logger._wandb_init.pop("anonymous", None)
    return wandb_logger


def brings_own_sampler(trainer: Any) -> bool:
    """Whether Lightning will replace the loaders' samplers by its own distributed one."""
    return bool(getattr(getattr(trainer, "_accelerator_connector", None), "use_distributed_sampler", False))
