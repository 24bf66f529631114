"""Signals stop training between two steps, on all processes at the same one; SLURM takes a stopped job back."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch

from explainer.lightning_internals import is_last_batch, stop_after_this_step

log = logging.getLogger(__name__)


class GracefulStop(pl.Callback):
    """SIGTERM, SIGHUP (a terminal that closes), SIGINT (the first) and, under SLURM, SIGUSR1 stop training after the current step, on all
    processes at the same one. Under nohup SIGHUP is not heard.

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
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signals.append(signal.SIGHUP)
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
        if signum == signal.SIGHUP:
            _leave_terminal()
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
        if self.agreed and not is_last_batch(trainer):
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
        stop_after_this_step(trainer)

    def exit_code(self, global_zero: bool = True) -> int:
        """0 without a signal or when SLURM has taken the job back, else 128 + signal."""
        if self.agreed == signal.SIGUSR1 and global_zero:
            return 0 if requeue() else 128 + signal.SIGUSR1
        return 0 if self.agreed in (0, signal.SIGUSR1) else 128 + self.agreed


def _leave_terminal() -> None:
    """What is still printed goes nowhere: the terminal is gone, and an error there would end the run before its last save."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if os.isatty(stream) or _hung_up(stream):
            os.dup2(nowhere, stream)
    os.close(nowhere)


def _hung_up(stream: int) -> bool:
    try:
        os.write(stream, b"")
    except OSError:
        return True
    return False


def restarted() -> bool:
    """Whether SLURM or torchrun has started this command before."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


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
