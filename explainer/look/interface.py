"""The JSON interface: a picture in; probabilities, areas and masks out. What people look at on the page, for programs."""

from __future__ import annotations

import base64
import csv
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

import explainer
from explainer.data.run_length import encode_runs
from explainer.errors import ConfigError
from explainer.inference.explaining import geometry_of, in_picture
from explainer.inference.formats import Runtime
from explainer.look.uploads import Upload, Uploads, cut_at, png_of

VERSION = "1"  # of the interface: changes when an answer loses a key or a key another meaning
MaskFormat = Literal["png", "rle", "none"]
MASKS: tuple[str, ...] = get_args(MaskFormat)
_RLE_CUT = 0.5  # of run lengths, which are binary
_MOST = 400_000_000  # pixels of masks in one answer


@dataclass(frozen=True)
class Options:
    """What one request asks for.

    Attributes:
        classes: names whose masks are wanted; None: those of ``top``, or the predicted ones.
        top: masks of the most probable classes, this many; without classifier, of those with the largest areas.
        masks: how masks are written: png (8-bit grey), rle (COCO's run lengths), none.
        threshold: probability from which a class counts as predicted (multi-label); None: the server's.
        cut: mask value from which a pixel belongs to the mask; None: 0 (soft) for png, 0.5 for rle.
    """

    classes: tuple[str, ...] | None = None
    top: int | None = None
    masks: MaskFormat = "png"
    threshold: float | None = None
    cut: float | None = None


def parse_options(pairs: Iterable[tuple[str, str]]) -> Options:
    """The options in an address.

    Args:
        pairs: name and value pairs of the query. ``classes`` may be given several times, or with commas; a name with a comma stands in
            double quotes.

    Raises:
        ConfigError: an unknown option, one given twice, or a value that breaks its rule.
    """
    names: list[str] = []
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key not in Options.__dataclass_fields__:
            raise ConfigError(f"unknown option {key[:50]!r}. Known: {', '.join(Options.__dataclass_fields__)}.")
        if key == "classes":
            names += [name.strip() for row in csv.reader([value], skipinitialspace=True) for name in row if name.strip()]
        elif key in found:
            raise ConfigError(f"option {key} is given twice.")
        else:
            found[key] = _READERS[key](key, value)
    if names and "top" in found:
        raise ConfigError("classes names the masks that are wanted, top counts them: give one of both.")
    return Options(classes=tuple(names) or None, **found)


def _whole(key: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 9 and int(text) > 0):
        raise ConfigError(f"{key} must be a whole number of at least 1, received {text[:50]!r}.")
    return int(text)


def share(key: str, text: str) -> float:
    """A number in [0,1].

    Raises:
        ConfigError: not so.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise ConfigError(f"{key} must be a number in [0,1], received {text[:50]!r}.")
    return value


def _mask_format(key: str, text: str) -> str:
    if text not in MASKS:
        raise ConfigError(f"{key} must be one of {', '.join(MASKS)}, received {text[:50]!r}.")
    return text


_READERS: dict[str, Any] = {"top": _whole, "masks": _mask_format, "threshold": share, "cut": share}


def explained(uploads: Uploads, data: bytes, options: Options, title: str = "") -> dict[str, Any]:
    """Explain one picture; it is not remembered.

    Args:
        uploads: the model.
        data: content of an image file.
        options: what is asked for.
        title: the model's name for people.

    Returns:
        What the interface answers; :mod:`explainer.look.openapi` describes it.

    Raises:
        ConfigError: no such class, or more masks than one answer holds.
        CorruptSampleError: not an image, damaged, or too many pixels.
        NumericalError: the model answers NaN.
    """
    began = time.monotonic()
    names = uploads.runtime.classes
    unknown = [name for name in options.classes or () if name not in names]
    if unknown:
        some = ", ".join(names[:20]) + (f" and {len(names) - 20} more (GET /api/model)" if len(names) > 20 else "")
        raise ConfigError(f"unknown class {unknown[0][:100]!r}. This model has: {some}.")
    upload = uploads.explain(data, options.threshold)
    areas, scores = upload.areas, upload.scores
    height, width = upload.picture.size
    wanted = _wanted(upload, options, names)
    if options.masks != "none" and len(wanted) * height * width > _MOST:
        raise ConfigError(
            f"{len(wanted)} masks of {width} x {height} pixels are more than the limit of {_MOST:,} pixels in one answer. Name "
            "fewer classes, or send a smaller picture."
        )
    return {
        "size": {"height": height, "width": width},
        "probabilities": None if scores is None else _by_name(names, scores),
        "predicted": None if scores is None else [names[k] for k in upload.chosen],
        "areas": _by_name([names[k] for k in upload.classes], areas),
        "masks": [] if options.masks == "none" else [_mask(upload, k, names[k], options) for k in wanted],
        "model": model_facts(uploads.runtime, title),
        "network_size": list(uploads.size),
        "seconds": round(time.monotonic() - began, 3),
        "versions": {"explainer": explainer.__version__, "interface": VERSION},
    }


def _by_name(names: list[str], values: Any) -> dict[str, float]:
    return {name: round(float(value), 6) for name, value in zip(names, values, strict=True)}


def _wanted(upload: Upload, options: Options, names: list[str]) -> list[int]:
    if options.classes is not None:
        return [names.index(name) for name in dict.fromkeys(options.classes)]
    if options.top is not None:
        values = upload.areas if upload.scores is None else upload.scores[upload.classes]
        return [upload.classes[int(slot)] for slot in np.argsort(-values, kind="stable")[: options.top]]
    return upload.chosen


def _mask(upload: Upload, k: int, name: str, options: Options) -> dict[str, Any]:
    """One class's mask at the picture's own size."""
    mask = in_picture(upload.mask(k)[None], upload.picture)[0]
    if options.masks == "rle":
        cut = _RLE_CUT if options.cut is None else options.cut
        # Nothing is below 0: a cut of 0 would make every pixel part of the mask.
        return {"class": name, "rle": encode_runs((mask >= cut if cut > 0 else mask > 0).numpy())}
    return {"class": name, "png": base64.b64encode(png_of(cut_at(mask, options.cut or 0.0))).decode()}


def model_facts(runtime: Runtime, title: str) -> dict[str, Any]:
    """Which model answers: its name, the fingerprints of its weights and of the classifier it explains, precision and geometry."""
    d = runtime.description
    kept = {key: d.get(key) for key in ("weights", "explained_classifier", "precision")}
    return {"name": title, **kept, "geometry": geometry_of(runtime)}
