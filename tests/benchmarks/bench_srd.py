"""SRD against the classifier's own forward and backward to the input.

    python -m tests.benchmarks.bench_srd [--arch vgg16 ...] [--resolutions input ...] [--pairs 9] [--threads 1] [--size 224] [--device cpu]

Random weights (the arithmetic does not depend on them), one image, one class, float32. Each pair times both one after the other; the median
of the paired ratios is reported, so a drift of the machine's speed cancels. Target: <= 1.15. Peak memory is the rise of the process's
resident set while a method runs (CPU; the kernel's high-water mark, reset before the run) or CUDA's allocator peak.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision.models as tvm

from explainer import Explanandum
from explainer.baselines import build

TARGET = 1.15


def seconds(call: Callable[[], object], device: str) -> float:
    """On the CPU its own time, which other programs do not lengthen."""
    if device == "cpu":
        begin = time.process_time()
        call()
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def _status(key: str) -> float:
    """A line of /proc/self/status in MiB."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(key))
    return int(line.split()[1]) / 1024


def peak_mib(call: Callable[[], object], device: str) -> float:
    """Memory above what was in use before the call."""
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory goes back to the system first, so that all start alike
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    call()
    return _status("VmHWM") - before


def measure(arch: str, options: argparse.Namespace) -> None:
    """Print the ratios and the peak memory of one network."""
    torch.manual_seed(0)
    with torch.device(options.device):
        explanandum = Explanandum(getattr(tvm, arch)(num_classes=1000), 1000)
        images = torch.rand(1, 3, options.size, options.size)

    def forward_backward() -> object:
        leaf = images.clone().requires_grad_()
        return torch.autograd.grad(explanandum(leaf)[:, 0].sum(), leaf)

    methods = {resolution: build("srd", explanandum, resolution=resolution) for resolution in options.resolutions}
    calls = {f"srd {name}": (lambda m=method: m(images, 0)) for name, method in methods.items()}
    for call in (forward_backward, *calls.values()):
        call()
    print(f"{arch} {options.size} px, {options.threads} thread(s), {options.device}, torch {torch.__version__}")
    for name, call in calls.items():
        pairs = [(seconds(call, options.device), seconds(forward_backward, options.device)) for _ in range(options.pairs)]
        ratio = statistics.median(a / b for a, b in pairs)
        verdict = f"target <= {TARGET}: {'met' if ratio <= TARGET else 'MISSED'}" if name == "srd input" else ""
        own, base = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(
            f"{name:10} {own * 1e3:8.1f} ms   forward+backward {base * 1e3:8.1f} ms   median paired ratio {ratio:.3f}   {verdict}",
            flush=True,
        )
    for name, call in {"forward+backward": forward_backward, **calls}.items():
        print(f"peak memory above the loaded classifier: {name:18} {peak_mib(call, options.device):8.1f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["vgg16"])
    parser.add_argument("--resolutions", nargs="+", default=["input", "high", "low"])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for arch in options.arch:
        measure(arch, options)


if __name__ == "__main__":
    main()
