"""What the folders have in common that hold an ONNX file and all that runs it elsewhere: a web page, a Space, a server's models."""

from __future__ import annotations

import abc
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from explainer.export.onnx import Onnx
from explainer.files import write_text
from explainer.geometry import height_width
from explainer.inference.formats import DEFAULT_SIDE, Array, ExportModel, ExportOptions

#: The parts of this package that run an ONNX file without torch; with an empty ``__init__`` they are a package of their own.
_ALONE = ("errors.py", "geometry.py", "inference/predictor.py")


class Bundle(Onnx):
    """An ONNX file and what goes with it. A concrete class has a ``name``, a ``folder`` and :meth:`surround`."""

    def write(self, model: ExportModel, path: Path, options: ExportOptions) -> None:
        """See :class:`ExportFormat`."""
        super().write(model, path, options)
        depth = len(PurePosixPath(self.file_name(path.stem)).parts)
        self.surround(model, path, path.parents[depth - 1], options)

    @abc.abstractmethod
    def surround(self, model: ExportModel, path: Path, folder: Path, options: ExportOptions) -> None:
        """Write everything but the model.

        Args:
            model: that was written.
            path: path of its ONNX file.
            folder: that is filled; ``path`` lies in it.
            options: options of the export.
        """


def template(name: str) -> str:
    """Text of a file that goes out as it is."""
    return resources.files("explainer").joinpath("export", "templates", name).read_text(encoding="utf-8")


def write_predictor(folder: Path) -> None:
    """Put the torch-free :class:`~explainer.inference.predictor.Predictor` beside the model: ``folder/explainer``."""
    for name in _ALONE:
        place = folder / "explainer" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(place, resources.files("explainer").joinpath(*name.split("/")).read_text(encoding="utf-8"))
    words = '"""The part of explainer that runs an exported model: no torch."""\n'
    for package in ("explainer", "explainer/inference"):
        write_text(folder / package / "__init__.py", words)


def write_examples(images: Array | None, folder: Path) -> list[str]:
    """Pictures ``[N,3,H,W]`` in [0,1] as PNG files in ``folder``, which is made if there are any; their names."""
    names = []
    for number, image in enumerate(() if images is None else images, 1):
        folder.mkdir(exist_ok=True)
        names.append(f"example_{number}.png")
        Image.fromarray((image.transpose(1, 2, 0) * 255).round().astype(np.uint8)).save(folder / names[-1])
    return names


def network_size(description: dict[str, Any]) -> tuple[int, int]:
    """``(height, width)`` at which a file is run: the one it is fixed to, or was trained at."""
    return height_width(description.get("size") or description.get("image_size") or DEFAULT_SIDE)
