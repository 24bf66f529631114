"""Everything that needs a GPU to be measured, in at most 8 minutes: one JSON file and one table with the card's name.

    python -m tests.benchmarks.gpu --out DIR [--device cuda] [--budget 480]
    python -m tests.benchmarks.gpu --out DIR --small                 # tiny networks on the CPU: tests the script itself

Parts: training (images/s and memory of a step that explains ResNet-50 and EfficientNet-Lite0 at 224 px, in float32, bfloat16, compiled,
channels_last), parity with the CPU, seconds and passes of every method of `explainer methods`, extremal perturbations and RISE in large
batches, latency of a fused ONNX file in onnxruntime, two processes on one card (gloo and nccl) against one.

Each part is a process of its own with its share of the budget, and writes each row when it is measured. What fails or does not fit in the
time is a row that says so; the others are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from explainer import Explanandum, baselines, plugins
from explainer.models.classifiers import build_classifier
from explainer.models.explainer import Explainer
from tests.benchmarks.bench_training import make_batch, make_task, stepper

ROOT = Path(__file__).parents[2]
#: Share of the budget of each part; the rest is for the start of the processes.
SHARES = {"training": 0.34, "parity": 0.08, "methods": 0.25, "batches": 0.1, "onnx": 0.08, "processes": 0.1}
PAIRS = {
    "resnet50": ("torchvision:resnet50", "resnet50"),
    "efficientnet_lite0": ("timm:tf_efficientnet_lite0", "timm-tf_efficientnet_lite0"),
}
MODES = ("float32", "float32 channels_last", "bfloat16", "bfloat16 channels_last", "bfloat16 compiled")
Row = dict[str, Any]
Part = Callable[[argparse.Namespace], Iterator[tuple[str, Callable[[], Row]]]]


def device_name(device: str) -> str:
    """The card's name, or the processor's kind."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()}, {os.cpu_count()} cores)"


def seconds(call: Callable[[], object], device: str, repeats: int = 1) -> float:
    """Median wall time of one call, the device's queue empty before and after."""
    found = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def training(o: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Images per second and memory of a training step."""
    small: dict[str, Any] = {"network": "vgg_unet", "encoder": "", "size": 32, "batch": 2, "classes": 3}
    pairs = {"small_vgg": ("small_vgg", "")} if o.small else PAIRS
    # Compilation takes longest, so it comes last.
    for mode in MODES[:3] if o.small else MODES:
        for name, (arch, encoder) in pairs.items():
            large = {"network": "deeplabv3plus", "encoder": encoder, "size": 224, "batch": 32, "classes": 20}
            options = argparse.Namespace(arch=arch, labels=2, device=o.device, **(small if o.small else large))
            yield f"{name}, {mode}", lambda options=options, mode=mode: train(options, mode, 2 if o.small else 10)  # type: ignore[misc]


def train(options: argparse.Namespace, mode: str, steps: int) -> Row:
    """One training step, timed after three others."""
    task, batch = make_task(options).train(), make_batch(options)
    if "channels_last" in mode:
        task.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if "compiled" in mode:
        task.explainer.network.compile()
        task.explanandum.classifier.compile()

    def loss() -> Tensor:
        with torch.autocast(options.device, dtype=torch.bfloat16, enabled="bfloat16" in mode):
            return task.training_step(batch, 0)

    step = stepper(task, loss)
    for _ in range(1 if steps < 3 else 3):
        step()
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = seconds(step, options.device, steps)
    memory = torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else None
    return {"images/s": options.batch / taken, "GiB": memory, "batch": options.batch}


def classifier(o: argparse.Namespace, arch: str = "timm:resnet18") -> Explanandum:
    """With random weights."""
    torch.manual_seed(0)
    return Explanandum(build_classifier("small_vgg" if o.small else arch, o.classes), o.classes, mean=0.5, std=0.5)


def images(o: argparse.Namespace, count: int) -> Tensor:
    """Smooth colours, in [0,1]."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, (o.size, o.size), mode="bicubic", align_corners=False).clamp(0, 1)


def explainers(o: argparse.Namespace) -> dict[str, Explainer]:
    """One with an encoder of its own, one with the classifier's."""
    torch.manual_seed(1)
    e = Explanandum(build_classifier("timm:resnet10t" if o.small else "timm:resnet18", o.classes), o.classes, mean=0.5, std=0.5)
    network, options = ("vgg_unet", {}) if o.small else ("deeplabv3plus", {"encoder_name": "resnet18"})
    own = Explainer(network, o.classes, options, mean=[0.5] * 3, std=[0.5] * 3, image_size=o.size)
    shared = Explainer("fpn", o.classes, {}, mean=[0.5] * 3, std=[0.5] * 3, image_size=o.size, encoder="shared", explanandum=e)
    return {"own encoder": own.eval(), "shared encoder": shared.eval()}


def parity(o: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Largest difference between the device and the CPU, float32 without TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    x = images(o, 2)

    def difference(net: torch.nn.Module) -> Row:
        with torch.no_grad():
            there = net.to(o.device)(x.to(o.device)).cpu()
            return {"largest difference": float((net.cpu()(x) - there).abs().max())}

    for name, net in explainers(o).items():
        yield f"masks, {name}", lambda net=net: difference(net)  # type: ignore[misc]
    for method in ("grad_cam", "lrp", "srd"):

        def maps(method: str = method) -> Row:
            e = classifier(o)
            here = baselines.build(method, e)(x, 0)
            there = baselines.build(method, e.to(o.device))(x.to(o.device), 0).cpu()
            return {"largest difference": float((here - there).abs().max() / here.abs().max().clamp_min(1e-12))}

        yield f"{method}, relative to its maximum", maps


def methods(o: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Seconds and passes per image and class of every method; the cheap ones first, so that the time left decides about the others."""
    known = plugins.discover("explainer.baselines")
    chosen = ("gradient", "grad_cam", "occlusion") if o.small else baselines.names()
    cheap = sorted(chosen, key=lambda name: (name in ("extremal_perturbation", "igos_pp", "meaningful_perturbation", "rise"), name))
    for name in cheap:
        if not getattr(known[name], "needs_masks", False):
            yield name, lambda name=name: method_cost(o, name)  # type: ignore[misc]


def method_cost(o: argparse.Namespace, name: str) -> Row:
    """One image, one class, after a first call."""
    e, x = classifier(o).to(o.device), images(o, 1).to(o.device)
    method = baselines.build(name, e)
    first = seconds(lambda: method(x, 0), o.device)
    passes = {"forward": 0, "with gradient": 0}

    def count(_: Any, inputs: tuple[Tensor, ...]) -> None:
        passes["forward"] += len(inputs[0])
        passes["with gradient"] += len(inputs[0]) if inputs[0].requires_grad else 0

    handle = e.classifier.register_forward_pre_hook(count)
    try:
        taken = seconds(lambda: method(x, 0), o.device)
    finally:
        handle.remove()
    return {"seconds": taken, "first call": first, **passes, "stated": method.passes}


def batches(o: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Seconds per image of the two methods that profit from large batches."""
    for count in (1,) if o.small else (1, 8, 32, 128):
        yield (
            f"rise, {count} images",
            lambda count=count: batch_cost(  # type: ignore[misc]
                o, "rise", count, n_masks=8 if o.small else 1000, batch_size=max(64, 8 * count)
            ),
        )
        yield (
            f"extremal_perturbation, {count} images",
            lambda count=count: batch_cost(  # type: ignore[misc]
                o, "extremal_perturbation", count, iterations=1 if o.small else 100
            ),
        )


def batch_cost(o: argparse.Namespace, name: str, count: int, **options: Any) -> Row:
    """One batch."""
    e, x = classifier(o).to(o.device), images(o, count).to(o.device)
    method = baselines.build(name, e, **options)
    taken = seconds(lambda: method(x, 0), o.device)
    return {"seconds": taken, "seconds/image": taken / count, **options}


def onnx(o: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """A fused file in onnxruntime, on its CUDA provider where that is installed."""
    for provider in ("CPUExecutionProvider", "CUDAExecutionProvider"):
        yield provider, lambda provider=provider: onnx_cost(o, provider)  # type: ignore[misc]


def onnx_cost(o: argparse.Namespace, provider: str) -> Row:
    """Batch 1 and 32."""
    import onnxruntime

    from explainer.export.exporting import export
    from explainer.inference.predictor import Predictor

    if provider not in onnxruntime.get_available_providers():
        raise RuntimeError(f"onnxruntime has {', '.join(onnxruntime.get_available_providers())} here: install onnxruntime-gpu")
    if o.small:
        raise RuntimeError("left out in small mode: an export takes longer than the rest")
    net = explainers(o)["shared encoder"]
    with tempfile.TemporaryDirectory() as folder:
        path, _ = export(net, "onnx", folder, fused=True)
        predictor = Predictor(path, providers=(provider,))
    row: Row = {}
    for count in (1, 32):
        x = images(o, count).numpy()
        predictor.run(x)
        row[f"ms, batch {count}"] = 1000 * seconds(lambda x=x: predictor.run(x), "cpu", 7)  # type: ignore[misc]
    return row


def processes(o: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Gradients of a batch split over two processes on one device against those of the whole batch in one."""
    for backend in ("gloo", "nccl"):
        yield backend, lambda backend=backend: together(o, backend)  # type: ignore[misc]


def together(o: argparse.Namespace, backend: str) -> Row:
    """Start the group; in small mode a group of one in this process, which costs no start."""
    if backend == "nccl" and o.device != "cuda":
        raise RuntimeError("nccl needs a GPU")
    if o.small:
        return group(o, backend, 0, 1, torch.distributed.HashStore())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.benchmarks.gpu"]
    command += ["--out", o.out, "--device", o.device, "--member", backend]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line or "Duplicate" in line]
        raise RuntimeError(lines[0].strip() if lines else done.stderr[-300:])
    return json.loads(done.stdout.splitlines()[-1])


def group(o: argparse.Namespace, backend: str, rank: int, world: int, store: Any = None) -> Row:
    """One member's work: the mean over the group of its gradients, and how far it is from the whole batch's."""
    from torch import distributed

    distributed.init_process_group(backend, rank=rank, world_size=world, store=store, timeout=timedelta(seconds=40))
    try:
        net = explainers(o)["own encoder"].to(o.device)  # at rest, so that batch norm does not see the split
        x = images(o, 2 * world).to(o.device)
        whole = torch.cat([g.flatten() for g in torch.autograd.grad(net(x).square().mean(), list(net.parameters()))])
        part = x[2 * rank : 2 * rank + 2]
        own = torch.cat([g.flatten() for g in torch.autograd.grad(net(part).square().mean(), list(net.parameters()))])
        taken = seconds(lambda: distributed.all_reduce(own), o.device)
        return {"relative difference": float((own / world - whole).norm() / whole.norm()), "members": world, "all_reduce s": taken}
    finally:
        distributed.destroy_process_group()


PARTS: dict[str, Part] = {
    "training": training,
    "parity": parity,
    "methods": methods,
    "batches": batches,
    "onnx": onnx,
    "processes": processes,
}


def measure(name: str, o: argparse.Namespace, until: float, write: Callable[[Row], None]) -> None:
    """Every row of one part; a failure is a row, and after ``until`` (monotonic seconds) the rest is left out in words."""
    for label, call in PARTS[name](o):
        row: Row = {"part": name, "name": label}
        if time.monotonic() > until:
            write({**row, "error": "left out: the part's time is spent"})
            continue
        try:
            write({**row, **call()})
        except Exception as error:  # whatever a driver, a compiler or a method raises: the other rows are still wanted
            write({**row, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})
        if o.device == "cuda":
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()


def in_process(name: str, o: argparse.Namespace) -> list[Row]:
    """One part in a process of its own, ended when its time is over; what it has written is kept."""
    allowed = o.budget * SHARES[name]
    rows_file = Path(o.out) / f"{name}.jsonl"
    rows_file.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.gpu",
        "--out",
        o.out,
        "--device",
        o.device,
        "--part",
        name,
        "--budget",
        str(o.budget),
    ]
    ended: Row | None = None
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=allowed)
        if done.returncode:
            ended = {"part": name, "name": "all", "error": f"ended with {done.returncode}: {done.stderr.strip()[-200:]}"}
    except subprocess.TimeoutExpired:
        ended = {"part": name, "name": "the rest", "error": f"stopped after {allowed:.0f} s"}
    lines = rows_file.read_text(encoding="utf-8").splitlines() if rows_file.is_file() else []
    rows_file.unlink(missing_ok=True)
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):  # the line that was being written when the time was over
            rows.append(json.loads(line))
    return [*rows, *([ended] if ended else [])]


def markdown(report: Row) -> str:
    """One table a part."""
    lines = [f"# {report['device']}", "", f"torch {report['torch']}, CUDA {report['cuda']}, {report['seconds']:.0f} s in all.", ""]
    for part in PARTS:
        rows = [row for row in report["rows"] if row["part"] == part]
        keys = list(dict.fromkeys(key for row in rows for key in row if key not in ("part", "name", "error")))
        lines += [f"## {part}", "", "| " + " | ".join(["", *keys]) + " |", "|---" * (len(keys) + 1) + "|"]
        for row in rows:
            cells = [row["error"].replace("|", "/"), *[""] * (len(keys) - 1)] if "error" in row else [_cell(row.get(key)) for key in keys]
            lines.append("| " + " | ".join([row["name"], *cells]) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def run(o: argparse.Namespace) -> Row:
    """All parts, written to ``gpu.json`` and ``gpu.md`` in ``o.out``."""
    began, rows = time.monotonic(), []
    Path(o.out).mkdir(parents=True, exist_ok=True)
    for name in PARTS:
        if o.small:
            measure(name, o, time.monotonic() + o.budget * SHARES[name], rows.append)
        else:
            rows += in_process(name, o)
    report = {
        "device": device_name(o.device),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if o.device == "cuda" else None,
        "seconds": time.monotonic() - began,
        "rows": rows,
    }
    (Path(o.out) / "gpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (Path(o.out) / "gpu.md").write_text(markdown(report), encoding="utf-8")
    return report


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, with the sizes that follow from ``--small``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--budget", type=float, default=480.0, help="seconds in all")
    parser.add_argument("--small", action="store_true", help="tiny networks on the CPU")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--member", help=argparse.SUPPRESS)
    o = parser.parse_args(arguments)
    if o.small:
        o.device = "cpu"
    o.size, o.classes = (32, 3) if o.small else (224, 20)
    return o


def main() -> None:
    """Measure; print the table."""
    o = parse()
    if o.member:
        rank = int(os.environ["RANK"])
        row = group(o, o.member, rank, int(os.environ["WORLD_SIZE"]))
        if rank == 0:
            print(json.dumps(row))
    elif o.part:
        # A little less than the process is given, so that what is left out is said in words.
        until = time.monotonic() + 0.8 * o.budget * SHARES[o.part]
        with (Path(o.out) / f"{o.part}.jsonl").open("a", encoding="utf-8") as stream:
            measure(o.part, o, until, lambda row: print(json.dumps(row), file=stream, flush=True))
    else:
        run(o)
        print((Path(o.out) / "gpu.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
