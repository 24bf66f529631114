"""Real processes that run the command line, without paying seconds of imports for each: forked from a server that has imported all."""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["explainer.commands.fit", "explainer.commands.evaluation", "explainer.cli", "segmentation_models_pytorch", "tests.integration.launch"]
)
# The smallest classifier and Explainer on 24 images of 32 px, 6 steps an epoch, everything random switched on.
DATA = ["--data.options", "{size: 32, length: 24}", "--data.eval_batch_size", "12", "--data.batch_size", "4"]
QUIET = ["--trainer.progress_bar", "false", "--trainer.accelerator", "cpu", "--logging.wandb", "off", "--logging.images", "0"]
CLASSIFIER = ["fit", "--task", "classify", "--classifier.options", "{widths: [8, 8]}", *DATA, *QUIET, "--trainer.log_every_n_steps", "1"]
NETWORK = ["--explainer.network", "vgg_unet", "--explainer.options", "{widths: [8, 8], decoder_channels: [8]}", "--explainer.stride", "4"]
EXPLAINER = ["fit", *NETWORK, *DATA, *QUIET, "--trainer.log_every_n_steps", "1", "--optimizer.lr", "0.003"]


def _strike(kind: str, number: int, signum: int = signal.SIGKILL) -> None:
    """Arrange that this process gets a signal at a moment that no machine's speed moves.

    Args:
        kind: ``step``: after an optimiser step. ``backward``: after a backward pass. ``validation``: after a batch of a classifier's
            validation. ``sync``: where a file is about to be made durable, the last bytes of it still missing (a torn checkpoint, a torn
            row), or, every second time a checkpoint is written, right after its renaming. ``time``: any moment.
        number: how many steps, backward passes, syncs or hundredths of a second of the processor's time.
        signum: the signal.
    """
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    count = itertools.count(1)

    def due() -> None:
        if next(count) == number:
            os.kill(os.getpid(), signum)

    sync, backward = os.fsync, torch.Tensor.backward

    def torn_sync(handle: int) -> None:
        if next(count) == number:
            with contextlib.suppress(OSError):  # a folder has no bytes to miss
                os.ftruncate(handle, max(0, os.fstat(handle).st_size - 5))
            os.kill(os.getpid(), signum)
        sync(handle)

    def backward_then_due(*args: Any, **options: Any) -> None:
        backward(*args, **options)
        due()

    if kind == "step":
        register_optimizer_step_post_hook(lambda *_: due())
    elif kind == "backward":
        torch.Tensor.backward = backward_then_due
    elif kind == "validation":
        from explainer.tasks.classify import ClassifyTask

        validate = ClassifyTask.validation_step

        @functools.wraps(validate)
        def validate_then_due(*args: Any, **options: Any) -> None:
            validate(*args, **options)
            due()

        ClassifyTask.validation_step = validate_then_due
    elif kind == "sync":
        os.fsync = torn_sync
    else:
        signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), signum))
        signal.setitimer(signal.ITIMER_PROF, number / 100)


def _main(program: str, argv: list[str], env: dict[str, str], output: str, strike: tuple[Any, ...] | None) -> None:
    os.environ.update(env)
    stream = Path(output).open("a", buffering=1)  # noqa: SIM115 - until the process ends
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored
    # As in a process started by hand. Loader workers forked by the server would not notice that this process was killed.
    multiprocessing.set_start_method("fork", force=True)
    import torch

    from explainer import cli

    torch.set_num_threads(1)
    if strike:
        _strike(*strike)
    code = {"train": cli.main, "evaluate": lambda argv: cli.main(["evaluate", *argv])}[program](argv)
    stream.flush()
    os._exit(code)


class Job:
    """One process.

    Args:
        argv: of the program.
        folder: where its output is kept.
        env: additions to the environment.
        program: train or evaluate.
        strike: arguments of :func:`_strike`.
    """

    def __init__(
        self,
        argv: Sequence[str],
        folder: Path,
        env: dict[str, str] | None = None,
        program: str = "train",
        strike: tuple[Any, ...] | None = None,
    ) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        folder.mkdir(parents=True, exist_ok=True)
        self.output = folder / f"output-{time.monotonic_ns()}.txt"
        self.process = CONTEXT.Process(target=_main, args=(program, list(argv), env or {}, str(self.output), strike))
        self.process.start()

    @property
    def text(self) -> str:
        """What it printed."""
        return self.output.read_text() if self.output.exists() else ""

    def send(self, signum: int) -> None:
        """A signal, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signum)

    def wait(self, timeout: float = 240) -> int:
        """Its exit code (negative: killed by that signal)."""
        clock = OwnClock(self.process.pid)
        while self.process.exitcode is None and clock.passed() < timeout:
            self.process.join(1)
        if self.process.exitcode is None:
            self.send(signal.SIGKILL)
            self.process.join(10)
            raise AssertionError(f"hangs after {timeout} s:\n{self.text}")
        return self.process.exitcode

    def wait_for(self, condition, timeout: float = 240) -> None:
        """Until the condition holds; it must do so while the process runs."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.process.exitcode is None, f"ended with {self.process.exitcode}:\n{self.text}"
            assert time.monotonic() < end, f"waited {timeout} s in vain:\n{self.text}"
            time.sleep(0.01)


class OwnClock:
    """Seconds of a process, without those in which threads of it were ready to run and other processes ran: a busy machine is not slow."""

    def __init__(self, pid: int) -> None:
        self._threads, self._waited = Path(f"/proc/{pid}/task"), {}
        self._began = self._now()

    def _now(self) -> float:
        for thread in self._threads.glob("*/schedstat"):
            with contextlib.suppress(OSError, IndexError):  # it has just ended
                self._waited[thread] = int(thread.read_text().split()[1])
        return time.monotonic() - sum(self._waited.values()) / 1e9

    def passed(self) -> float:
        """Since it was made."""
        return self._now() - self._began


def run(argv: Sequence[str], folder: Path, env: dict[str, str] | None = None, program: str = "train") -> int:
    """Start one process and wait; its output appears where a test fails."""
    job = Job(argv, folder, env, program)
    code = job.wait()
    if code:
        print(job.text)
    return code


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def group(
    argv: Sequence[str],
    folder: Path,
    world: int = 2,
    nodes: int = 1,
    program: str = "train",
    strikes: dict[int, tuple[Any, ...]] | None = None,
) -> list[Job]:
    """The processes that torchrun would start, with the environment it would give them; ``strikes`` is by rank."""
    port, local = free_port(), world // nodes
    common = {
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": local,
        "GROUP_WORLD_SIZE": nodes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_RESTART_COUNT": 0,
        "GLOO_SOCKET_IFNAME": "lo",
    }
    jobs = []
    for rank in range(world):
        own = {"RANK": rank, "LOCAL_RANK": rank % local, "GROUP_RANK": rank // local}
        jobs.append(
            Job(argv, folder / f"rank{rank}", {k: str(v) for k, v in {**common, **own}.items()}, program, (strikes or {}).get(rank))
        )
    return jobs


def run_group(argv: Sequence[str], folder: Path, world: int = 2, nodes: int = 1, program: str = "train") -> list[int]:
    """Exit codes of :func:`group`."""
    jobs = group(argv, folder, world, nodes, program)
    codes = [job.wait() for job in jobs]
    if any(codes):
        print(*(job.text for job in jobs), sep="\n---\n")
    return codes


def write_without_pause(path: str) -> None:
    """Save one checkpoint after the other until killed."""
    import torch

    from explainer.tasks.saving import AtomicCheckpointIO

    number, writer = 0.0, AtomicCheckpointIO()
    while True:
        number += 1
        writer.save_checkpoint({"w": torch.full((300_000,), number)}, path)


def reduce_unevenly(rank: int, port: int, path: str) -> None:
    """Metrics of two processes of which the second has no batch, or one without ground truth; the results go into a file."""
    import json

    import torch

    from explainer.tasks.classifier_scores import nothing, scores
    from explainer.tasks.ranks import Means

    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    means, several, one = Means(), scores("multilabel", 2, "val"), scores("multiclass", 2, "val")
    if rank == 0:
        means.update({"loss": torch.tensor([1.0, 3.0]), "iou": torch.tensor([5.0, torch.nan])})
        several.update(torch.tensor([[2.0, -1.0], [-1.0, 2.0]]), torch.tensor([[1, 0], [0, 1]]))
        one.update(torch.tensor([[2.0, -1.0], [-1.0, 2.0]]), torch.tensor([0, 0]))
    else:
        means.update({"area": torch.tensor([3.0])})
        several.update(*nothing("multilabel", 2, torch.device("cpu")))
        one.update(*nothing("multiclass", 2, torch.device("cpu")))
    found = {name: float(value) for name, value in means.compute("cpu").items()}
    found |= {name: value.tolist() for name, value in several.compute().items()}
    found["accuracy"] = float(one.compute()["val/accuracy"])
    torch.distributed.destroy_process_group()
    Path(path).write_text(json.dumps(found))
