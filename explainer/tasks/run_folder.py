"""A run's folder: which checkpoint is meant, what an earlier run left there, and whether there is room."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only

from explainer.errors import CheckpointError, ConfigError
from explainer.models.checkpoints import read_weights
from explainer.tasks.saving import BEST, LAST, PREVIOUS
from explainer.tasks.stopping import restarted

log = logging.getLogger(__name__)
SUMMARY = "summary.json"
_MINIMUM_FREE_BYTES = 500 * 2**20


def resolve_checkpoint(ckpt_path: str | None, folder: Path, fitting: bool = False) -> str | None:
    """The file that ``--ckpt_path`` means.

    Args:
        ckpt_path: ``last``, ``previous`` (what ``last`` was before) or ``best`` of the run folder, ``auto`` (``last`` if there is one), a
            path, or None. A fit that SLURM or
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
    named = {"last": LAST, "previous": PREVIOUS, "best": BEST}.get(ckpt_path)
    path = Path(ckpt_path) if named is None else folder / "checkpoints" / named
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


def chosen_checkpoint(folder: Path) -> Path:
    """The checkpoint of a run that is used after it: ``best.ckpt``; of a run without validation, which chose none, ``last.ckpt``."""
    best = folder / "checkpoints" / BEST
    return best if best.is_file() or not best.with_name(LAST).is_file() else best.with_name(LAST)


def finished(folder: Path) -> bool:
    """Whether the run in a folder has come to its end. The summary is written then, and removed when a training goes on."""
    return (folder / SUMMARY).is_file()


def check_unused(folder: Path) -> None:
    """Raise ConfigError if the folder holds the checkpoints of a run, which a new one would replace."""
    found = [name for name in (BEST, LAST, PREVIOUS) if (folder / "checkpoints" / name).is_file()]
    if found and not restarted():
        raise ConfigError(
            f"run_dir {folder} holds a {'finished' if finished(folder) else 'begun'} run ({', '.join(found)}), which "
            "this fit would replace, with its metrics.csv and config.yaml. Go on with it: --ckpt_path last. Keep it: another --run_dir. "
            "Replace it: --overwrite true."
        )


class EarlierRun(pl.Callback):
    """Takes what an earlier run left out of the way, once all processes have read what they need.

    Were its checkpoints left, a restart by SLURM or torchrun before the first checkpoint of this run would go on from them. Its summary
    and pictures would be taken for this run's.

    Args:
        folder: the run's.
        checkpoint: checkpoint from which this run goes on, or None.
    """

    def __init__(self, folder: Path, checkpoint: str | None) -> None:
        self.run, self.folder, self.checkpoint = folder, folder / "checkpoints", checkpoint

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """A replaced run's are removed; those from which a run has gone back to an earlier checkpoint are kept as ``replaced-...``."""
        if restarted() or not trainer.is_global_zero:
            return
        names = (BEST, LAST, PREVIOUS) if self.checkpoint is None else (LAST, PREVIOUS)
        paths = [self.folder / name for name in names if (self.folder / name).is_file()]
        if self.checkpoint is not None:
            # From last nothing is moved; from the one before it last is, which the next save would put in its place.
            itself = [path.samefile(self.checkpoint) for path in paths]
            paths = paths[: itself.index(True)] if True in itself else paths
        for path in paths:
            path.unlink() if self.checkpoint is None else path.replace(path.with_name(f"replaced-{path.name}"))
        for path in (self.run / "images").glob("epoch_*.png") if self.checkpoint is None else ():
            path.unlink()

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that trains is not finished. One that has nothing left to do does not come here and keeps its summary."""
        (self.run / SUMMARY).unlink(missing_ok=True)


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
