"""Small pictures of images spread over the data, their objects and every method's maps, for the report's gallery.

Files of a results folder (names hold numbers and hashes only; labels and ids stay in the rows)::

    gallery/<key of data>/000017.jpg            the image with index 17
    gallery/<key of data>/000017_truth_3.png    the object pixels of class 3
    gallery/<key of map>/000017_3.png           a method's map of class 3, grey: black 0, white 1
    gallery/<key of map>/000017_none            (empty) looked at, and the protocols ask for no map of this image

The keys stand for everything that decides the pictures, so that no picture of an older classifier, method or data set is shown beside
newer numbers; ``summary.json`` names the folders and images of the last run.

A map that is a mask in [0,1] by construction (a trained Explainer's) is stored as it is; others show their positive part over its maximum.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from explainer.attribution import DenseAttributor
from explainer.evaluation.scene import Method, Scene
from explainer.files import replacing

FOLDER = "gallery"
#: Longest side of a stored picture in pixels.
SIDE = 160


def short_hash(text: str) -> str:
    """12 hex digits that stand for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def evenly(images: int, number: int) -> list[int]:
    """At most ``number`` of the indices 0 .. ``images`` - 1, the middles of equally long stretches, ascending."""
    number = min(images, number)
    return [(2 * i + 1) * images // (2 * number) for i in range(number)]


@dataclass(frozen=True)
class Gallery:
    """Where the pictures of one evaluation are.

    Attributes:
        root: the folder ``gallery`` of a results folder.
        indices: positions of the chosen images in the data set, ascending; None (results of an older version): whatever is there.
        reach: the images were chosen from the first so many of the split.
        data: folder of images and objects below ``root``.
        methods: folder of each method's maps, by label.
    """

    root: Path
    indices: tuple[int, ...] | None
    reach: int
    data: str
    methods: Mapping[str, str]

    @classmethod
    def of(cls, folder: str | Path, summary: Mapping[str, Any]) -> Gallery:
        """The gallery that ``summary.json`` of a results folder describes."""
        root, record = Path(folder) / FOLDER, summary.get("gallery")
        if record is None:  # an older version: the label alone was hashed, and images lay in the root
            return cls(root, None, int(summary["images"]), "", {label: short_hash(label) for label in summary["methods"]})
        return cls(root, tuple(record["indices"]), record["reach"], record["data"], record["methods"])

    def record(self) -> dict[str, Any]:
        """As JSON values; the inverse of :meth:`of`."""
        return {"indices": list(self.indices or ()), "reach": self.reach, "data": self.data, "methods": dict(self.methods)}

    def image(self, index: int) -> Path:
        """File of an image."""
        return self.root / self.data / f"{index:06d}.jpg"

    def truth(self, index: int, label: int) -> Path:
        """File of an object."""
        return self.root / self.data / f"{index:06d}_truth_{label}.png"

    def map(self, method: str, index: int, label: int) -> Path:
        """File of a map."""
        return self.root / self.methods[method] / f"{index:06d}_{label}.png"

    def lacking(self, method: str, indices: Sequence[int]) -> list[int]:
        """Those of the ``indices`` that are in the gallery and of which the method has neither a picture nor the note that it has none."""
        folder = self.root / self.methods[method]
        return [i for i in indices if i in (self.indices or ()) and next(folder.glob(f"{i:06d}_*"), None) is None]

    def save(self, scene: Scene) -> None:
        """Store image and objects of a batch's chosen images; existing files stay."""
        for b, index in self._chosen(scene):
            _write(self.image(index), scene.images[b], "JPEG")
            for k in _explained(scene, b) if scene.batch.masks is not None else []:
                _write(self.truth(index, k), scene.truth(torch.tensor([b]), torch.tensor([k]))[0], "PNG")

    def save_maps(self, scene: Scene, method: Method, raw: Tensor) -> None:
        """Store a method's maps ``[B,K,H,W]`` of the explained classes (NaN where a class was not asked for); existing files stay."""
        for b, index in self._chosen(scene):
            for k in _explained(scene, b):
                if not bool(raw[b, k].isnan().all()):
                    is_mask = isinstance(method.attributor, DenseAttributor)
                    _write(self.map(method.label, index, k), shown(raw[b, k], is_mask), "PNG")

    def note_none(self, method: str, index: int) -> None:
        """Remember that there is no map to show, so that the next run need not look again."""
        path = self.root / self.methods[method] / f"{index:06d}_none"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def _chosen(self, scene: Scene) -> list[tuple[int, int]]:
        return [(b, i) for b, i in enumerate(scene.indices) if i in (self.indices or ())]


def _explained(scene: Scene, row: int) -> list[int]:
    return [int(k) for k in scene.explained[row].nonzero()[:, 0]]


def picture(values: Tensor) -> Image.Image:
    """``[H,W]`` or ``[3,H,W]`` in [0,1] (NaN is black) as an 8-bit picture of at most :data:`SIDE` pixels."""
    array = (values.detach().cpu().float().nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    made = Image.fromarray(array if array.ndim == 2 else np.moveaxis(array, 0, 2))
    made.thumbnail((SIDE, SIDE))
    return made


def shown(saliency: Tensor, is_mask: bool) -> Tensor:
    """Map ``[H,W]`` -> what the gallery shows, in [0,1]."""
    positive = saliency.clamp(min=0)
    top = float(positive.nan_to_num(0).max())
    return positive.clamp(max=1) if is_mask or top == 0 else positive / top


def _write(path: Path, values: Tensor, kind: str) -> None:
    if path.is_file():
        return
    buffer = io.BytesIO()
    # A JPEG of a small picture needs little loss to stay sharp.
    picture(values).save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {"optimize": True}))
    with replacing(path, durable=False) as stream:
        stream.write(buffer.getvalue())
