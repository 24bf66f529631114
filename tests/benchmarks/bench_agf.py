"""AGF against one forward and backward pass on VGG-16 (random weights, 224 px).

    python -m tests.benchmarks.bench_agf [--repeats 3] [--device cpu] [--side 224]

Prints the median of the paired ratios and the peak memory of each (CUDA allocator, or growth of the resident set on the CPU).
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
import warnings

import torch
import torchvision

from explainer.baselines.agf import AGF
from explainer.models.explanandum import Explanandum


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", type=int, default=224)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    explanandum = Explanandum(torchvision.models.vgg16(weights=None), 1000).to(chosen.device)
    images = torch.rand(1, 3, chosen.side, chosen.side, device=chosen.device)
    method = AGF(explanandum)

    def reference() -> None:
        x = images.clone().requires_grad_()
        torch.autograd.grad(explanandum(x)[:, 0].sum(), x)

    clock = time.process_time if chosen.device == "cpu" else time.perf_counter

    def seconds(work) -> float:
        start = clock()
        work()
        if chosen.device != "cpu":
            torch.cuda.synchronize()
        return clock() - start

    peaks = []
    for work in (reference, lambda: method(images, 0)):  # also warms up
        if chosen.device == "cpu":
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            work()
            peaks.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
        else:
            torch.cuda.reset_peak_memory_stats()
            work()
            peaks.append(torch.cuda.max_memory_allocated() / 2**20)
    pairs = [(seconds(reference), seconds(lambda: method(images, 0))) for _ in range(chosen.repeats)]
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"forward+backward {statistics.median(a for a, _ in pairs):.3f} s, AGF {statistics.median(b for _, b in pairs):.3f} s")
    print(f"median paired ratio {ratio:.2f} (target <= 6)")
    print(f"peak memory: forward+backward {peaks[0]:.0f} MiB, AGF {peaks[1]:.0f} MiB" + (" beyond it" if chosen.device == "cpu" else ""))


if __name__ == "__main__":
    main()
