"""``explainer bench``: what an explanation costs in every format, beside the classifier alone; all in one run, in turn."""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from explainer.errors import ConfigError
from explainer.export.exporting import build_format
from explainer.export.parity import file_bytes, probe
from explainer.geometry import height_width
from explainer.inference.classifier import Given
from explainer.inference.formats import DEFAULT_SIDE, Array, ExportModel, ExportOptions
from explainer.inference.runtime import model_files, open_model
from explainer.models.black_box import BlackBox
from explainer.models.explanandum import Explanandum


@dataclass
class Contestant:
    """One thing that is timed.

    Attributes:
        name: name of the row.
        call: images ``[B,3,H,W]`` -> anything.
        size: ``(height, width)`` it accepts, or None.
        file_bytes: on disk, 0 if unknown.
        memory_mb: resident memory that opening it and running it once added.
    """

    name: str
    call: Callable[[Array], Any]
    size: tuple[int, int] | None = None
    file_bytes: int = 0
    memory_mb: float = 0.0


@dataclass
class Timing:
    """Medians of one contestant at one batch size.

    Attributes:
        wall_ms, cpu_ms: wall and processor time of one call; on a busy machine the processor time of the whole process is the steadier one.
        images_per_s: images per second, from ``wall_ms``.
    """

    name: str
    batch: int
    wall_ms: float
    cpu_ms: float
    images_per_s: float
    relative: float = 1.0
    memory_mb: float = 0.0
    file_bytes: int = 0


@dataclass
class BenchReport:
    """All rows, and the load of the machine they were measured under."""

    rows: list[Timing]
    threads: int
    repeats: int
    load: dict[str, tuple[float, float, float] | None] = field(default_factory=dict)
    cores: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def contestants(
    paths: Sequence[str | Path],
    threads: int,
    explanandum: Explanandum | None = None,
    side: int | None = None,
    given: Given | None = None,
) -> list[Contestant]:
    """Every model file of ``paths``, then the classifier in torch and, where installed, in onnxruntime.

    Raises:
        ConfigError: files that are fixed to different sizes, which could not be paired.
    """
    found: list[Contestant] = []
    taken: list[tuple[int, int]] = []
    for path in [file for given in paths for file in model_files(given)]:
        before = resident_mb()
        runtime = open_model(path, threads, given)
        size = runtime.size
        chosen = size or height_width(side or runtime.description.get("image_size") or DEFAULT_SIDE)
        taken.append(chosen)
        runtime.run(probe((1, *chosen), None))
        found.append(Contestant(str(path), runtime.run, chosen, file_bytes(path), resident_mb() - before))
    if explanandum is not None:
        side = side or explanandum.input_size or DEFAULT_SIDE
        found += classifier_contestants("classifier", explanandum, taken[0] if taken else (side, side), threads)
    if not found:
        raise ConfigError("nothing to measure: give exported files, export folders, checkpoints, or --classifier.")
    if len({c.size for c in found}) > 1:
        sizes = ", ".join(f"{Path(c.name).name} {c.size}" for c in found)
        raise ConfigError(f"models of different sizes cannot be paired: {sizes}. Set --size, or measure them apart.")
    return found


def describe_first(paths: Sequence[str | Path], given: Given | None = None) -> dict[str, Any] | None:
    """What the first of the models says about itself and its classifier, or None without models."""
    files = [file for given in paths for file in model_files(given)]
    return open_model(files[0], given=given).description if files else None


def classifier_contestants(name: str, module: nn.Module, size: tuple[int, int], threads: int) -> list[Contestant]:
    """A module from images to logits, in torch and, where onnx and onnxruntime are installed, in onnxruntime; one that gives scores only as
    it is.
    """
    torch.set_num_threads(threads)
    module = module.eval()
    scores_only = isinstance(module, BlackBox)
    if isinstance(module, BlackBox):
        asked: Any = module.classifier
        asked.cache.size = 0  # remembered answers would be timed instead of the classifier

    def eager(images: Array) -> Any:
        with torch.inference_mode():
            return module(torch.from_numpy(images))

    before = resident_mb()
    eager(probe((1, *size), None))
    kind = "scores only" if scores_only else "torch"
    found = [Contestant(f"{name} ({kind})", eager, size, sum(p.numel() * 4 for p in module.parameters()), resident_mb() - before)]
    if scores_only:
        return found
    with contextlib.suppress(ConfigError):  # the extra may not be installed; the torch row remains
        found.append(onnx_contestant(f"{name} (onnxruntime)", ExportModel(module, ("logits",)), size, threads))
    return found


def onnx_contestant(name: str, model: ExportModel, size: tuple[int, int], threads: int, precision: str = "fp32") -> Contestant:
    """Any module in onnxruntime, through a temporary file."""
    model.description = {"classes": [], "size": list(size), "outputs": list(model.outputs), **model.description}
    form = build_format("onnx")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        form.write(model, path, ExportOptions(size, precision=precision))
        gc.collect()
        before = resident_mb()
        runtime = form.open(path, threads)
        runtime.run(probe((1, *size), None))
        return Contestant(name, runtime.run, size, file_bytes(path), resident_mb() - before)


def bench(
    rivals: Sequence[Contestant],
    batches: Sequence[int] = (1, 16),
    repeats: int = 11,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BenchReport:
    """Time all in turn, round after round, so that each meets the same load; one untimed round per batch size.

    ``relative`` is the wall time relative to the last contestant (the classifier, where there is one): the median of the ratios of
    calls in the same round.
    """
    if repeats < 1 or any(b < 1 for b in batches):
        raise ConfigError(f"repeats and batch sizes must be at least 1, received {repeats} and {list(batches)}.")
    torch.set_num_threads(threads)
    load = {"before": load_average()}
    rows: list[Timing] = []
    total, done = len(batches) * (repeats + 1), 0
    for batch in batches:
        wall: list[list[float]] = [[] for _ in rivals]
        cpu: list[list[float]] = [[] for _ in rivals]
        inputs = [probe((batch, *(c.size or (DEFAULT_SIDE, DEFAULT_SIDE))), None) for c in rivals]
        for round_ in range(repeats + 1):
            for rival, images, walls, cpus in zip(rivals, inputs, wall, cpu, strict=True):
                start, busy = time.perf_counter(), time.process_time()
                rival.call(images)
                if round_:
                    walls.append((time.perf_counter() - start) * 1000)
                    cpus.append((time.process_time() - busy) * 1000)
            done += 1
            progress(done, total)
        for rival, walls, cpus in zip(rivals, wall, cpu, strict=True):
            median = statistics.median(walls)
            ratio = statistics.median(a / b for a, b in zip(walls, wall[-1], strict=True))
            rows.append(
                Timing(rival.name, batch, median, statistics.median(cpus), 1000 * batch / median, ratio, rival.memory_mb, rival.file_bytes)
            )
    load["after"] = load_average()
    return BenchReport(rows, threads, repeats, load, os.cpu_count() or 1)


def load_average() -> tuple[float, float, float] | None:
    """Runnable processes in the last 1, 5 and 15 minutes, where the system tells."""
    return tuple(round(v, 2) for v in os.getloadavg()) if hasattr(os, "getloadavg") else None  # type: ignore[return-value]


def resident_mb() -> float:
    """Resident memory of this process in MiB; the greatest so far where the system does not tell the present one."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if os.uname().sysname == "Darwin" else peak / 2**10


def table(report: BenchReport) -> list[list[str]]:
    """Header and rows, as text."""
    head = ["model", "batch", "ms", "CPU ms", "images/s", "x last row", "memory MiB", "file MiB"]
    body = [
        [
            r.name,
            str(r.batch),
            f"{r.wall_ms:.1f}",
            f"{r.cpu_ms:.1f}",
            f"{r.images_per_s:.1f}",
            f"{r.relative:.3f}",
            f"{r.memory_mb:.0f}",
            f"{r.file_bytes / 2**20:.1f}",
        ]
        for r in report.rows
    ]
    return [head, *body]
