"""Where a run's curves go: always a CSV file, and wandb where the user has it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from explainer.config import RunConfig
from explainer.tasks.csv_log import AppendingCSVLogger

log = logging.getLogger(__name__)


def loggers(config: RunConfig) -> list[Any]:
    """CSV always; wandb online only for a user who is logged in, else offline, never in the way of training."""
    folder = Path(config.run_dir)
    found: list[Any] = [AppendingCSVLogger(folder)]
    mode = config.logging.wandb
    if mode != "off" and os.environ.get("WANDB_MODE") != "disabled":
        online = mode == "online" or (mode == "auto" and _wandb_key())
        logger = _wandb(config, folder, offline=not online)
        if logger is not None:
            found.append(logger)
    return found


def _wandb_key() -> bool:
    """Whether the user is logged in. Asking wandb itself would fix its mode for the process."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb(config: RunConfig, folder: Path, offline: bool) -> Any:
    from pytorch_lightning.loggers import WandbLogger

    try:
        import wandb

        logger = WandbLogger(
            name=folder.name, project=config.logging.project, save_dir=str(folder), offline=offline,
            settings=wandb.Settings(init_timeout=15, silent=True),
        )  # fmt: skip
        _ = logger.experiment
        return logger
    except Exception as error:
        if offline:
            log.warning("wandb could not be started (%s): curves are in metrics.csv only.", error)
            return None
        log.warning("wandb is not reachable (%s): logging offline; upload later with `wandb sync`.", type(error).__name__)
        return _wandb(config, folder, offline=True)
