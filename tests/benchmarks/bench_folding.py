"""Masked passes through a classifier whose batch norms are folded into its convolutions, against the classifier as it is.

    python -m tests.benchmarks.bench_folding [--size 224] [--batch 8] [--rounds 5] [--threads 1] [--archs NAME ...]

Forward and backward to the image, as a training step of the Explainer does; both in turn, round after round, one thread by its own clock.
The ratio is the median over rounds of plain to folded. Random weights with batch statistics drawn at random: the arithmetic does not
depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator

import torch
from torch import nn

from explainer import Explanandum
from explainer.models.classifiers import build_classifier
from explainer.models.folding import folded

ARCHS = ("timm:tf_efficientnet_lite0", "torchvision:resnet50", "torchvision:mobilenet_v3_large", "torchvision:vgg16_bn")


def explanandum(arch: str) -> Explanandum:
    """With batch statistics that are not those of a fresh network."""
    net = build_classifier(arch, 20)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return Explanandum(net, 20, "multilabel").requires_grad_(False)


def ratios(arch: str, size: int, batch: int, rounds: int) -> Iterator[tuple[str, float, float, float]]:
    """Memory layout, seconds of the plain and of the folded classifier, and their ratio: medians."""
    plain, images = explanandum(arch), torch.rand(batch, 3, size, size)
    other = folded(plain, images)
    if other is plain:
        raise SystemExit(f"{arch}: nothing is folded")
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for layout in (torch.contiguous_format, torch.channels_last):
        times: dict[str, list[float]] = {"plain": [], "folded": []}
        nets = {"plain": plain.to(memory_format=layout), "folded": other.to(memory_format=layout)}
        for _ in range(rounds + 1):
            for name, net in nets.items():
                x = images.to(memory_format=layout).requires_grad_()
                start = clock()
                net(x).logsumexp(1).sum().backward()
                times[name].append(clock() - start)
        a, b = (times[name][1:] for name in ("plain", "folded"))  # the first warms up
        ratio = statistics.median(p / f for p, f in zip(a, b, strict=True))
        yield str(layout).removeprefix("torch.").removesuffix("_format"), statistics.median(a), statistics.median(b), ratio


def main() -> int:
    """Print one line a network and layout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--archs", nargs="+", default=list(ARCHS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print("| network | layout | plain | folded | ratio |\n|---|---|---|---|---|")
    for arch in args.archs:
        for layout, plain, other, ratio in ratios(arch, args.size, args.batch, args.rounds):
            print(f"| {arch} | {layout} | {plain:.2f} s | {other:.2f} s | {ratio:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
