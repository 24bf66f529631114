"""Iterations that extremal perturbation needs from the Explainer's mask, compared with its start from scratch, at equal final quality.

    python -m tests.benchmarks.bench_refinement --model runs/shapes_quickstart/checkpoints/best.ckpt
        --classifier runs/shapes_classifier/checkpoints/best.ckpt [--data-name shapes] [--data "{size: 64}"] [--images 50]
        [--schedule fast] [--iterations 140] [--counts 1 2 4 8 15 30 60]

From scratch means the schedule's own start (all ones for ``code`` and ``paper``; almost that for ``fast``; --scratch ones forces all
ones). Its result after --iterations is the reference. The Explainer's mask starts searches of each of --counts iterations; per image, the
first that reaches the reference in the EP objective (reward - weight x area penalty, judged at the end of the schedule), in the IoU with
the ground truth and in insertion - deletion is reported, as are all three means per count. Target: a median of at most 1/5.
"""

from __future__ import annotations

import argparse
import statistics

import torch
import yaml
from torch import Tensor

import explainer
from explainer import baselines
from explainer.baselines.kernels.extremal_game import make_schedule
from explainer.baselines.kernels.smooth_mask import area_penalty, excluded
from explainer.data.contract import collate
from explainer.data.datamodule import DataModule
from explainer.inference.refinement import _AREAS, _groups, extremal_start, quality, starting_masks
from explainer.metrics.segmentation import soft_iou
from explainer.models.checkpoints import load_explanandum

MEASURES = ("objective", "iou", "insertion_deletion", "quality")


def judge(
    explanandum, method, images: Tensor, masks: Tensor, rewards: Tensor, index: Tensor, truth: Tensor, area: float
) -> dict[str, Tensor]:
    """The four measures, ``[B]`` each; larger is better."""
    pixels = masks.shape[-2] * masks.shape[-1]
    penalty = area_penalty(masks, excluded(pixels, [area] * len(masks), masks.device))
    weight = method.schedule.weight(method.schedule.iterations)
    return {
        "objective": rewards - weight * penalty,
        "iou": soft_iou(masks, truth),
        "insertion_deletion": insertion_deletion(explanandum, images, masks, index),
        "quality": quality(explanandum, images, masks, index).score,
    }


@torch.no_grad()
def insertion_deletion(explanandum, images: Tensor, maps: Tensor, index: Tensor, steps: int = 10) -> Tensor:
    """Mean probability while the highest pixels are shown first, minus that while they are removed first, ``[B]``."""
    rank = maps.flatten(1).argsort(dim=1, descending=True).argsort(dim=1).view_as(maps) / maps[0].numel()
    mean = explanandum.mean.to(images).view(1, -1, 1, 1)
    total = torch.zeros(len(images), dtype=images.dtype)
    for step in range(steps + 1):
        top = (rank < step / steps).unsqueeze(1)
        for shown, sign in ((torch.where(top, images, mean), 1), (torch.where(top, mean, images), -1)):
            p = explanandum.probabilities(explanandum(shown)).gather(1, index[:, None]).squeeze(1)
            total += sign * p / (steps + 1)
    return total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--data-name", default="shapes")
    parser.add_argument("--data", default="{size: 64}")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--schedule", default="fast", choices=("fast", "code", "paper"))
    parser.add_argument("--scratch", default="schedule", choices=("schedule", "ones"))
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8, 15, 30, 60])
    chosen = parser.parse_args()
    explanandum, net = load_explanandum(chosen.classifier), explainer.load(chosen.model)
    dataset = DataModule(chosen.data_name, 2, options=yaml.safe_load(chosen.data)).dataset("test")
    samples = [s for s in (dataset[i] for i in range(min(len(dataset), 2 * chosen.images))) if s.target.any()][: chosen.images]
    batch = collate(samples)
    index = batch.targets.argmax(dim=1)
    if batch.masks is None:
        raise SystemExit("the data set has no ground-truth masks")
    start, truth = starting_masks(net, batch.images, index), batch.masks[torch.arange(len(index)), index]
    full = chosen.iterations or make_schedule(chosen.schedule).iterations
    scores: dict[int, dict[str, Tensor]] = {}
    reference = {name: torch.zeros(len(index)) for name in MEASURES}
    for area, rows in _groups(start, _AREAS):
        images, labels = batch.images[rows], index[rows]
        for count in (0, *chosen.counts):
            iterations = full if count == 0 else count
            method = baselines.build(
                "extremal_perturbation", explanandum, areas=[area], schedule=chosen.schedule, iterations=iterations, tolerance=0.0
            )
            scratch = 1.0 if chosen.scratch == "ones" else None
            found = method.masks(images, labels, init=scratch if count == 0 else extremal_start(method, images, start[rows]))
            values = judge(explanandum, method, images, found.masks[:, 0], found.rewards[:, 0], labels, truth[rows], area)
            target = reference if count == 0 else scores.setdefault(count, {name: torch.zeros(len(index)) for name in MEASURES})
            for name, value in values.items():
                target[name][rows] = value.to(target[name])
    print(f"{'':14}" + "".join(f"{name:>20}" for name in MEASURES))
    print(f"{'scratch':8}{full:5} " + "".join(f"{reference[name].mean().item():20.4f}" for name in MEASURES))
    for count in chosen.counts:
        print(f"{'explainer':8}{count:4} " + "".join(f"{scores[count][name].mean().item():20.4f}" for name in MEASURES))
    for name in MEASURES:
        first = [
            next((count for count in chosen.counts if scores[count][name][i] >= reference[name][i] - 1e-6), full) for i in range(len(index))
        ]
        share = statistics.median(first) / full
        print(f"{name:20} median iterations to reach scratch's: {statistics.median(first):.0f} of {full} = {share:.2f} (target <= 0.20)")


if __name__ == "__main__":
    main()
