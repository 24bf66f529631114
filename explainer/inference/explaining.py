"""``explainer explain``: photographs in; masks, overlays, contact sheets and numbers out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from explainer.data.transforms import to_picture
from explainer.errors import ConfigError, CorruptSampleError, NumericalError
from explainer.files import replacing, shortened, write_json
from explainer.fills import judging_fill
from explainer.geometry import height_width
from explainer.inference.formats import DEFAULT_SIDE, Array, Runtime
from explainer.inference.judging import Judge
from explainer.inference.pictures import OnError, Picture, batches, find_pictures, outside
from explainer.inference.treatment import Treatment
from explainer.models.explanandum import Explanandum

ROWS = 12  # images per contact sheet
SHOWN = 5  # columns of class masks in a contact sheet
RESULTS = "results.json"
MANY = 100  # above this number of classes, the masks of the chosen ones alone are computed and written


@dataclass
class ExplainOptions:
    """How a folder is explained.

    Attributes:
        classes: names whose masks are written; None: those the classifier predicts, or, without classifier, those with a mask that
            reaches 0.5 (the five with the largest area).
        batch_size: images per forward pass.
        side: square side in pixels at which the network runs, for models that take any size; None: the side it was trained at.
        threshold: probability from which a class counts as predicted (multi-label).
        on_error: raise stops at an unreadable file, skip leaves it out and reports it.
        areas: shares of the image in (0,1): masks of these areas are written too, for networks whose logits are at hand.
        top: how many of a single-label classifier's most probable classes are chosen.
    """

    classes: list[str] | None = None
    batch_size: int = 8
    side: int | None = None
    threshold: float = 0.5
    on_error: OnError = "skip"
    areas: Sequence[float] | None = None
    top: int = 1


def explain(
    inputs: Sequence[str | Path],
    runtime: Runtime,
    out: str | Path,
    options: ExplainOptions | None = None,
    *,
    explanandum: Explanandum | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    treatment: Treatment | None = None,
) -> dict[str, Any]:
    """Explain images and write, below ``out``: ``<image>/mask_<class>.png``, ``<image>/overlay_<class>.png``, ``<image>/overlay.png``
    (all chosen classes), ``<image>/masks.npz`` (all classes, float32, at the network's size, with the picture's box in it; of a model
    with more than :data:`MANY` classes the chosen ones only, as in the row's areas, peaks and scores),
    ``contact_sheet_001.png``, ... and ``results.json``. Masks have the resolution of the image, overlays too up to 16 megapixels. Masks
    of wanted areas lie in ``<image>/area_<share>/`` likewise.

    Args:
        explanandum: gives the scores, and chooses the classes if none are named. A fused model and a shared encoder have their own.
        progress: called with (images done, images in all).
        treatment: refines the chosen masks, or withholds those that its selector does not accept; each image's row then also has
            ``treatment`` (quality, refined and accepted per class, and covered: whether the selector's guarantee, which is about
            predicted classes, speaks of this one) and ``withheld``.

    Returns:
        What is in ``results.json``: ``classes``, ``images`` (each with name, size, chosen, areas, peaks, scores), ``failed``, and
        ``verdict``: sentences on the masks as a whole, from four pictures on (:mod:`explainer.inference.judging`).

    Raises:
        NumericalError: the model or the classifier answers NaN.
        CorruptSampleError: no image could be read, or ``on_error`` is "raise" and one could not.
        ConfigError: a class does not exist, ``out`` is the folder of the images, areas are wanted of a file without logits or with a
            treatment, or a model of many classes is asked for areas, a treatment, or masks of classes that nothing chooses.
    """
    o, out = options or ExplainOptions(), Path(out)
    explanandum = runtime.explanandum if explanandum is None else explanandum
    if o.areas and treatment is not None:
        raise ConfigError("--area gives masks of fixed areas, --refine and --selector change masks: ask for them in two calls.")
    names = runtime.classes
    wanted = class_indices(o.classes, names)
    files = outside(find_pictures(inputs), inputs, out)
    size = network_size(runtime, o.side)
    failed: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    judge = Judge(explanandum, names, judging_fill(runtime.description.get("fill")), o.batch_size)
    sheet = _Sheets(out, judge)
    geometry = geometry_of(runtime)
    many = len(names) > MANY or runtime.top is not None
    if many:
        _check_many(o, runtime, explanandum, treatment, wanted)
    (out / RESULTS).unlink(missing_ok=True)  # of an earlier call: whoever finds it takes the folder for finished
    for stale in set(out.glob("contact_sheet_[0-9][0-9][0-9].png")) - set(files.values()):
        stale.unlink()
    for group in batches(files, size, o.batch_size, on_error=o.on_error, failed=failed, geometry=geometry):
        images = np.stack([p.small for p in group])
        if many:
            for row in _explain_chosen(group, images, runtime, explanandum, wanted, o, out, sheet):
                rows.append(row)
            progress(len(rows) + len(failed), len(files))
            continue
        result = finite(runtime.run(images), runtime)
        cut = {area: runtime.area_masks(images, area) for area in o.areas or ()}
        scores = scores_of(result, images, explanandum)
        for i, picture in enumerate(group):
            masks = result["masks"][i]
            row_scores = scores[i] if scores is not None else None
            chosen = wanted if wanted is not None else choose(masks, row_scores, explanandum, runtime, threshold=o.threshold, top=o.top)
            facts: dict[int, dict[str, Any]] = {}
            if treatment is not None:
                own = chosen if wanted is None else choose(masks, row_scores, explanandum, runtime, threshold=o.threshold, top=o.top)
                masks, facts = treatment(images[i], masks, chosen)
                if treatment.selector is not None and treatment.selector.classes == "predicted":
                    facts = {k: {**fact, "covered": k in own} for k, fact in facts.items()}
                chosen = [k for k in chosen if facts[k]["accepted"] is not False]
            rows.append(_write(picture, masks, row_scores, chosen, names, out))
            for area, of_area in cut.items():
                _pictures(out / picture.name / f"area_{area:g}", picture, of_area[i], chosen, names)
            if treatment is not None:
                rows[-1]["treatment"] = {names[k]: fact for k, fact in facts.items()}
                rows[-1]["withheld"] = [names[k] for k in facts if k not in chosen]
            sheet.add(picture, masks, chosen, names)
        progress(len(rows) + len(failed), len(files))
    progress(len(files), len(files))
    sheet.finish()
    if not rows:
        raise CorruptSampleError(f"none of the {len(files)} files could be read. The first: {next(iter(failed.values()))}")
    precision = runtime.description.get("precision")
    found = {"classes": names, "network_size": list(size), "geometry": geometry, "precision": precision, "images": rows, "failed": failed}
    found["verdict"] = judge.sentences()
    write_json(out / RESULTS, found)
    return found


def class_indices(classes: Sequence[str] | None, names: Sequence[str]) -> list[int] | None:
    """Positions of named classes; None without names.

    Raises:
        ConfigError: an unknown name.
    """
    if classes is None:
        return None
    unknown = [c for c in classes if c not in names]
    if unknown:
        commas = " A name with a comma stands in double quotes." if any("," in name for name in names) else ""
        raise ConfigError(f"unknown class {unknown[0]!r}. This model has: {', '.join(names)}.{commas}")
    return [names.index(c) for c in dict.fromkeys(classes)]


def network_size(runtime: Runtime, side: int | None) -> tuple[int, int]:
    """Height and width at which the network runs: the file's own, the one asked for, or the one it was trained at."""
    if runtime.size is not None:
        if side is not None and runtime.size != (side, side):
            raise ConfigError(f"this model was exported for {runtime.size[0]} x {runtime.size[1]} px; leave out --size, or export again.")
        return runtime.size
    return height_width(side or runtime.description.get("image_size") or DEFAULT_SIDE)


def geometry_of(runtime: Runtime) -> str:
    """How the model's training made squares of pictures; "squash" for models that do not say."""
    return str(runtime.description.get("geometry") or "squash")


def finite(result: dict[str, Array], runtime: Runtime) -> dict[str, Array]:
    """The outputs of a model.

    Raises:
        NumericalError: one is NaN or infinite: it would be saved as a black mask.
    """
    for name, values in result.items():
        if not np.isfinite(values).all():
            raise NumericalError(
                f"the model's output {name!r} is NaN or infinite: its weights are damaged, or its training diverged. Use another "
                f"checkpoint of the run, or export again. Model: {runtime.description.get('weights') or 'unknown'}."
            )
    return result


def scores_of(result: dict[str, Array], images: Array, explanandum: Explanandum | None) -> Array | None:
    """Probabilities ``[B,K]`` from a fused model or from the classifier; None without either."""
    if "probabilities" in result:
        return result["probabilities"]
    if explanandum is None:
        return None
    with torch.inference_mode():
        scores = explanandum.probabilities(explanandum(torch.from_numpy(images))).numpy()
    if not np.isfinite(scores).all():
        raise NumericalError("the classifier's probabilities are NaN or infinite: its weights are damaged. Give another checkpoint.")
    return scores


def _check_many(
    o: ExplainOptions, runtime: Runtime, explanandum: Explanandum | None, treatment: Treatment | None, wanted: list[int] | None
) -> None:
    """What a model of many classes cannot be asked for."""
    if o.areas or treatment is not None:
        raise ConfigError(
            f"--area, --refine and --selector look at the masks of all classes, and this model has {len(runtime.classes)} or computes the "
            "most probable ones only: leave them out."
        )
    if runtime.top is not None:
        if wanted is not None or o.top > runtime.top:
            asked = "named classes" if wanted is not None else f"--top {o.top}"
            raise ConfigError(
                f"this file computes the masks of the {runtime.top} most probable classes of an image, so it cannot be asked for {asked}: "
                "export again without --top, or with a larger one."
            )
        return
    if wanted is None and explanandum is None:
        raise ConfigError(
            f"this model has {len(runtime.classes)} classes, so only those of interest are computed: give the classifier that chooses them "
            "(--classifier FILE), or name them (--classes NAME,NAME)."
        )


def _explain_chosen(
    group: Sequence[Picture],
    images: Array,
    runtime: Runtime,
    explanandum: Explanandum | None,
    wanted: list[int] | None,
    o: ExplainOptions,
    out: Path,
    sheet: _Sheets,
) -> list[dict[str, Any]]:
    """Masks of the chosen classes alone, written; the rows of ``results.json``."""
    names = runtime.classes
    if runtime.top is not None:
        return _explain_top(group, images, runtime, o, out, sheet)
    scores = scores_of({}, images, explanandum)
    nothing = np.zeros((0, 1, 1), dtype=np.float32)
    chosen = [
        wanted if wanted is not None else choose(nothing, scores[i], explanandum, runtime, threshold=o.threshold, top=o.top)  # type: ignore[index]
        for i in range(len(group))
    ]
    most = max(1, max(len(c) for c in chosen))
    # Rectangular: an image with fewer classes repeats one, which is dropped again.
    numbers = np.array([[*c, *([c[0] if c else 0] * (most - len(c)))] for c in chosen], dtype=np.int64)
    masks = finite({"masks": runtime.run_classes(images, numbers)}, runtime)["masks"]
    rows = []
    for i, (picture, own) in enumerate(zip(group, chosen, strict=True)):
        these, called = masks[i, : len(own)], [names[k] for k in own]
        rows.append(_write(picture, these, None if scores is None else scores[i, own], range(len(own)), called, out))
        sheet.add(picture, these, list(range(len(own))), called)
    return rows


def _explain_top(
    group: Sequence[Picture], images: Array, runtime: Runtime, o: ExplainOptions, out: Path, sheet: _Sheets
) -> list[dict[str, Any]]:
    """As :func:`_explain_chosen`, from a file that chooses the most probable classes itself."""
    result, rows = finite(runtime.run(images), runtime), []
    for i, picture in enumerate(group):
        numbers, scores = [int(k) for k in result["classes"][i]], result["probabilities"][i]
        predicted = choose(result["masks"][i], scores, None, runtime, threshold=o.threshold, top=o.top)
        slots = [slot for slot, k in enumerate(numbers) if k in predicted]
        own = [numbers[slot] for slot in slots]
        masks, called = result["masks"][i, slots], [runtime.classes[k] for k in own]
        rows.append(_write(picture, masks, scores[own], range(len(own)), called, out))
        sheet.add(picture, masks, list(range(len(own))), called)
    return rows


def choose(
    masks: Array, scores: Array | None, explanandum: Explanandum | None, runtime: Runtime, *, threshold: float, top: int = 1
) -> list[int]:
    """Classes of one image by :class:`ExplainOptions`: the predicted ones, best first; without scores those with a visible mask."""
    if scores is not None:
        task = explanandum.task if explanandum is not None else runtime.description.get("task")
        if task == "multiclass":
            return [int(k) for k in np.argsort(-scores, kind="stable")[:top]]
        return [int(k) for k in np.argsort(-scores, kind="stable") if scores[k] >= threshold]
    areas = masks.mean(axis=(1, 2))
    return [int(k) for k in np.argsort(-areas, kind="stable") if masks[k].max() >= 0.5][:SHOWN]


def _pictures(folder: Path, picture: Picture, masks: Array, chosen: Sequence[int], names: Sequence[str]) -> None:
    """``masks.npz`` of all classes, mask and overlay of each chosen class, and the overlay of all."""
    box = np.array(picture.place.target)  # of the picture in the masks: top, left, height, width
    with replacing(folder / "masks.npz", durable=False) as stream:
        # Not in half precision: an order of pixels near 1 would be lost.
        np.savez_compressed(stream, masks=masks.astype(np.float32), classes=np.array(names), box=box)
    shown = (int(picture.pixels.shape[1]), int(picture.pixels.shape[2]))
    merged = torch.zeros(shown)
    for k in chosen:  # one at a time: a mask may have 64 million pixels
        mask, name = in_picture(masks[k : k + 1], picture)[0], f"{k:03d}_{safe_name(names[k])}"
        _save((mask * 255).round().to(torch.uint8).numpy(), folder / f"mask_{name}.png")
        seen = mask if tuple(mask.shape) == shown else upsample(mask[None].numpy(), shown)[0]
        del mask
        _save(overlaid(picture, seen), folder / f"overlay_{name}.png")
        merged = torch.maximum(merged, seen)
    _save(overlaid(picture, merged), folder / "overlay.png")


def _save(pixels: Array, path: Path) -> None:
    with replacing(path, durable=False) as stream:
        Image.fromarray(pixels).save(stream, "PNG")


def overlaid(picture: Picture, mask: Tensor) -> Array:
    """What a mask ``[H',W']`` keeps of the picture's pixels: ``[H',W',3]`` uint8."""
    from explainer.figures import overlay

    parts = range(0, picture.pixels.shape[1], 512)  # in parts: a picture in float32 is twelve times its pixels
    return np.concatenate([overlay(picture.pixels[:, r : r + 512].float() / 255, mask[r : r + 512]) for r in parts])


def in_picture(masks: Array, picture: Picture) -> Tensor:
    """``[N,h,w]`` of the network -> ``[N,H,W]`` in the picture's own pixels, in [0,1]; 0 where the network saw nothing."""
    return to_picture(torch.from_numpy(np.ascontiguousarray(masks)), picture.place).clamp(0, 1)


def _write(picture: Picture, masks: Array, scores: Array | None, chosen: Sequence[int], names: Sequence[str], out: Path) -> dict[str, Any]:
    """The files of one image, and its row of ``results.json``."""
    for pattern in ("mask_*.png", "overlay*.png", "area_*/mask_*.png", "area_*/overlay*.png", "area_*/masks.npz"):
        for stale in (out / picture.name).glob(pattern):  # of an earlier call, for classes or areas that this one may not write
            stale.unlink()
    _pictures(out / picture.name, picture, masks, chosen, names)
    seen = masks[:, *picture.inside]
    return {
        "name": picture.name,
        "height": picture.size[0],
        "width": picture.size[1],
        "chosen": [names[k] for k in chosen],
        "areas": {n: round(float(m.mean()), 6) for n, m in zip(names, seen, strict=True)},
        "peaks": {n: round(float(m.max()), 6) for n, m in zip(names, seen, strict=True)},
        "scores": {n: round(float(s), 6) for n, s in zip(names, scores, strict=True)} if scores is not None else None,
    }


def upsample(masks: Array, size: tuple[int, int]) -> Tensor:
    """``[N,h,w]`` -> ``[N,H,W]``, bilinear, in [0,1]."""
    tensor = torch.from_numpy(np.ascontiguousarray(masks)).float()
    if len(tensor) == 0 or tuple(tensor.shape[-2:]) == size:
        return tensor.new_zeros(0, *size) if len(tensor) == 0 else tensor.clamp(0, 1)
    return F.interpolate(tensor[None], size=size, mode="bilinear", align_corners=False)[0].clamp(0, 1)


def safe_name(name: str) -> str:
    """A class name as part of a file name."""
    return shortened(re.sub(r"[^\w.-]+", "_", name).strip("._"), 80) or "class"


class _Sheets:
    """Contact sheets of :data:`ROWS` images each, drawn at the network's size."""

    def __init__(self, out: Path, judge: Judge) -> None:
        self.out, self.judge, self.pages = out, judge, 0
        self.rows: list[tuple[str, Array, dict[str, Array]]] = []

    def add(self, picture: Picture, masks: Array, chosen: Sequence[int], names: Sequence[str]) -> None:
        """One image with the masks ``[n,h,w]`` of the classes ``names``, of which ``chosen`` are shown, and judged."""
        self.judge.add(picture.small, masks, list(chosen), names)
        self.rows.append((picture.name, picture.small, {names[k]: masks[k] for k in list(chosen)[:SHOWN]}))
        if len(self.rows) == ROWS:
            self.finish()

    def finish(self) -> None:
        """Draw what is waiting."""
        if not self.rows:
            return
        from explainer.figures import mask_sheet

        self.pages += 1
        names = list(dict.fromkeys(name for _, _, masks in self.rows for name in masks)) or ["none"]
        targets = torch.zeros(len(self.rows), len(names))
        images = torch.from_numpy(np.stack([small for _, small, _ in self.rows]))
        shown = images.new_zeros(len(self.rows), len(names), *images.shape[-2:])
        for i, (_, _, masks) in enumerate(self.rows):
            for name, mask in masks.items():
                targets[i, names.index(name)] = 1
                shown[i, names.index(name)] = torch.from_numpy(np.ascontiguousarray(mask)).float()
        path = self.out / f"contact_sheet_{self.pages:03d}.png"
        mask_sheet(images, shown, targets, names, path, titles=[name[-24:] for name, *_ in self.rows])
        self.rows = []
