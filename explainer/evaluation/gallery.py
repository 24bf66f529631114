"""Small pictures of the first images, their objects and every method's maps, for the report's gallery.

Files of a results folder (names hold numbers only; labels and ids stay in the rows)::

    gallery/000017.jpg                  the image with index 17
    gallery/000017_truth_3.png          the object pixels of class 3
    gallery/<key of method>/000017_3.png    the method's map of class 3, grey: black 0, white 1

A map that is a mask in [0,1] by construction (a trained Explainer's) is stored as it is; others show their positive part over its maximum.
"""

from __future__ import annotations

import hashlib
import io
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from explainer.attribution import DenseAttributor
from explainer.evaluation.scene import Method, Scene

FOLDER = "gallery"
#: Longest side of a stored picture in pixels.
SIDE = 160


def method_folder(label: str) -> str:
    """Folder name of a method: a hash, as labels may hold any character."""
    return hashlib.sha256(label.encode()).hexdigest()[:12]


def image_file(index: int) -> str:
    """Of an image."""
    return f"{index:06d}.jpg"


def truth_file(index: int, label: int) -> str:
    """Of an object."""
    return f"{index:06d}_truth_{label}.png"


def map_file(method: str, index: int, label: int) -> str:
    """Of a map."""
    return f"{method_folder(method)}/{index:06d}_{label}.png"


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


def save(folder: str | Path, scene: Scene, images: int, method: Method | None = None, raw: Tensor | None = None) -> None:
    """Store the pictures of a batch's images whose index is below ``images``; existing files stay.

    Args:
        folder: results folder.
        scene: the batch.
        images: length of the gallery.
        method, raw: a method and its maps ``[B,K,H,W]``, NaN where a class was not asked for; without them image and objects are stored.
    """
    root = Path(folder) / FOLDER
    chosen: Sequence[tuple[int, int]] = [(b, i) for b, i in enumerate(scene.indices) if i < images]
    for b, index in chosen:
        classes = scene.explained[b].nonzero()[:, 0].tolist()
        if method is None or raw is None:
            _write(root / image_file(index), scene.images[b], "JPEG")
            for k in classes if scene.batch.masks is not None else []:
                _write(root / truth_file(index, k), scene.truth(torch.tensor([b]), torch.tensor([k]))[0], "PNG")
            continue
        for k in classes:
            if not bool(raw[b, k].isnan().all()):
                _write(root / map_file(method.label, index, k), shown(raw[b, k], isinstance(method.attributor, DenseAttributor)), "PNG")


def _write(path: Path, values: Tensor, kind: str) -> None:
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    # A JPEG of a small picture needs little loss to stay sharp.
    picture(values).save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {"optimize": True}))
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.tmp")
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(path)
