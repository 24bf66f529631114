"""How well every method finds planted evidence in one trained network of each kind: pointing game and pixel AUC.

    python -m tests.benchmarks.bench_planted [--images 96]

Prints the table of docs/results/planted.md. The networks are those of tests/contracts/planted.py, trained in a minute; refused: a dash.
"""

from __future__ import annotations

import argparse
import time

import torch

from explainer import plugins
from explainer.errors import ExplainerError
from tests.contracts.planted import NETWORKS, found, held_out, scenes, trained


def cell(name: str, family: str, count: int) -> str:
    """``pointing / AUC`` in percent."""
    try:
        own = found(name, family, count)
    except ExplainerError:
        return "-"
    return f"{100 * own.pointing:.0f} / {100 * own.ranking:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96)
    count = parser.parse_args().images
    torch.set_num_threads(1)
    images, labels, _ = scenes(512, torch.Generator().manual_seed(5))
    head = []
    for family in NETWORKS:
        began = time.perf_counter()
        classifier = trained(family)
        seconds = time.perf_counter() - began
        right = ((classifier(images) > 0) == (labels > 0)).double().mean().item()
        head.append(f"{family}: {seconds:.0f} s of training, {100 * right:.1f} % of the labels right")
    print(*head, sep="\n")
    held_out(count)
    print("\n| | " + " | ".join(NETWORKS) + " |\n|" + "---|" * (len(NETWORKS) + 1))
    for name in sorted(plugins.discover("explainer.baselines")):
        if name not in ("constant", "ground_truth"):
            print(f"| `{name}` | " + " | ".join(cell(name, family, count) for family in NETWORKS) + " |", flush=True)


if __name__ == "__main__":
    main()
