"""Where a run's curves go: always a CSV file; wandb and TensorBoard for those who use them."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from pathlib import Path
from typing import Any

from explainer.config import RunConfig
from explainer.errors import ConfigError
from explainer.lightning_internals import without_old_settings
from explainer.tasks.csv_log import AppendingCSVLogger

log = logging.getLogger(__name__)


def loggers(config: RunConfig) -> list[Any]:
    """CSV always; wandb for a user who asks for it or is logged in, never in the way of training; TensorBoard where it is asked for.

    Raises:
        ConfigError: TensorBoard is asked for and not installed.
    """
    folder = Path(config.run_dir)
    found: list[Any] = [AppendingCSVLogger(folder)]
    if config.logging.tensorboard:
        found.append(_tensorboard(folder))
    mode = config.logging.wandb
    said = os.environ.get("WANDB_MODE")
    if mode == "auto":
        mode = said if said in ("online", "offline") else "online" if _wandb_key() else "off"  # type: ignore[assignment]
    if mode != "off" and said != "disabled":
        logger = _wandb(config, folder, offline=mode == "offline")
        if logger is not None:
            found.append(logger)
    return found


def _tensorboard(folder: Path) -> Any:
    if not any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")):
        raise ConfigError("logging.tensorboard is true and TensorBoard is not installed: pip install 'explainer-net[tensorboard]'.")
    from pytorch_lightning.loggers import TensorBoardLogger

    return TensorBoardLogger(str(folder), name="tensorboard", version="")


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

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            logger = WandbLogger(
                name=folder.name,
                project=config.logging.project,
                save_dir=str(folder),
                offline=offline,
                settings=wandb.Settings(init_timeout=15, silent=True),
            )
            _ = without_old_settings(logger).experiment
        return logger
    except Exception as error:
        if offline:
            log.warning("wandb could not be started (%s): curves are in metrics.csv only.", error)
            return None
        log.warning("wandb is not reachable (%s): logging offline; upload later with `wandb sync`.", type(error).__name__)
        return _wandb(config, folder, offline=True)
