"""What ``trainer.precision: auto`` chooses, against the best of all four combinations, over six networks.

    python -m tests.benchmarks.bench_precision [--size 224] [--batch 2] [--rounds 7] [--threads 1] [--archs NAME ...]

For each network the choice is made as ``fit`` makes it, and then all four combinations are timed in turn, round after round, so that a
drift of the machine's speed meets all alike. The ratio is the median over rounds of the chosen one's time to the time of that with the
least median. Target: at most 1.10 for every network. Random weights: the arithmetic does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import sys

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


def ratio(arch: str, size: int, batch: int, rounds: int) -> tuple[Combination, Combination, float, dict[Combination, float]]:
    """The choice, the best, the choice's ratio to it, and all medians in seconds."""
    task = ClassifyTask(ClassifierConfig(arch=arch), 20, "multilabel", tuple(f"c{i}" for i in range(20)), image_size=size)
    device = torch.device("cpu")
    native = native_precision("cpu") == "bf16-mixed"
    chosen, _ = measure(task, batch, size, device, [c for c in ALL if native or c.precision == "32-true"])
    run = timed_step(task, batch, size, device)
    for c in ALL:
        run(c)
    times: dict[Combination, list[float]] = {c: [] for c in ALL}
    for _ in range(rounds):
        for c in ALL:
            times[c].append(run(c))
    medians = {c: statistics.median(t) for c, t in times.items()}
    best = min(medians, key=lambda c: medians[c])
    return chosen, best, statistics.median(a / b for a, b in zip(times[chosen], times[best], strict=True)), medians


def main() -> int:
    """Print one line a network; the exit code says whether all are within the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--archs", nargs="+", default=list(ARCHS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    worst = 0.0
    print(f"| network | auto | best | ratio (target {TARGET:.2f}) | {' | '.join(map(str, ALL))} |\n|{'---|' * (4 + len(ALL))}")
    for arch in args.archs:
        chosen, best, value, medians = ratio(arch, args.size, args.batch, args.rounds)
        worst = max(worst, value)
        print(f"| {arch} | {chosen} | {best} | {value:.2f} | {' | '.join(f'{medians[c]:.3f} s' for c in ALL)} |", flush=True)
    return int(worst > TARGET)


if __name__ == "__main__":
    sys.exit(main())
