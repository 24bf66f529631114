"""Images per second of two processes with one thread each against one process with one thread, with the same batch in each process.

    python -m tests.benchmarks.bench_distributed [--config configs/explainer/shapes_small.yaml] [--classifier CKPT] [--rounds 3]
        [--steps 30] [--warmup 5] [--processes 2]

Real training steps under torchrun and gloo, alternating one and several processes; the median of the paired ratios is reported. It needs
as many free cores as processes: wall time is what counts here. Target for two processes: >= 1.7.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def worker(options: argparse.Namespace) -> None:
    """Train a few steps in this process; rank 0 writes the images per second of the whole group."""
    import pytorch_lightning as pl
    import torch

    from explainer.commands.building import build_task, data_module
    from explainer.commands.parsing import parse_run
    from explainer.lightning_internals import quiet_lightning
    from explainer.tasks.trainer import build_trainer

    torch.set_num_threads(1)
    quiet_lightning()
    steps = options.warmup + options.steps
    arguments = [
        "fit",
        "--config",
        options.config,
        "--run_dir",
        options.out,
        "--trainer.max_steps",
        str(steps),
        "--trainer.accelerator",
        "cpu",
        "--trainer.progress_bar",
        "false",
        "--logging.wandb",
        "off",
        "--evaluate_with",
        "null",
    ]
    _, run, _ = parse_run([*arguments, *(["--classifier.checkpoint", options.classifier] if options.classifier else [])])
    data = data_module(run)
    data.setup("fit")
    task = build_task(run, data)
    trainer = build_trainer(run, fitting=False)
    ends: list[float] = []

    class Clock(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            ends.append(time.perf_counter())

    trainer.callbacks.append(Clock())  # type: ignore[attr-defined]
    trainer.limit_val_batches = 0
    trainer.fit(task, data)
    if trainer.is_global_zero:
        seconds = ends[-1] - ends[options.warmup - 1]
        speed = run.data.batch_size * trainer.world_size * options.steps / seconds
        Path(options.result).write_text(json.dumps({"world": trainer.world_size, "speed": speed}))


def measure(world: int, argv: list[str], folder: Path) -> float:
    """Images per second of ``world`` processes."""
    result = folder / "speed.json"
    result.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(world),
        "-m",
        "tests.benchmarks.bench_distributed",
        *argv,
        "--out",
        str(folder / "run"),
        "--result",
        str(result),
    ]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found = json.loads(result.read_text())
    assert found["world"] == world, found
    return float(found["speed"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/explainer/shapes_small.yaml")
    parser.add_argument("--classifier")
    for name, value in (("rounds", 3), ("steps", 30), ("warmup", 5), ("processes", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.result:
        worker(options)
        return
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            one = measure(1, sys.argv[1:], Path(folder))
            several = measure(options.processes, sys.argv[1:], Path(folder))
            ratios.append(several / one)
            print(f"images/s: 1 process {one:.1f}, {options.processes} processes {several:.1f}, ratio {ratios[-1]:.2f}", flush=True)
    print(f"median of {options.rounds} paired ratios: {statistics.median(ratios):.2f} (target for two processes: >= 1.7)")


if __name__ == "__main__":
    main()
