"""Where the time of a training batch goes: read, decode, resize, augment, masks, collate; cached or not; by number of workers.

    python -m tests.benchmarks.bench_data [--root FOLDER --classes a,b,c] [--size 224] [--images 200]

Without ``--root`` it writes photographs of VOC's size (500 x 375 JPEG with palette masks) to a temporary folder. It prints one
Markdown table per question; compare rows of one run only, as the machine's load (printed) moves all of them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from explainer.data.contract import collate
from explainer.data.datamodule import DataModule
from explainer.data.decoding import read_image, read_label_map
from explainer.data.transforms import Augmentation, resize_image, resize_masks
from explainer.data.voc import Voc
from tests.factories import NAMES, make_voc


def milliseconds(work: Callable[[int], Any], count: int, repeats: int = 3) -> float:
    """CPU time per item, best of ``repeats``: processor time and not the clock, so that other programs disturb less."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        for i in range(count):
            work(i)
        best = min(best, (time.process_time() - start) / count)
    return 1000 * best


def photographs(root: Path, count: int) -> None:
    """VOC-sized JPEGs with smooth content, so that they compress like photographs."""
    drawn = make_voc(root, counts=(count, 2, 2), height=375, width=500)
    for i, d in enumerate(drawn):
        noise = torch.randint(0, 256, (12, 16, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).resize((500, 375), Image.Resampling.BICUBIC).save(d.path, quality=90)


def stages(data: Voc, count: int) -> list[tuple[str, float]]:
    """Milliseconds per image of each stage, the others taken out."""
    paths = [r.image for r in data.records[:count]]
    images = [read_image(p) for p in paths]
    maps = [read_label_map(r.mask)[None] for r in data.records[:count] if r.mask is not None]
    standard = Augmentation.parse("standard")
    work = standard.working_size(data.size)
    small, layers = [resize_image(i, work) for i in images], [resize_masks(m, work) for m in maps]
    samples = [data[i] for i in range(16)]
    return [
        ("read the file", milliseconds(lambda i: paths[i].read_bytes(), count)),
        ("decode the image (with reading)", milliseconds(lambda i: read_image(paths[i]), count)),
        ("resize the image", milliseconds(lambda i: resize_image(images[i], data.size), count)),
        ("decode the mask", milliseconds(lambda i: read_label_map(data.records[i].mask), len(maps))),  # type: ignore[arg-type]
        ("augment, standard", milliseconds(lambda i: standard(small[i], None, data.size, data.generator(i)), count)),
        ("augment, standard, with masks", milliseconds(lambda i: standard(small[i], layers[i], data.size, data.generator(i)), len(maps))),
        ("whole sample with masks", milliseconds(lambda i: data[i], count)),
        ("collate a batch of 16, per image", milliseconds(lambda i: collate(samples), 5) / 16),
    ]


def throughput(options: dict[str, Any], train: dict[str, Any], workers: int) -> float:
    """Images per second of the second epoch (the cache is warm, the workers run)."""
    data = DataModule("voc", batch_size=16, num_workers=workers, options=options, train_options=train)
    loader = data.train_dataloader()
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        start, images = time.perf_counter(), 0
        for batch in loader:
            images += len(batch)
    return images / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root")
    parser.add_argument("--classes", default="")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.root is None:
            photographs(Path(folder), arguments.images)
        names = arguments.classes.split(",") if arguments.classes else list(NAMES)
        options = {"root": arguments.root or folder, "class_names": names, "size": arguments.size}
        data = Voc(split="train", **options)
        count = min(arguments.images, len(data))
        height, width = data.original_size(0)
        print(f"{count} images of {width} x {height}, size {arguments.size}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
        print("| stage | CPU ms per image |\n|---|---:|")
        for label, value in stages(data, count):
            print(f"| {label} | {value:.2f} |")
        print("\n| training loader, second epoch | workers | images/s |\n|---|---:|---:|")
        for label, train in (
            ("masks, no augmentation", {}),
            ("no masks, no augmentation", {"masks": False}),
            ("no masks, augment standard", {"masks": False, "augment": "standard"}),
            ("no masks, augment standard, cache ram", {"masks": False, "augment": "standard", "cache": "ram"}),
            ("no masks, no augmentation, cache ram", {"masks": False, "cache": "ram"}),
        ):
            for workers in arguments.workers:
                print(f"| {label} | {workers} | {throughput(options, train, workers):.0f} |")
        print(f"\nload {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
