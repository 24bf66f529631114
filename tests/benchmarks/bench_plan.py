"""The constants of the guide's cost model (docs/howto/plan.md), measured here, and how well it predicts 1, 2 and 4 processes.

    python -m tests.benchmarks.bench_plan [--parts steps memory cache] [--rounds 3] [--steps 12] [--batch 8] [--size 64]

steps: a step of W processes with b images each costs ``W (a + c b) + W g P`` seconds of processor time: ``a`` a step, ``c`` an image,
``g`` a megabyte of averaged gradients, of which there are ``P``. The constants come from one process at two batch sizes and from averaging
alone; the prediction is compared with real steps under DistributedDataParallel (gloo). Processor time is what is compared, because other
work on the machine hardly changes it; images per second on C free cores follow as ``W b min(W, C) / cost``. Wall time is printed too.

memory: bytes that a training step keeps for its backward pass, by image, and what parameters, gradients and Adam take. Counted at two batch
sizes, predicted for a third.

cache: bytes of a map in a map cache, by its type.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from explainer.attribution.map_cache import MapCache
from explainer.losses.base import total_loss
from explainer.tensors import Batch
from tests.benchmarks.bench_training import make_batch, make_task, stepper

WORLDS = (1, 2, 4)
TARGET = 0.15
PAIRS = {
    "ResNet-50": ("torchvision:resnet50", "resnet50"),
    "EfficientNet-Lite0": ("timm:tf_efficientnet_lite0", "timm-tf_efficientnet_lite0"),
}


def cost(world: int, batch: int, constants: dict[str, float]) -> float:
    """Seconds of processor time of one step of all processes together."""
    averaging = constants["g"] * constants["P"] if world > 1 else 0.0
    return world * (constants["a"] + constants["c"] * batch + averaging)


def images_per_second(world: int, batch: int, constants: dict[str, float], cores: int) -> float:
    """On so many free cores."""
    return world * batch * min(world, cores) / cost(world, batch, constants)


class Step(nn.Module):
    """The loss of a training step as a module, so that DistributedDataParallel can average its gradients. It logs nothing, which would
    need a Trainer.
    """

    def __init__(self, task: Any) -> None:
        super().__init__()
        self.task = task
        task.explanandum.requires_grad_(False)  # as the task does when a fit begins

    def forward(self, batch: Batch) -> torch.Tensor:
        return total_loss(self.task.terms, self.task._explanation(batch, "train"))[0]


def timed(step: Callable[[], object], steps: int) -> tuple[float, float]:
    """Median seconds of processor time (all threads of this process) and of wall time, after two untimed calls."""
    found = []
    for number in range(steps + 2):
        own, wall = time.process_time(), time.perf_counter()
        step()
        if number > 1:
            found.append((time.process_time() - own, time.perf_counter() - wall))
    return statistics.median(c for c, _ in found), statistics.median(w for _, w in found)


def member(rank: int, world: int, folder: str, o: argparse.Namespace, kind: str, batch: int) -> tuple[float, float]:
    """One process's part: a training step, or the averaging of as many numbers as there are gradients."""
    options = argparse.Namespace(
        network="vgg_unet", encoder="", arch="small_vgg", size=o.size, batch=batch, classes=6, labels=2, device="cpu"
    )
    task = make_task(options).train()
    if world > 1:
        store = distributed.FileStore(f"{folder}/store", world)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        if kind == "average":
            numbers = torch.zeros(sum(p.numel() for p in task.explainer.parameters()))
            return timed(lambda: distributed.all_reduce(numbers), o.steps)
        images = make_batch(options)
        step = Step(task)
        run = DistributedDataParallel(step) if world > 1 else step
        return timed(stepper(task, lambda: run(images)), o.steps)
    finally:
        if world > 1:
            distributed.destroy_process_group()


def apart(work: Callable[..., Any], *arguments: Any, world: int = 1) -> list[Any]:
    """What ``work(rank, *arguments)`` gives in ``world`` processes of their own, which share this one's imports."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def child(rank: int) -> None:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        answers.put((rank, work(rank, *arguments)))

    children = [context.Process(target=child, args=(rank,)) for rank in range(world)]
    for c in children:
        c.start()
    for c in children:
        c.join()
    if any(c.exitcode for c in children):
        raise SystemExit(f"a process ended with {[c.exitcode for c in children]}")
    return [value for _, value in sorted(answers.get() for _ in children)]


def group(o: argparse.Namespace, world: int, kind: str, batch: int) -> tuple[float, float]:
    """Processor seconds of all processes together, and the slowest one's wall time."""
    with tempfile.TemporaryDirectory() as folder:
        found = apart(member, world, folder, o, kind, batch, world=world)
    return sum(c for c, _ in found), max(w for _, w in found)


def parameters(_rank: int, o: argparse.Namespace) -> int:
    options = argparse.Namespace(network="vgg_unet", encoder="", arch="small_vgg", size=o.size, batch=2, classes=6, labels=2, device="cpu")
    return sum(p.numel() for p in make_task(options).explainer.parameters())


def steps(o: argparse.Namespace) -> None:
    """Rounds of constants and checks, one after the other, so that all meet the same load."""
    megabytes = 4 * apart(parameters, o)[0] / 1e6
    seen: dict[str, list[tuple[float, float]]] = {}
    for _ in range(o.rounds):
        for name, world, kind, batch in (
            ("half", 1, "train", o.batch // 2),
            ("whole", 1, "train", o.batch),
            ("average", 2, "average", o.batch),
            *((str(w), w, "train", o.batch) for w in WORLDS),
        ):
            seen.setdefault(name, []).append(group(o, world, kind, batch))
    cpu = {name: statistics.median(c for c, _ in values) for name, values in seen.items()}
    c = (cpu["whole"] - cpu["half"]) / (o.batch - o.batch // 2)
    constants = {"a": cpu["whole"] - c * o.batch, "c": c, "g": cpu["average"] / 2 / megabytes, "P": megabytes}
    print(f"a {1000 * constants['a']:.1f} ms/step, c {1000 * c:.2f} ms/image, g {1000 * constants['g']:.3f} ms/MB, P {megabytes:.2f} MB\n")
    print("| processes | CPU s a step, predicted | measured | difference | images/s on free cores, predicted | wall images/s now |")
    print("|---:|---:|---:|---:|---:|---:|")
    cores = os.cpu_count() or 1
    for world in WORLDS:
        predicted, measured = cost(world, o.batch, constants), cpu[str(world)]
        wall = statistics.median(w for _, w in seen[str(world)])
        print(
            f"| {world} | {predicted:.4f} | {measured:.4f} | {measured / predicted - 1:+.1%} | "
            f"{images_per_second(world, o.batch, constants, cores):.0f} | {world * o.batch / wall:.0f} |"
        )
    spread = {n: (max(x for x, _ in v) - min(x for x, _ in v)) / cpu[n] for n, v in seen.items()}
    print(f"\ntarget: within {TARGET:.0%}; spread of the rounds: {', '.join(f'{n} {s:.0%}' for n, s in spread.items())}")


def kept_bytes(_rank: int, arch: str, encoder: str, batch: int) -> tuple[float, float]:
    """Bytes kept for the backward pass of one step, each storage once, and of the Explainer's and the classifier's parameters."""
    options = argparse.Namespace(
        network="deeplabv3plus", encoder=encoder, arch=arch, size=224, batch=batch, classes=20, labels=2, device="cpu"
    )
    task, images = make_task(options).train(), make_batch(options)
    own = {p.untyped_storage().data_ptr() for p in task.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = Step(task)(images)
    assert loss.requires_grad
    trained = sum(p.numel() for p in task.explainer.parameters())
    frozen = sum(p.numel() for p in task.explanandum.parameters())
    return float(sum(seen.values())), 4.0 * (4 * trained + frozen)


def memory(_: argparse.Namespace) -> None:
    """Float32 at 224 px: bytes = fixed + image x batch."""
    print("| classifier, encoder of its own | weights, gradients, Adam | kept per image | predicted for 6 images | counted |")
    print("|---|---:|---:|---:|---:|")
    for name, (arch, encoder) in PAIRS.items():
        (two, fixed), (four, _), (six, _) = (apart(kept_bytes, arch, encoder, batch)[0] for batch in (2, 4, 6))
        image = (four - two) / 2
        print(f"| {name} | {fixed / 2**20:.0f} MiB | {image / 2**20:.1f} MiB | {(four + 2 * image) / 2**20:.0f} | {six / 2**20:.0f} MiB |")


def cache(_: argparse.Namespace) -> None:
    """Smooth maps of 224 px, as most methods give them, and noise, which cannot be compressed."""
    print("| maps | float32 | float16 | uint8 |\n|---|---:|---:|---:|")
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(50, 1, 14, 14, generator=generator)
    smooth = nn.functional.interpolate(coarse, (224, 224), mode="bilinear", align_corners=False)[:, 0]
    for name, maps in (("smooth, 14 x 14 enlarged to 224", smooth), ("noise, 224", torch.rand(50, 224, 224, generator=generator))):
        cells = []
        for dtype in ("float32", "float16", "uint8"):
            with tempfile.TemporaryDirectory() as folder:
                kept = MapCache(folder, {"what": name}, dtype)  # type: ignore[arg-type]
                kept.put([str(i) for i in range(len(maps))], [0] * len(maps), maps)
                cells.append(sum(p.stat().st_size for p in Path(folder).rglob("*.npz")) / len(maps))
        print(f"| {name} | " + " | ".join(f"{c / 1000:.1f} kB" for c in cells) + " |")


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {"steps": steps, "memory": memory, "cache": cache}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    for name, value in (("rounds", 3), ("steps", 12), ("batch", 8), ("size", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    o = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}\n")
    for part in PARTS:  # steps come first: a process that has computed must not be forked
        if part in o.parts:
            PARTS[part](o)
            print(flush=True)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
