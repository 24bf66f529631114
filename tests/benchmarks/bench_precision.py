"""What ``trainer.precision: auto`` chooses, against the best of all four combinations, over six networks.

    python -m tests.benchmarks.bench_precision [--size 224] [--batch 8] [--rounds 7] [--threads 1] [--archs NAME ...]

For each network the choice is made as ``fit`` makes it, and then all four combinations are timed in turn with the whole batch, round
after round, so that a drift of the machine's speed meets all alike; one thread by its own clock. The ratio is the median over rounds of
the chosen one's time to the time of that with the least median; the seconds behind the choice are what making it took. Target: at most
1.10 for every network. Random weights: the arithmetic does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import NamedTuple

import torch

from explainer.config import ClassifierConfig
from explainer.tasks.classify import ClassifyTask
from explainer.tasks.precision import ALL, Combination, measure, timed_step
from explainer.tasks.trainer import native_precision

ARCHS = (
    "torchvision:vgg16",
    "torchvision:resnet50",
    "timm:tf_efficientnet_lite0",
    "torchvision:mobilenet_v3_large",
    "timm:convnext_tiny",
    "timm:vit_small_patch16_224",
)
TARGET = 1.10


class Choice(NamedTuple):
    """What was chosen in how many seconds, the best, the choice's ratio to it, and all medians in seconds."""

    chosen: Combination
    took: float
    best: Combination
    ratio: float
    medians: dict[Combination, float]


def ratio(arch: str, size: int, batch: int, rounds: int) -> Choice:
    """Make the choice, and time all four."""
    task = ClassifyTask(ClassifierConfig(arch=arch), 20, "multilabel", tuple(f"c{i}" for i in range(20)), image_size=size)
    device = torch.device("cpu")
    native = native_precision("cpu") == "bf16-mixed"
    start = time.perf_counter()
    chosen, _ = measure(task, batch, size, device, [c for c in ALL if native or c.precision == "32-true"])
    took = time.perf_counter() - start
    run = timed_step(task, batch, size, device)
    for c in ALL:
        run(c)
    times: dict[Combination, list[float]] = {c: [] for c in ALL}
    for _ in range(rounds):
        for c in ALL:
            times[c].append(run(c))
    medians = {c: statistics.median(t) for c, t in times.items()}
    best = min(medians, key=lambda c: medians[c])
    return Choice(chosen, took, best, statistics.median(a / b for a, b in zip(times[chosen], times[best], strict=True)), medians)


def main() -> int:
    """Print one line a network; the exit code says whether all are within the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--archs", nargs="+", default=list(ARCHS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    worst = 0.0
    print(f"| network | auto | best | ratio (target {TARGET:.2f}) | {' | '.join(map(str, ALL))} |\n|{'---|' * (4 + len(ALL))}")
    for arch in args.archs:
        found = ratio(arch, args.size, args.batch, args.rounds)
        worst = max(worst, found.ratio)
        medians = " | ".join(f"{found.medians[c]:.3f} s" for c in ALL)
        print(f"| {arch} | {found.chosen} ({found.took:.0f} s) | {found.best} | {found.ratio:.2f} | {medians} |", flush=True)
    return int(worst > TARGET)


if __name__ == "__main__":
    sys.exit(main())
