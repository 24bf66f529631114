"""AGF against one forward and backward pass on VGG-16 (random weights, 224 px).

    python -m tests.benchmarks.bench_agf [--repeats 3] [--device cpu] [--side 224]

Prints the median of the paired ratios and the peak memory of each. CPU seconds are the process's own, so other jobs do not count.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import torch
import torchvision

from explainer.baselines.agf import AGF
from explainer.models.explanandum import Explanandum
from tests.benchmarks.bench_srd import peak_mib


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

    reference(), method(images, 0)  # warm up
    peaks = [peak_mib(work, chosen.device) for work in (reference, lambda: method(images, 0))]
    pairs = [(seconds(reference), seconds(lambda: method(images, 0))) for _ in range(chosen.repeats)]
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"forward+backward {statistics.median(a for a, _ in pairs):.3f} s, AGF {statistics.median(b for _, b in pairs):.3f} s")
    print(f"median paired ratio {ratio:.2f} (target <= 3.5)")
    print(f"peak memory above the classifier: forward+backward {peaks[0]:.0f} MiB, AGF {peaks[1]:.0f} MiB")


if __name__ == "__main__":
    main()
