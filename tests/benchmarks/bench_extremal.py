"""Time, reward and memory of extremal and meaningful perturbation, paired and in one process: medians and ratios.

python -m tests.benchmarks.bench_extremal                                       # overhead and batching, VGG-16 geometry at 224 px
python -m tests.benchmarks.bench_extremal --part schedules --classifier CKPT --data shapes --images 20   # fast against 800 iterations

Photographs: --data voc --data-option root=FOLDER --data-option 'class_names=[sky, building, ...]' --size 96.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import yaml
from torch import Tensor

from explainer import plugins
from explainer.baselines.extremal_perturbation import ExtremalPerturbation
from explainer.baselines.meaningful_perturbation import MeaningfulPerturbation
from explainer.models.checkpoints import load_explanandum
from explainer.models.explanandum import Explanandum


def clock(device: torch.device) -> float:
    """Seconds, once the device has finished what it was given; on the CPU its own seconds, which other programs do not lengthen."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_mib(device: torch.device) -> float:
    """Peak memory so far: of the device where it counts, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def timed(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    began = clock(device)
    result = function()
    return clock(device) - began, result


def own_pass(explanandum: Explanandum, images: Tensor) -> None:
    """The classifier's own forward and backward to its input."""
    leaf = images.clone().requires_grad_()
    torch.autograd.grad(explanandum(leaf)[:, 0].sum(), leaf)


def overhead(explanandum: Explanandum, images: Tensor, iterations: int, rounds: int, device: torch.device) -> None:
    """Time per iteration over the time of the same classifier passes alone, alternating, median over rounds."""
    methods: dict[str, tuple[Callable[[int], Any], int]] = {
        "extremal, 6 areas": (lambda n: ExtremalPerturbation(explanandum, AREAS, iterations=n, schedule="code", jitter=False), 6),
        "extremal, hybrid, 3 areas": (
            lambda n: ExtremalPerturbation(explanandum, AREAS[:3], game="hybrid", iterations=n, schedule="code"),
            6,
        ),
        "meaningful": (lambda n: MeaningfulPerturbation(explanandum, iterations=n, init=1.0), 1),
    }
    for label, (make, rows) in methods.items():
        batch = images.repeat_interleave(rows, 0)
        own_pass(explanandum, batch)
        before, ratios, each = peak_mib(device), [], []
        for _ in range(rounds):
            alone = statistics.median(timed(lambda batch=batch: own_pass(explanandum, batch), device)[0] for _ in range(iterations))
            # The difference of a long and a short run leaves out what is done once per image.
            short, _ = timed(lambda make=make: make(1).masks(images, 0), device)
            long, _ = timed(lambda make=make: make(1 + iterations).masks(images, 0), device)
            ratios.append((long - short) / iterations / alone)
            each.append((alone, short))
        ratio, alone = statistics.median(ratios), statistics.median(a for a, _ in each)
        print(
            f"overhead | {label:26} | {len(batch)} rows | own passes {alone * 1e3:8.1f} ms | iteration / own passes {ratio:.3f} | "
            f"once per call {statistics.median(s for _, s in each):.2f} s | peak {before:.0f} -> {peak_mib(device):.0f} MiB",
            flush=True,
        )


def batching(explanandum: Explanandum, images: Tensor, iterations: int, rounds: int, device: torch.device) -> None:
    """Six areas (and all images) in one batch against one by one."""
    ratios = []
    for _ in range(rounds):
        together, _ = timed(lambda: ExtremalPerturbation(explanandum, AREAS, iterations=iterations).masks(images, 0), device)
        apart = 0.0
        for image in images.split(1):
            for area in AREAS:
                method = ExtremalPerturbation(explanandum, [area], iterations=iterations)
                apart += timed(lambda method=method, image=image: method.masks(image, 0), device)[0]
        ratios.append(together / apart)
    print(f"batching | {len(images)} images x {len(AREAS)} areas | one batch / one by one {statistics.median(ratios):.3f}", flush=True)


def schedules(
    explanandum: Explanandum, images: Tensor, index: Tensor, areas: tuple[float, ...], options: dict[str, Any], device: torch.device
) -> None:
    """``fast`` against the 800 published iterations with the same masks, blur and areas: reward, area and time, paired by image."""
    differences, ratios, sizes, wins = [], [], [], []
    for image, target in zip(images.split(1), index.split(1), strict=True):
        found, seconds = {}, {}
        for name in ("fast", "code"):
            method = ExtremalPerturbation(explanandum, areas, schedule=name, **options)
            seconds[name], found[name] = timed(lambda method=method, i=image, k=target: method.masks(i, k), device)
        gain = (found["fast"].rewards - found["code"].rewards).flatten().cpu()
        differences.append(gain)
        wins.append((gain >= 0).float().mean().item())
        ratios.append(seconds["code"] / seconds["fast"])
        sizes.append((found["fast"].masks.mean((2, 3)) - found["code"].masks.mean((2, 3))).flatten().cpu())
        print(f"  image {len(ratios)}: median reward difference {gain.median():+.3f}, {ratios[-1]:.1f} x faster", flush=True)
    difference, area = torch.stack(differences), torch.stack(sizes)
    per_area = ", ".join(f"{a:g}: {d:+.3f}" for a, d in zip(areas, difference.median(0).values.tolist(), strict=True))
    print(
        f"schedules | {len(images)} images | reward fast - code: median {difference.median():+.4f}, mean {difference.mean():+.4f}, "
        f"not lower in {100 * statistics.mean(wins):.0f} % | by area {per_area} | mask mean fast - code: median {area.median():+.4f} | "
        f"code / fast time: median {statistics.median(ratios):.1f}",
        flush=True,
    )


AREAS = (0.025, 0.05, 0.1, 0.2, 0.4, 0.6)


def load_images(arguments: argparse.Namespace, explanandum: Explanandum) -> tuple[Tensor, Tensor]:
    """Images with a class each: the data set's test images and their first class, or noise and class 0."""
    if arguments.data is None:
        generator = torch.Generator().manual_seed(arguments.seed)
        images = torch.rand(arguments.images, 3, arguments.size, arguments.size, generator=generator)
        return images, torch.zeros(arguments.images, dtype=torch.long)
    options = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in arguments.data_option)}
    dataset = plugins.build("explainer.data", arguments.data, split="test", size=arguments.size, **options)
    samples = [dataset[k] for k in range(arguments.images)]
    targets = torch.stack([torch.as_tensor(s.target) for s in samples])
    return torch.stack([s.image for s in samples]), targets.argmax(1)


def main() -> None:
    """Parse arguments, measure, print one line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["overhead", "batching", "schedules", "all"], default="overhead")
    parser.add_argument("--classifier", help="checkpoint; default: random weights")
    parser.add_argument("--arch", default="vgg16", help="without a checkpoint of this project")
    parser.add_argument("--num-classes", type=int, default=20)
    parser.add_argument("--data", help="data set plug-in; default: noise images")
    parser.add_argument("--data-option", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--areas", type=float, nargs="+", default=list(AREAS), help="of the schedules part")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--iterations", type=int, default=3, help="of the overhead and batching parts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--game", default="preserve")
    parser.add_argument("--perturbation", default="blur")
    parser.add_argument("--step", type=int, help="mask grid of both schedules; default: 1/32 of the side")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments.seed)  # the weights of a classifier without checkpoint
        explanandum = load_explanandum(arguments.classifier, arguments.arch, num_classes=arguments.num_classes).to(device)
    images, index = (t.to(device) for t in load_images(arguments, explanandum))
    if arguments.part in ("overhead", "all"):
        overhead(explanandum, images, arguments.iterations, arguments.rounds, device)
    if arguments.part in ("batching", "all"):
        batching(explanandum, images, arguments.iterations, arguments.rounds, device)
    if arguments.part in ("schedules", "all"):
        explanandum.to(memory_format=torch.channels_last)
        step = arguments.step or max(1, round(arguments.size / 32))
        options = {
            "game": arguments.game,
            "perturbation": arguments.perturbation,
            "step": step,
            "sigma": 3 * step,
            "max_blur": 20 * arguments.size / 224,
        }
        schedules(explanandum, images, index, tuple(arguments.areas), options, device)


if __name__ == "__main__":
    main()
