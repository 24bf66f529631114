"""Open whatever can explain: a checkpoint, an export folder, or one exported file."""

from __future__ import annotations

from pathlib import Path

from explainer import plugins
from explainer.errors import CheckpointError
from explainer.inference.classifier import Given
from explainer.inference.eager import EagerRuntime
from explainer.inference.formats import ExportFormat, Runtime
from explainer.inference.loading import WEIGHTS, load


def formats_by_suffix() -> dict[str, ExportFormat]:
    """Formats by the suffix of their files; those that fill a folder hold a file of one of them."""
    found: list[type[ExportFormat]] = list(plugins.discover("explainer.export").values())
    return {cls.suffix: cls() for cls in found if cls.folder is None}


def model_files(path: str | Path) -> list[Path]:
    """The model files in an export folder, sorted; a file is returned as it is."""
    path = Path(path)
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix in formats_by_suffix())
    return [path]


def open_model(path: str | Path, threads: int | None = None, given: Given | None = None) -> Runtime:
    """Open a model for inference.

    Args:
        path: a ``.ckpt`` of train.py, an export folder (its ``model.safetensors``, or its only model file), or an exported file.
        threads: number of threads in one call, where the runtime can be told.
        given: see :func:`explainer.load`: the classifier of a shared encoder; an exported file holds its own.

    Raises:
        CheckpointError: nothing usable there, or several files of which one must be chosen.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"model {path} does not exist. Give a .ckpt, an export folder, or an exported file.")
    if path.is_dir() and not (path / WEIGHTS).is_file():
        found = model_files(path)
        if len(found) != 1:
            listing = ", ".join(p.name for p in found) or "none"
            raise CheckpointError(f"{path} holds {len(found)} model files ({listing}), expected {WEIGHTS} or exactly one. Give the file.")
        path = found[0]
    form = formats_by_suffix().get(path.suffix)
    if form is not None and path.is_file():
        return form.open(path, threads, given)
    return EagerRuntime(load(path, given=given), threads)
