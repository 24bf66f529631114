"""How a run is saved and stopped: checkpoints that no kill and no full disk can damage, and signals that stop between two steps."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl  # noqa: TID251 - one of the three places that may
import torch
from pytorch_lightning.callbacks import ModelCheckpoint  # noqa: TID251
from pytorch_lightning.plugins.io import TorchCheckpointIO  # noqa: TID251

from explainer.errors import CheckpointError, ConfigError, NumericalError
from explainer.models.checkpoints import read_weights
from explainer.tasks.csv_log import AppendingCSVLogger

log = logging.getLogger(__name__)
LAST, PREVIOUS, BEST = "last.ckpt", "last-previous.ckpt", "best.ckpt"
_MINIMUM_FREE_BYTES = 500 * 2**20


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs to the disk and renames: at every moment the target is the old or the new file, whole.

    What ``last.ckpt`` was before is kept as ``last-previous.ckpt``. Lightning's own writer renames too, but does not sync (a power
    cut can leave an empty file under the final name), keeps a second copy in memory and no previous file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises CheckpointError if the disk is full or the folder is not writable; earlier checkpoints are then untouched."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _discard_leftovers(path)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.name == LAST and path.is_file():
                _keep(path, path.with_name(PREVIOUS))
            temporary.replace(path)
            _sync_folder(path.parent)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            temporary.unlink(missing_ok=True)
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"checkpoint {path} could not be written ({reason}). The checkpoints written before it are untouched: free some space or "
                "make the folder writable, then go on with --ckpt_path last."
            ) from error

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """Only tensors and plain values, whatever Lightning asks for."""
        return read_weights(path)


def _keep(path: Path, previous: Path) -> None:
    """Give the file a second name, so that it has one at every moment; where there are no hard links, copy it."""
    second = previous.with_name(f".{previous.name}.{os.getpid()}.tmp")
    second.unlink(missing_ok=True)
    try:
        os.link(path, second)
    except OSError:
        shutil.copyfile(path, second)
    second.replace(previous)


def _sync_folder(folder: Path) -> None:
    """Make the renames durable; not every file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _discard_leftovers(path: Path) -> None:
    """Remove what killed processes left of this file."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


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


def restarted() -> bool:
    """Whether SLURM or torchrun has started this command before."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


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


class SafeCheckpoint(ModelCheckpoint):
    """ModelCheckpoint whose metrics are on the disk before the checkpoint that goes on behind them is.

    Args:
        folder: of the checkpoints.
        every_steps: besides the ends of epochs, save whenever so many optimiser steps are done; None never.
        arguments: of ModelCheckpoint.
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
            trainer.strategy.save_checkpoint(trainer._checkpoint_connector.dump_checkpoint(False), path)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()
        super()._save_checkpoint(trainer, filepath)


class GracefulStop(pl.Callback):
    """SIGTERM, SIGINT (the first) and, under SLURM, SIGUSR1 stop training after the current step, on all processes at the same one.

    ``last.ckpt`` is then written. Lightning saves or broadcasts inside the signal handler, that is in the middle of anything, which
    resumes inexactly and can wait for ever in distributed runs. A signal during validation takes effect at its end.
    """

    def __init__(self) -> None:
        self.received = self.agreed = 0
        self._trainer: pl.Trainer | None = None
        self._step = 0

    @contextlib.contextmanager
    def listening(self, trainer: pl.Trainer) -> Iterator[None]:
        """Install the handlers and put the former ones back. Does nothing outside the main thread."""
        self._trainer = trainer
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = [signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if in_slurm() else [])]
        former = {s: signal.signal(s, self._receive) for s in signals}
        try:
            yield
        finally:
            for s, handler in former.items():
                signal.signal(s, handler)

    def _receive(self, signum: int, frame: Any) -> None:
        if signum == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum
        launcher = self._trainer.strategy.launcher if self._trainer is not None else None
        if signum == signal.SIGTERM and hasattr(launcher, "procs"):
            launcher.kill(signum)  # type: ignore[union-attr]  # the processes that Lightning itself started
        if signum == signal.SIGINT:
            log.warning("stopping after this step; press Ctrl-C again to stop at once")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning has put its handler in front of ours by now."""
        if threading.current_thread() is threading.main_thread() and self._trainer is not None:
            signal.signal(signal.SIGTERM, self._receive)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Remember whether an optimiser step follows."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stop between two optimiser steps; the end of an epoch is left to :meth:`on_train_epoch_end`."""
        if trainer.global_step == self._step:  # gradients are being accumulated: they are not in a checkpoint
            return
        self._agree(trainer)
        if self.agreed and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After validation."""
        self._agree(trainer)
        if self.agreed:
            self._stop(trainer)

    def _agree(self, trainer: pl.Trainer) -> None:
        value = self.received
        if trainer.world_size > 1:
            shared = torch.tensor(value, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
            value = int(shared)
        self.agreed = self.agreed or value

    @staticmethod
    def _stop(trainer: pl.Trainer) -> None:
        # Lightning then raises SIGTERMException where the step is logged and counted.
        trainer._signal_connector.received_sigterm = True

    def exit_code(self, global_zero: bool = True) -> int:
        """0 without a signal or when SLURM has taken the job back, else 128 + signal."""
        if self.agreed == signal.SIGUSR1 and global_zero:
            return 0 if requeue() else 128 + signal.SIGUSR1
        return 0 if self.agreed in (0, signal.SIGUSR1) else 128 + self.agreed


def in_slurm() -> bool:
    """Whether this is a SLURM batch job (an interactive one has nothing to requeue)."""
    return "SLURM_JOB_ID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def requeue() -> bool:
    """Ask SLURM to start this job again; whether it agreed."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    try:
        done = subprocess.run(["scontrol", "requeue", job], check=False, capture_output=True, text=True)
    except OSError as error:
        log.error("job %s could not be requeued (%s): submit it again with --ckpt_path last", job, error)
        return False
    if done.returncode:
        log.error("job %s could not be requeued (%s): submit it again with --ckpt_path last", job, done.stderr.strip())
    return done.returncode == 0


def _log_batch_in_progress(trainer: pl.Trainer) -> None:
    """The row of a batch that has moved the weights and was stopped before Lightning logged it: a resumed run does not meet it again.

    The values were reduced over the processes in the training step, so that no process has to be waited for.
    """
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    logged = [logger.train_step for logger in trainer.loggers if isinstance(logger, AppendingCSVLogger)]
    if trainer.training and trainer.global_step > step and logged and step not in logged:
        trainer._logger_connector.update_train_step_metrics()
