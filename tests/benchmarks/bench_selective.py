"""Selective explanation on images of the training's distribution and on shifted ones: are flagged masks worse, and does the bound hold?

    python -m tests.benchmarks.bench_selective --model runs/shapes_quickstart/checkpoints/best.ckpt
        --classifier runs/shapes_classifier/checkpoints/best.ckpt [--data-name shapes] [--data "{size: 64}"]
        [--other-name voc] [--other "{root: data/street, size: 64, class_names: [...]}"] [--images 300] [--alpha 0.05] [--least-iou 0.75]

A selector is calibrated on validation images (``marginal``: the share of explanations that are given and bad, IoU with the class's own
ground truth below --least-iou, stays within --alpha). It then judges test images as they are; with noise; with the colours inverted;
blurred; turned upside down (in that class, what the classifier learned may stand upside down); and images of other classes altogether
(--other), for the class that the classifier finds most, where no mask is right. Per kind: accepted share, bad share and mean IoU among
the accepted and the flagged, given-and-bad share. Last, calibration and test images of the distribution are pooled and split at random
200 times: the mean given-and-bad share, which the guarantee bounds by --alpha.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
import yaml
from torch import Tensor
from torchvision.transforms.v2 import functional as F

import explainer
from explainer.data.datamodule import DataModule
from explainer.inference.refinement import quality, starting_masks
from explainer.inference.selection import calibrate, truth_loss
from explainer.models.checkpoints import load_explanandum

Pair = tuple[Tensor, Tensor]
SHIFTS: dict[str, Callable[[Tensor, Tensor, torch.Generator], Pair]] = {
    "as they are": lambda x, m, g: (x, m),
    "noise": lambda x, m, g: ((x + 0.25 * torch.randn(x.shape, generator=g)).clamp(0, 1), m),
    "inverted": lambda x, m, g: (1 - x, m),
    "blurred": lambda x, m, g: (F.gaussian_blur(x, [9, 9], [2.0, 2.0]), m),
    "upside down": lambda x, m, g: (x.flip(-2), m.flip(-2)),
}


def batches(name: str, options: str, split: str, images: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """``(images, one label each drawn at random, its ground truth)``."""
    data = DataModule(name, 2, options=yaml.safe_load(options))
    generator = torch.Generator().manual_seed(0)
    length = len(data.dataset(split))
    spread = torch.linspace(0, length - 1, min(images, length)).long().tolist()  # neighbours may be of one place
    for batch in data.batches(split, [spread[i : i + 50] for i in range(0, len(spread), 50)]):
        rows = (batch.targets > 0.5).any(dim=1).nonzero()[:, 0]
        index = torch.multinomial(batch.targets[rows].float(), 1, generator=generator)[:, 0]
        yield batch.images[rows], index, batch.masks[rows, index]


def judged(net, explanandum, images: Tensor, index: Tensor, truth: Tensor) -> Tensor:
    """``[n,2]``: score, and IoU with the truth."""
    masks = starting_masks(net, images, index)
    return torch.stack([quality(explanandum, images, masks, index).score, 1 - truth_loss(masks, truth, None)], dim=1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--data-name", default="shapes")
    parser.add_argument("--data", default="{size: 64}")
    parser.add_argument("--other-name")
    parser.add_argument("--other", default="{}")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--least-iou", type=float, default=0.75)
    chosen = parser.parse_args()
    explanandum, net = load_explanandum(chosen.classifier), explainer.load(chosen.model)
    pool = torch.cat([judged(net, explanandum, *b) for b in batches(chosen.data_name, chosen.data, "val", chosen.images)])
    selector = calibrate(pool[:, 0], (pool[:, 1] < chosen.least_iou).float(), chosen.alpha)
    print(f"{len(pool)} calibration images, threshold {selector.threshold:.3f}, alpha {chosen.alpha}, bad: IoU below {chosen.least_iou}")
    generator = torch.Generator().manual_seed(0)
    found = {name: [] for name in SHIFTS}
    for images, index, truth in batches(chosen.data_name, chosen.data, "test", chosen.images):
        for name, shift in SHIFTS.items():
            moved, target = shift(images, truth, generator)
            found[name].append(judged(net, explanandum, moved, index, target))
    rows = {name: torch.cat(parts) for name, parts in found.items()}
    if chosen.other_name:
        parts = []
        for images, _, truth in batches(chosen.other_name, chosen.other, "test", chosen.images):
            parts.append(judged(net, explanandum, images, explanandum(images).argmax(dim=1), torch.zeros_like(truth)))
        rows["other classes"] = torch.cat(parts)
    report({**rows, "all together": torch.cat(list(rows.values()))}, selector.accepts, chosen.least_iou)
    pool = torch.cat([pool, rows["as they are"]])
    risks = []
    for _ in range(200):
        order = torch.randperm(len(pool), generator=generator)
        first, second = pool[order].chunk(2)
        once = calibrate(first[:, 0], (first[:, 1] < chosen.least_iou).float(), chosen.alpha)
        risks.append(float((once.accepts(second[:, 0]) & (second[:, 1] < chosen.least_iou)).float().mean()))
    print(f"200 random splits: given and bad {torch.tensor(risks).mean():.4f} of the images on average (bound {chosen.alpha})")


def report(rows: dict[str, Tensor], accepts: Callable[[Tensor], Tensor], least: float) -> None:
    """One line per kind of image."""
    names = ("images", "accepted", "given, bad", "bad | given", "bad | flagged", "IoU given", "IoU flagged")
    print(f"{'':16}" + "".join(f"{name:>15}" for name in names))
    for name, values in rows.items():
        given, bad = accepts(values[:, 0]), values[:, 1] < least
        numbers = (
            len(values),
            given.float().mean(),
            (given & bad).float().mean(),
            bad[given].float().mean(),
            bad[~given].float().mean(),
            values[given, 1].mean(),
            values[~given, 1].mean(),
        )
        print(f"{name:16}{numbers[0]:15d}" + "".join(f"{float(v):15.3f}" for v in numbers[1:]))


if __name__ == "__main__":
    main()
