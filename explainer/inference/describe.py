"""The plain values stored with every exported file: enough to use it and to know what it was made from."""

from __future__ import annotations

from typing import Any

import torch

import explainer
from explainer.config import without_paths
from explainer.geometry import GEOMETRIES
from explainer.inference.classifier import described
from explainer.inference.formats import DESCRIPTION, ExportOptions, fingerprint
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum


def describe(
    net: Explainer,
    options: ExportOptions | None = None,
    explanandum: Explanandum | None = None,
    *,
    outputs: tuple[str, ...] = ("masks",),
    threshold: float | None = None,
    top: int | None = None,
) -> dict[str, Any]:
    """Classes, size, precision, outputs, threshold of the merged mask, number of most probable classes whose masks are given (None: all
    classes), fingerprints, architecture, data and versions.

    Folder names of the training machine are left out: they mean nothing elsewhere and may be private.
    """
    fixed = options is not None and not options.dynamic_size
    data = net.metadata.get("data")
    return {
        "format": DESCRIPTION,
        "classes": list(net.class_names),
        "size": list(options.size) if options is not None and fixed else None,
        "image_size": list(net.image_size) if isinstance(net.image_size, tuple) else net.image_size,
        "geometry": trained_geometry(net.metadata),
        "precision": options.precision if options is not None else "fp32",
        "outputs": list(outputs),
        "threshold": threshold,
        "top": top,
        "task": explanandum.task if explanandum is not None else net.metadata.get("task"),
        "explained_classifier": net.metadata.get("fingerprint"),
        "classifier": described(net.metadata.get("classifier")),
        "fill": net.metadata.get("fill"),
        "area_temperature": net.metadata.get("area_temperature"),
        "weights": fingerprint(net),
        "explainer": net.config,
        "parameters": sum(p.numel() for p in net.parameters()),
        "data": _data(data) if isinstance(data, dict) else None,
        "losses": net.metadata.get("losses"),
        "versions": {"explainer": explainer.__version__, "torch": str(torch.__version__), "trained_with": net.metadata.get("versions")},
    }


def trained_geometry(metadata: dict[str, Any]) -> str:
    """How the training's data made squares of pictures (:mod:`explainer.geometry`), from what a checkpoint stores; "squash" if unknown."""
    data = metadata.get("data")
    if not isinstance(data, dict):
        return "squash"
    found = {**_section(data, "options"), **_section(data, "eval_options")}.get("geometry")
    return found if found in GEOMETRIES else "squash"


def _section(data: dict[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key)
    return value if isinstance(value, dict) else {}


def _data(data: dict[str, Any]) -> dict[str, Any]:
    options = _section(data, "options")
    return {"name": data.get("name"), **without_paths(options)}
