"""Freed memory that the process keeps, as the command line does it, against glibc's own ways: a classifier's passes on a CPU.

    python -m tests.benchmarks.bench_pages [--arch efficientnet_lite0] [--size 384 256] [--batches 1 16 64] [--rounds 3]

Each measurement is a process of its own, with and without in turn. Processor time of one thread (the system's part, which handles page
faults, in brackets) and peak memory.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys

from explainer.commands.memory import keep_memory


def measured(arch: str, height: int, width: int, batch: int, keep: bool) -> None:
    """Print seconds an image (all, system) of forward and backward to the input, and the peak of this process in MiB."""
    if keep:
        assert keep_memory()
    import torch

    from explainer.models.classifiers import build_classifier

    torch.set_num_threads(1)
    model = build_classifier(arch, 10).eval().requires_grad_(False)
    images = torch.rand(batch, 3, height, width).requires_grad_()
    for counted in (False, True):
        before = resource.getrusage(resource.RUSAGE_SELF)
        model(images).sum().backward()
        after = resource.getrusage(resource.RUSAGE_SELF)
        if counted:
            system = after.ru_stime - before.ru_stime
            print((system + after.ru_utime - before.ru_utime) / batch, system / batch, after.ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="efficientnet_lite0")
    parser.add_argument("--size", type=int, nargs=2, default=[384, 256])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.one is not None:
        measured(o.arch, *o.size, o.one[0], bool(o.one[1]))
        return
    print("| images at once | s an image without (system) | with (system) | ratio (range) | peak MiB without, with |")
    print("|---|---:|---:|---:|---:|")
    for batch in o.batches:
        found: dict[str, list[list[float]]] = {"0": [], "1": []}
        for _ in range(o.rounds):
            for value, rows in found.items():
                command = [sys.executable, "-m", "tests.benchmarks.bench_pages", "--arch", o.arch, "--size", *map(str, o.size)]
                done = subprocess.run([*command, "--one", str(batch), value], check=True, capture_output=True, text=True)
                rows.append([float(x) for x in done.stdout.split()[-3:]])
        without, with_ = ([statistics.median(column) for column in zip(*found[v], strict=True)] for v in ("0", "1"))
        ratios = [a[0] / b[0] for a, b in zip(found["0"], found["1"], strict=True)]
        print(
            f"| {batch} | {without[0]:.3f} ({without[1]:.3f}) | {with_[0]:.3f} ({with_[1]:.3f}) | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {without[2]:.0f}, {with_[2]:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
