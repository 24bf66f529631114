"""The fill ``blur``, one axis after the other, against torchvision's two at once: processor time, paired.

python -m tests.benchmarks.bench_blur [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torchvision.transforms.v2 import functional as tvf

from explainer.fills import gaussian_blur, make_fill


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    o = parser.parse_args()
    torch.set_num_threads(1)
    print("| picture | both axes at once, s | one after the other, s | ratio (range) |\n|---|---:|---:|---:|")
    for height, width in ((64, 64), (224, 224), (384, 256)):
        images, sigma = torch.rand(2, 3, height, width), 0.09 * min(height, width)
        radius = min(int(3 * sigma + 0.5), min(height, width) - 1)
        edge = 2 * radius + 1
        assert torch.equal(make_fill(images, "blur"), gaussian_blur(images, radius, sigma)), "the fill is what is measured"
        pairs = []
        for _ in range(o.rounds + 1):  # the first one is left out
            both = seconds(lambda: tvf.gaussian_blur(images, [edge, edge], [sigma, sigma]))  # noqa: B023
            pairs.append((both, seconds(lambda: make_fill(images, "blur"))))  # noqa: B023
        pairs = pairs[1:]
        ratios = [a / b for a, b in pairs]
        together, apart = (statistics.median(p[i] for p in pairs) / 2 for i in (0, 1))
        found = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        print(f"| {height} x {width} | {together:.4f} | {apart:.4f} | {found} |")


if __name__ == "__main__":
    main()
