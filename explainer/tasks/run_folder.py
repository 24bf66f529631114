"""A run's folder: which checkpoint is meant, what an earlier run left there, and whether there is room."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from explainer.errors import CheckpointError, ConfigError
from explainer.models.checkpoints import read_weights
from explainer.tasks.saving import BEST, LAST, PREVIOUS
from explainer.tasks.stopping import restarted

log = logging.getLogger(__name__)
_MINIMUM_FREE_BYTES = 500 * 2**20


def resolve_checkpoint(ckpt_path: str | None, folder: Path, fitting: bool = False) -> str | None:
    """The file that ``--ckpt_path`` means.

    Args:
        ckpt_path: ``last`` or ``best`` of the run folder, ``auto`` (``last`` if there is one), a path, or None. A fit that SLURM or
            torchrun has restarted takes None for ``auto``, and goes on from ``last`` where it began from another: its command is that of
            the first start, and does not know of what was done since.
        folder: the run's.
        fitting: the command is fit.

    Raises:
        CheckpointError: missing, damaged or unsafe. A damaged ``last.ckpt`` is replaced by ``last-previous.ckpt`` where that is whole.
    """
    last = folder / "checkpoints" / LAST
    begun = last.is_file() or last.with_name(PREVIOUS).is_file()
    if fitting and restarted() and (ckpt_path is None or begun):
        ckpt_path = "auto"
    if ckpt_path == "auto":
        ckpt_path = "last" if begun else None
        log.warning("resuming from %s", last) if ckpt_path else log.warning("no checkpoint in %s yet: starting anew", last.parent)
    if ckpt_path is None:
        return None
    path = folder / "checkpoints" / f"{ckpt_path}.ckpt" if ckpt_path in ("last", "best") else Path(ckpt_path)
    try:
        read_weights(path)  # a damaged or unsafe file is answered in this project's words, before anything is set up
    except CheckpointError as error:
        previous = last.with_name(PREVIOUS)
        if ckpt_path != "last" or not previous.is_file():
            raise
        read_weights(previous)
        log.warning("%s Using %s instead.", error, previous)
        return str(previous)
    return str(path)


def check_unused(folder: Path) -> None:
    """Raise ConfigError if the folder holds the checkpoints of a run, which a new one would replace."""
    found = [name for name in (BEST, LAST, PREVIOUS) if (folder / "checkpoints" / name).is_file()]
    if found and not restarted():
        raise ConfigError(
            f"run_dir {folder} holds a {'finished' if (folder / 'summary.json').is_file() else 'begun'} run ({', '.join(found)}), which "
            "this fit would replace, with its metrics.csv and config.yaml. Go on with it: --ckpt_path last. Keep it: another --run_dir. "
            "Replace it: --overwrite true."
        )


def check_optimizer(path: str, given: dict[str, Any]) -> None:
    """Raise ConfigError where a resumed run is given other optimiser options than its checkpoint goes on with.

    The optimiser's state, which is what a resume is for, holds its learning rate and decay: new ones would be ignored in silence.

    Args:
        path: of the checkpoint.
        given: the ``optimizer`` section.
    """
    content = read_weights(path)
    known = content.get("hyper_parameters")
    saved = known.get("optimizer") if isinstance(known, dict) else None
    if not isinstance(saved, dict):  # written by an older version, which kept no configuration of it
        try:
            group = content["optimizer_states"][0]["param_groups"][0]
            saved = {"lr": group.get("initial_lr", group["lr"])}
        except (LookupError, TypeError, AttributeError):  # no checkpoint of a training: Lightning says what it lacks
            saved = {}
    if saved:
        saved = {"encoder_lr": 1.0, **saved}  # an older version had one rate
    changed = [f"optimizer.{key} is {given[key]} and was {saved[key]}" for key in saved if key in given and given[key] != saved[key]]
    if changed:
        raise ConfigError(
            f"{'; '.join(changed)} when {path} was written. A resumed run goes on with the optimiser of its checkpoint: leave the option "
            f"as it was. For another optimiser begin a run with these weights instead: --init_from {path} --run_dir ANOTHER, without "
            "--ckpt_path."
        )


class EarlierRun(pl.Callback):
    """Takes the checkpoints of an earlier run out of the way, once all processes have read what they need.

    Were they left, a restart by SLURM or torchrun before the first checkpoint of this run would go on from them.

    Args:
        folder: of the checkpoints.
        checkpoint: from which this run goes on, or None.
    """

    def __init__(self, folder: Path, checkpoint: str | None) -> None:
        self.folder, self.checkpoint = folder, checkpoint

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """A replaced run's are removed; those from which a run has gone back to an earlier checkpoint are kept as ``replaced-...``."""
        if restarted() or not trainer.is_global_zero:
            return
        names = (BEST, LAST, PREVIOUS) if self.checkpoint is None else (LAST, PREVIOUS)
        paths = [self.folder / name for name in names if (self.folder / name).is_file()]
        if self.checkpoint is not None and any(path.samefile(self.checkpoint) for path in paths):
            return
        for path in paths:
            path.unlink() if self.checkpoint is None else path.replace(path.with_name(f"replaced-{path.name}"))


def check_run_dir(folder: Path) -> None:
    """Fail before hours are spent: the folder must be writable."""
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        for place in (folder, folder / "checkpoints"):
            probe = place / f".probe-{os.getpid()}"
            probe.write_bytes(b"x")
            probe.unlink()
    except OSError as error:
        raise ConfigError(f"run_dir {folder} is not writable ({error.strerror}). Choose another with --run_dir.") from error
    check_space(folder, _MINIMUM_FREE_BYTES)


def check_space(folder: Path, needed: int) -> None:
    """Raise ConfigError unless the disk has room for ``needed`` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"run_dir {folder} has {free / 2**20:.0f} MiB free, fewer than the {needed / 2**20:.0f} that its checkpoints need. "
            "Free some space or choose another with --run_dir."
        )


def bytes_of_checkpoints(trained: torch.nn.Module) -> int:
    """Upper estimate for best, last, last-previous and the one being written: weights and two moments each, with a reserve."""
    weights = sum(p.numel() * p.element_size() for p in trained.parameters())
    return max(_MINIMUM_FREE_BYTES, 4 * 3 * weights + 50 * 2**20)
