"""Does a training step's cost grow with the number of classes? One step of the same network with K = 20 and K = 1000, in turn.

    python -m tests.benchmarks.bench_classes --repeats 5

Times are medians of pairs measured one after the other in one process; memory is the peak of a process of its own for each K.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from explainer.config import MaskingConfig
from explainer.models.classifiers import build_classifier
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum
from explainer.tasks.explain import ExplainTask
from explainer.tensors import Batch

LOSSES = {
    "classification": {},
    "entropy": {},
    "target_area": {"weight": 0.1},
    "non_target_area": {"weight": 0.3},
    "area_bound": {"min_area": 0.05, "max_area": 0.3},
    "total_variation": {},
}


def task_of(classes: int, encoder: str, absent: int) -> ExplainTask:
    """An Explainer of an EfficientNet-Lite0 with random weights."""
    torch.manual_seed(0)
    e = Explanandum(build_classifier("efficientnet_lite0", classes), classes, "multiclass", mean=[0.5] * 3, std=[0.5] * 3)
    if encoder == "shared":
        net = Explainer("fpn", classes, {}, image_size=224, encoder="shared", explanandum=e)
    else:
        net = Explainer("deeplabv3plus", classes, {"encoder_name": "tu-mobilenetv3_large_100"}, image_size=224)
    return ExplainTask(net, e, LOSSES, MaskingConfig(absent_classes=absent))


def step(task: ExplainTask, classes: int, batch: int) -> float:
    """Seconds of one forward and backward pass of all losses."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, 224, 224, generator=generator)
    targets = torch.nn.functional.one_hot(torch.arange(batch) % classes, classes).float()
    start = time.perf_counter()
    e = task._explanation(Batch(images, targets, ids=tuple(map(str, range(batch)))), "train")
    loss = sum(term.value(e) for term in task.terms.values())
    loss.backward()
    return time.perf_counter() - start


def peak_mib() -> float:
    """Peak resident memory of this process. Linux's ru_maxrss would count the parent's, from before the new program was loaded."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main() -> None:
    """Print both ratios for each encoder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--absent", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--encoders", nargs="+", default=["own", "shared"])
    parser.add_argument("--alone", help="internal: ENCODER:K, prints the peak memory in MiB")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if a.alone:
        encoder, _, classes = a.alone.partition(":")
        task = task_of(int(classes), encoder, a.absent)
        for _ in range(2):
            step(task, int(classes), a.batch)
        print(peak_mib())
        return
    for encoder in a.encoders:
        tasks = {k: task_of(k, encoder, a.absent) for k in (20, 1000)}
        for k, task in tasks.items():
            step(task, k, a.batch)
        pairs = [[step(task, k, a.batch) for k, task in tasks.items()] for _ in range(a.repeats)]
        memory = []
        for k in tasks:
            command = [sys.executable, "-m", "tests.benchmarks.bench_classes", "--alone", f"{encoder}:{k}"]
            command += ["--batch", str(a.batch), "--absent", str(a.absent), "--threads", str(a.threads)]
            memory.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        ratios = [many / few for few, many in pairs]
        print(
            f"{encoder} encoder, batch {a.batch}, {a.absent} absent classes: K = 20 {statistics.median(p[0] for p in pairs):.2f} s, "
            f"K = 1000 {statistics.median(p[1] for p in pairs):.2f} s, ratio {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}); peak memory {memory[0]:.0f} and {memory[1]:.0f} MiB, "
            f"ratio {memory[1] / memory[0]:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
