"""RISE and iGOS++ against the classifier passes that they cannot do without. Paired: each repetition times both, one after the other.

    python -m tests.benchmarks.bench_rise_igos [--masks 16] [--points 4] [--repeats 3] [--images 1] [--device cpu] [--side 224]

VGG-16's geometry with random weights. RISE is compared with its N forwards of the same batches; iGOS++ with the same number of
images sent forward and backward (gradient) and forward (line search). Targets: RISE <= 1.10, iGOS++ <= 1.15. Peak memory is the
process's resident maximum (CPU) or the allocator's maximum (CUDA).
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.models import vgg16

import explainer
from explainer.baselines import build


class Counted(torch.nn.Module):
    """The classifier, with a list of the passes it made: (images, with gradient)."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.passes = inner, []

    def forward(self, x: Tensor) -> Tensor:
        self.passes.append((len(x), x.requires_grad))
        return self.inner(x)


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall-clock time, or CPU time on the CPU, where other processes may share the cores."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def replay(classifier: explainer.Explanandum, passes: list[tuple[int, bool]], images: Tensor) -> None:
    """The same passes without any method around them."""
    for count, gradient in passes:
        x = images[:1].expand(count, -1, -1, -1).contiguous().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            logits = classifier(x)
        if gradient:
            torch.autograd.grad(logits[:, 0].sum(), x)


def peak(device: str) -> float:
    """GiB."""
    return torch.cuda.max_memory_allocated() / 2**30 if device != "cpu" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Measure and print one line per method."""
    parser = argparse.ArgumentParser(description=__doc__)
    for option, default in (("masks", 16), ("points", 4), ("repeats", 3), ("images", 1), ("side", 224), ("batch", 8)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    counted = Counted(vgg16(weights=None, num_classes=20))
    classifier = explainer.Explanandum(counted, 20).to(args.device)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(args.images, 3, args.side, args.side, generator=generator).to(args.device)
    methods = {
        "rise": (1.10, {"n_masks": args.masks, "batch_size": args.batch}),
        # So short a step ends the line search after at most two tries.
        "igos_pp": (1.15, {"iterations": 1, "points": args.points, "batch_size": args.batch, "step": 1e-5}),
        "igos": (1.15, {"iterations": 1, "points": args.points, "batch_size": args.batch, "step": 1e-5}),
    }
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} thread(s), {args.images} image(s) of {args.side} pixels")
    for name, (target, options) in methods.items():
        method = build(name, classifier, **options)
        method(images, 0)  # warms up
        whole, bare = [], []
        for _ in range(args.repeats):
            counted.passes.clear()
            whole.append(seconds(lambda: method(images, 0), args.device))  # noqa: B023
            passes = list(counted.passes)
            bare.append(seconds(lambda: replay(classifier, passes, images), args.device))  # noqa: B023
        ratio = statistics.median(w / b for w, b in zip(whole, bare, strict=True))
        forwards, both = (sum(n for n, g in passes if g == kind) for kind in (False, True))
        print(
            f"{name:8} {forwards} forwards, {both} forwards+backwards: {statistics.median(whole):.2f} s, passes alone "
            f"{statistics.median(bare):.2f} s, ratio {ratio:.3f} (target <= {target}), peak {peak(args.device):.2f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
