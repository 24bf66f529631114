"""Does the exported file compute what the network computes? Measured on real runs of both, at several batch sizes and image sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from explainer.errors import ConfigError, ExportError
from explainer.fills import FillKind, blend, judging_fill, make_fill
from explainer.inference.classifier import prediction_threshold
from explainer.inference.formats import Array, ExportModel, Runtime
from explainer.models.explanandum import Explanandum

# Quantised masks differ by a lot at single edge pixels and hardly elsewhere, so their largest difference says nothing (ecosystem facts:
# mean .0009 beside max .42); what counts is the mask at 0.5. Of a fused model's probabilities it counts how far they move, and whether
# that changes which classes are predicted (at fp32 nothing may change but where a probability lies on the threshold itself).
LIMITS: dict[str, dict[str, float]] = {
    "fp32": {"max_difference": 1e-4, "probability_difference": 1e-4},
    "fp16": {"max_difference": 0.05, "mean_difference": 2e-3, "iou": 0.98, "probability_difference": 0.02, "changed_predictions": 0.02},
    "int8": {"iou": 0.97, "probability_difference": 0.15, "changed_predictions": 0.05},
}
_FUSED = ("probability_difference", "changed_predictions")


@dataclass
class DriftReport:
    """What :func:`measure` found.

    Attributes:
        file, format, precision: what was checked.
        shapes: ``[B,H,W]`` of each run.
        real_images: the images were given (calibration), not generated.
        max_difference, mean_difference: largest and mean difference of the class masks, absolute.
        iou: intersection over union of the class masks at 0.5 against eager, mean over masks that are not empty in both; 1 if all are.
        probability_difference: largest, of a fused model; None of others.
        changed_predictions: share of pairs of image and class that are predicted by one of both only (multi-label: at the threshold that is
            baked in; single-label: of images whose most probable class differs).
        threshold: probability from which a class counts as predicted in the file; None where none is baked in.
        outputs: largest absolute difference of every other output of a fused model; merged masks are compared where the predicted classes
            agree, masks and areas of the most probable classes where the class agrees; ``classes``: by how much the class that the file
            put into a place is less or more probable than the right one.
        faithfulness: mean probability of the most probable class on the masked image, eager and exported, and the difference; None
            without classifier.
        latency_ms, eager_latency_ms: batch 1, median of interleaved runs.
        file_bytes: size on disk.
        limits: applied.
        violations: which of them were exceeded, in words.
    """

    file: str
    format: str
    precision: str
    shapes: list[list[int]]
    real_images: bool
    max_difference: float
    mean_difference: float
    iou: float
    probability_difference: float | None = None
    changed_predictions: float | None = None
    threshold: float | None = None
    outputs: dict[str, float] = field(default_factory=dict)
    faithfulness: dict[str, float] | None = None
    latency_ms: float = 0.0
    eager_latency_ms: float = 0.0
    file_bytes: int = 0
    limits: dict[str, float] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed report."""
        found = [
            ("format", f"{self.format}, {self.precision}"),
            ("images", f"{'given' if self.real_images else 'generated'}; (B,H,W): " + ", ".join(_shape(s) for s in self.shapes)),
            ("largest mask difference", f"{self.max_difference:.2e}"),
            ("mean mask difference", f"{self.mean_difference:.2e}"),
            ("IoU at 0.5 against eager", f"{self.iou:.4f}"),
            *((f"largest difference, {name}", f"{value:.2e}") for name, value in self.outputs.items()),
        ]
        if self.probability_difference is not None and self.changed_predictions is not None:
            cut = "most probable class" if self.threshold is None else f"predicted from {self.threshold:g}"
            found.append(("largest probability difference", f"{self.probability_difference:.2e}"))
            found.append((f"changed predictions ({cut})", f"{self.changed_predictions:.2%}"))
        if self.faithfulness is not None:
            f = self.faithfulness
            found.append(("faithfulness change", f"{f['change']:+.4f} ({f['eager']:.4f} -> {f['exported']:.4f})"))
        found += [
            ("latency, batch 1", f"{self.latency_ms:.1f} ms (eager {self.eager_latency_ms:.1f} ms)"),
            ("file size", f"{self.file_bytes / 2**20:.2f} MiB"),
            ("verdict", "; ".join(self.violations) or "within " + ", ".join(f"{k} {v:g}" for k, v in self.limits.items())),
        ]
        return found


def _shape(shape: Sequence[int]) -> str:
    return "x".join(str(v) for v in shape)


def measure(
    model: ExportModel,
    runtime: Runtime,
    *,
    file: Path,
    format_name: str,
    precision: str,
    shapes: Sequence[tuple[int, int, int]],
    images: Array | None = None,
    explanandum: Explanandum | None = None,
    tolerance: float | None = None,
) -> DriftReport:
    """Run both and compare.

    Args:
        shapes: ``(B,H,W)``, at least two batch sizes.
        images: ``[N,3,h,w]`` in [0,1] to run on, repeated and resized as needed; generated colour blobs and noise if None.
        explanandum: the classifier, for the change in faithfulness.
        tolerance: largest difference of the masks, instead of the precision's own limits.
    """
    if len({shape[0] for shape in shapes}) < 2:
        raise ConfigError(f"parity needs at least two batch sizes, received {[shape[0] for shape in shapes]}.")
    largest, total, count = 0.0, 0.0, 0
    ious: list[float] = []
    outputs: dict[str, float] = {}
    faithful: list[tuple[float, float]] = []
    predicted: list[Array] = []
    threshold, fill = _decision(model.description), judging_fill(model.description.get("fill"))
    for shape in shapes:
        batch = probe(shape, images)
        expected, actual = model.reference(batch), runtime.run(batch)
        same = _same_slots(expected, actual)
        difference = np.abs(expected["masks"].astype(np.float64) - actual["masks"])
        if difference.shape != expected["masks"].shape or not np.isfinite(difference).all():
            raise ExportError(f"{file.name}: the exported masks are {actual['masks'].shape}, expected finite {expected['masks'].shape}.")
        difference = difference[same]
        largest, total, count = max(largest, float(difference.max(initial=0))), total + float(difference.sum()), count + difference.size
        ious += _ious(expected["masks"][same], actual["masks"][same])
        if "probabilities" in expected:
            predicted.append(np.stack([expected["probabilities"], actual["probabilities"]]))
        for name, value in _others(expected, actual, threshold).items():
            outputs[name] = max(outputs.get(name, 0.0), value)
        if explanandum is not None:
            faithful += _faithfulness(batch, expected, actual, explanandum, fill)
    one = probe((1, *shapes[0][1:]), images)
    latency, eager = interleaved([lambda: runtime.run(one), lambda: model.reference(one)], repeats=5)
    report = DriftReport(
        file.name,
        format_name,
        precision,
        [list(s) for s in shapes],
        images is not None,
        largest,
        total / max(1, count),
        float(np.mean(ious)) if ious else 1.0,
        *_predictions(predicted, threshold),
        threshold if predicted else None,
        outputs,
        _summary(faithful),
        latency,
        eager,
        file_bytes(file),
        _limits(precision, tolerance, bool(predicted)),
    )
    report.violations = violations(report)
    return report


def violations(report: DriftReport) -> list[str]:
    """The limits that a report exceeds, each in words. Merged masks and areas of a fused model share the limit of the masks."""
    found = []
    for name, limit in report.limits.items():
        value = max([report.max_difference, *report.outputs.values()]) if name == "max_difference" else getattr(report, name)
        if value is None:
            continue
        if value < limit if name == "iou" else value > limit:
            found.append(f"{name.replace('_', ' ')} {value:.3g} is {'below' if name == 'iou' else 'above'} the limit {limit:g}")
    return found


def probe(shape: tuple[int, int, int], images: Array | None, seed: int = 0) -> Array:
    """``(B,H,W)`` -> ``[B,3,H,W]`` in [0,1]: the given images, or blobs of colour with noise on them."""
    count, height, width = shape
    if images is not None:
        chosen = torch.from_numpy(np.ascontiguousarray(images[np.arange(count) % len(images)]))
    else:
        generator = torch.Generator().manual_seed(seed + count)
        coarse = torch.rand(count, 3, 5, 5, generator=generator)
        chosen = 0.8 * nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False).clamp(0, 1)
        chosen = chosen + 0.2 * torch.rand(chosen.shape, generator=generator)
    if chosen.shape[-2:] != (height, width):
        chosen = nn.functional.interpolate(chosen, size=(height, width), mode="bilinear", align_corners=False, antialias=True)
    return chosen.clamp(0, 1).contiguous().numpy()


def interleaved(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Median milliseconds of each call, called in turn so that all meet the same load; one untimed round first."""
    times: list[list[float]] = [[] for _ in calls]
    for round_ in range(repeats + 1):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if round_:
                taken.append((time.perf_counter() - start) * 1000)
    return [statistics.median(taken) for taken in times]


def file_bytes(path: Path) -> int:
    """Of a file, and of the weights beside it that carry its stem (OpenVINO's .bin)."""
    weights = path.with_suffix(".bin")
    return path.stat().st_size + (weights.stat().st_size if path.suffix == ".xml" and weights.is_file() else 0)


def _ious(expected: Array, actual: Array) -> list[float]:
    a, b = expected >= 0.5, actual >= 0.5
    union = (a | b).sum(axis=(-2, -1))
    ious: list[float] = ((a & b).sum(axis=(-2, -1))[union > 0] / union[union > 0]).tolist()
    return ious


def _limits(precision: str, tolerance: float | None, fused: bool) -> dict[str, float]:
    """Those of the precision, with a tolerance of the user's own for the masks; those of predictions only where there are some."""
    limits = dict(LIMITS[precision])
    if tolerance is not None:
        kept = {name: limits[name] for name in _FUSED if name in limits}
        limits = {"max_difference": tolerance, **kept, "probability_difference": max(tolerance, limits["probability_difference"])}
    return limits if fused else {name: limit for name, limit in limits.items() if name not in _FUSED}


def _decision(description: dict[str, Any]) -> float | None:
    """The probability from which a class is predicted; None: the most probable class is."""
    return None if description.get("task") == "multiclass" else prediction_threshold(None, description)


def _predictions(pairs: list[Array], threshold: float | None) -> tuple[float | None, float | None]:
    """``(largest difference, share of changed predictions)`` of pairs ``[2,B,K]`` of probabilities; None without any."""
    if not pairs:
        return None, None
    eager, exported = np.concatenate(pairs, axis=1)
    if not np.isfinite(exported).all():
        return float("inf"), 1.0
    if threshold is None:
        changed = eager.argmax(axis=1) != exported.argmax(axis=1)
    else:
        changed = (eager >= threshold) != (exported >= threshold)
    return float(np.abs(eager - exported).max()), float(changed.mean())


def _same_slots(expected: dict[str, Array], actual: dict[str, Array]) -> Array:
    """``[B,n]``, bool: the masks are of the same class. Others cannot be compared; how far they may differ is asked of ``classes``."""
    if "classes" not in expected:
        return np.ones(expected["masks"].shape[:2], dtype=bool)
    same: Array = expected["classes"] == actual["classes"]
    return same


def _rank_difference(expected: dict[str, Array], actual: dict[str, Array]) -> float:
    """Largest difference, in the network's own probabilities, between the class that the file put into a slot and the right one."""
    rows = np.arange(len(expected["classes"]))[:, None]
    right, chosen = (expected["probabilities"][rows, found["classes"].astype(int)] for found in (expected, actual))
    return float(np.abs(right - chosen).max(initial=0.0))


def _others(expected: dict[str, Array], actual: dict[str, Array], threshold: float | None) -> dict[str, float]:
    found = {}
    for name, value in expected.items():
        if name in ("masks", "probabilities"):
            continue
        if name == "classes":
            found[name] = _rank_difference(expected, actual)
            continue
        difference = np.abs(value - actual[name])
        if name == "areas":
            difference = difference[_same_slots(expected, actual)]
        if name == "merged":
            same = [_same_classes(p, q, threshold) for p, q in zip(expected["probabilities"], actual["probabilities"], strict=True)]
            if "classes" in expected:
                same = [a and bool(slots.all()) for a, slots in zip(same, _same_slots(expected, actual), strict=True)]
            difference = difference[np.array(same)]
        found[name] = float(difference.max(initial=0.0))
    return found


def _same_classes(p: Array, q: Array, threshold: float | None) -> bool:
    """Both predict the same classes, so that their merged masks are of the same masks."""
    return bool(p.argmax() == q.argmax()) if threshold is None else bool(((p >= threshold) == (q >= threshold)).all())


def _faithfulness(
    images: Array, eager: dict[str, Array], exported: dict[str, Array], explanandum: Explanandum, fill_kind: FillKind
) -> list[tuple[float, float]]:
    """Probability of the most probable class when only its mask is kept, on the training's fill: (eager's, exported's)."""
    x = torch.from_numpy(images)
    with torch.inference_mode():
        best = explanandum(x).argmax(dim=1)
        rows = torch.arange(len(x))
        slot = torch.zeros_like(best) if "classes" in eager else best  # the most probable class comes first
        fill = make_fill(x, fill_kind, mean=explanandum.mean, generator=torch.Generator().manual_seed(0))
        masked = [blend(x, torch.from_numpy(found["masks"])[rows, slot], fill) for found in (eager, exported)]
        kept = [explanandum.probabilities(explanandum(m))[rows, best].tolist() for m in masked]
    return list(zip(kept[0], kept[1], strict=True))


def _summary(pairs: list[tuple[float, float]]) -> dict[str, float] | None:
    if not pairs:
        return None
    eager, exported = (float(np.mean(values)) for values in zip(*pairs, strict=True))
    return {"eager": eager, "exported": exported, "change": exported - eager}
