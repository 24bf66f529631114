"""How well every method finds planted evidence in one trained network of each kind: pointing game and pixel AUC.

    python -m tests.benchmarks.bench_planted [--images 96] [--methods lrp full_grad ...] [--families "ConvNeXt (torchvision)" ...]

Prints the table of docs/results/planted.md, or what is asked for of it. The networks are those of tests/contracts/planted.py, trained in a
minute. A dash: refused. An asterisk: it runs and does not find the evidence, being no better than the centre and a random map by 10 points.
"""

from __future__ import annotations

import argparse
import time

import torch

from explainer import plugins
from explainer.errors import ExplainerError
from tests.contracts.planted import MARGIN, NETWORKS, SANITY, found, held_out, rivals, scenes, trained

METHODS = plugins.discover("explainer.baselines")


def cell(name: str, family: str, count: int) -> str:
    """``pointing / AUC`` in percent, and whether that is worth something."""
    try:
        own = found(name, family, count)
    except ExplainerError:
        return "-"
    weak = name not in SANITY and not own.beats(rivals(name, family, count), MARGIN)
    return f"{100 * own.pointing:.0f} / {100 * own.ranking:.0f}{'*' if weak else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--methods", nargs="+", default=[n for n in sorted(METHODS) if n not in ("constant", "ground_truth")])
    parser.add_argument("--families", nargs="+", default=list(NETWORKS), choices=list(NETWORKS), metavar="FAMILY")
    options = parser.parse_args()
    count, families = options.images, options.families
    torch.set_num_threads(1)
    images, labels, _ = scenes(512, torch.Generator().manual_seed(5))
    head = []
    for family in families:
        began = time.perf_counter()
        classifier = trained(family)
        seconds = time.perf_counter() - began
        right = ((classifier(images) > 0) == (labels > 0)).double().mean().item()
        head.append(f"{family}: {seconds:.0f} s of training, {100 * right:.1f} % of the labels right")
    print(*head, sep="\n")
    held_out(count)
    print("\n| | " + " | ".join(families) + " |\n|" + "---|" * (len(families) + 1))
    for name in options.methods:
        print(f"| `{name}` | " + " | ".join(cell(name, family, count) for family in families) + " |", flush=True)


if __name__ == "__main__":
    main()
