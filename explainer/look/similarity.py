"""Interactive similarity overlays: how similar a classifier's layer finds the patches of images.

R. Fong, A. Mordvintsev, A. Vedaldi, C. Olah, "Interactive Similarity Overlays", VISxAI 2021. A patch is one position of a layer's feature
map; two patches, of the same or of two images, are as similar as the cosine of the angle between their feature vectors.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from explainer.attribution import check_images
from explainer.attribution.layouts import Known, layout_of
from explainer.attribution.stages import default_layer
from explainer.attribution.watching import out_of_place
from explainer.baselines.kernels.hooks import capture, find_layer, untouched
from explainer.errors import ConfigError
from explainer.files import write_text
from explainer.geometry import Size, height_width
from explainer.inference.formats import DEFAULT_SIDE
from explainer.inference.pictures import Picture, find_pictures, load_picture
from explainer.report.page import rendered

_BATCH = 8  # images per forward pass
_SHOWN = 256  # longest side of an embedded picture, in pixels


@dataclass(frozen=True)
class Options:
    """What is shown.

    Attributes:
        layers: module paths (``relu#0`` is the first call of a module that is called several times; default its last). None: the last
            feature map.
        side: in pixels, of the squares that the classifier sees, or (height, width); None: its own, or 224.
        grid: most patches a side.
        limit: most images, spread evenly over those found.
        title: of the page.
    """

    layers: Sequence[str] | None = None
    side: Size | None = None
    grid: int = 16
    limit: int = 12
    title: str = "Similarity of patches"


def feature_maps(explanandum: Any, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """Outputs of layers.

    Args:
        explanandum: the classifier; left as it was.
        images: ``[N,3,H,W]`` in [0,1].
        layers: see :class:`Options`.

    Returns:
        ``{layer: [N,C,h,w]}``.

    Raises:
        ConfigError: no such layer, or one whose output is not a feature map.
        UnsupportedLayerError: rows and columns of its output cannot be told from its channels.
    """
    check_images(images)
    classifier = explanandum.classifier
    modules = {layer: find_layer(classifier, layer.partition("#")[0]) for layer in layers}
    found: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    known: Known = {}
    with untouched(explanandum), torch.no_grad(), out_of_place(classifier):
        for part in images.split(_BATCH):
            with capture(*dict.fromkeys(modules.values())) as seen:
                explanandum(part)
            for layer, module in modules.items():
                output = _call(layer, seen[module])
                layout = layout_of(explanandum, layer, module, shape=output.shape, images=images, known=known)
                found[layer].append(layout.spatial(output))
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def _call(layer: str, outputs: list[Tensor]) -> Tensor:
    number = layer.partition("#")[2]
    if number and (not number.isdecimal() or int(number) >= len(outputs)):
        raise ConfigError(f"layer {layer!r}: the module is called {len(outputs)} time(s); #0 is the first.")
    if not outputs:
        raise ConfigError(f"layer {layer!r} is not used when the classifier is called. Name another with --layers.")
    output = outputs[int(number) if number else -1]
    if not isinstance(output, Tensor) or output.ndim not in (3, 4):
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(f"layer {layer!r} gives {shape}, expected a feature map [B,C,h,w] or tokens. Name another with --layers.")
    return output


def patch_vectors(features: Tensor, grid: int) -> Tensor:
    """Directions of the patches: ``[N,C,h,w]`` -> unit vectors ``[N,h',w',C]``; a vector of zeros stays zero.

    A map finer than ``grid`` patches a side is averaged to ``grid`` first.
    """
    size = (min(features.shape[-2], grid), min(features.shape[-1], grid))
    pooled = F.adaptive_avg_pool2d(features, size) if size != tuple(features.shape[-2:]) else features
    return F.normalize(pooled, dim=1, eps=1e-12).permute(0, 2, 3, 1).contiguous()


def similarities(vectors: Tensor, image: int, row: int, column: int) -> Tensor:
    """Cosine of one patch with every patch, ``[N,h,w]`` in [-1,1]; 0 where either vector is zero.

    Args:
        vectors: of :func:`patch_vectors`.
        image, row, column: of the one patch.
    """
    return torch.einsum("nhwc,c->nhw", vectors, vectors[image, row, column])


def eight_bits(vectors: Tensor) -> np.ndarray:
    """``[N,h,w,C]`` as int8 of the same direction (each vector scaled to a largest magnitude of 127): an eighth of a page's size.

    The cosine needs no scale; its error from rounding is below 0.01.
    """
    top = vectors.abs().amax(dim=-1, keepdim=True)
    return (vectors / torch.where(top > 0, top, torch.ones_like(top)) * 127).round().to(torch.int8).cpu().numpy()


def overlay_page(pictures: Sequence[Picture], vectors: dict[str, Tensor], title: str) -> str:
    """The file: pictures, vectors and script, nothing from elsewhere.

    Args:
        pictures: N images.
        vectors: ``{layer: [N,h,w,C]}`` of :func:`patch_vectors`.
        title: of the page.
    """
    layers = []
    for name, values in vectors.items():
        encoded = base64.b64encode(eight_bits(values).tobytes()).decode()
        layers.append({"name": name, "height": values.shape[1], "width": values.shape[2], "channels": values.shape[3], "data": encoded})
    shown = [{"name": p.name, "picture": _embedded(p)} for p in pictures]
    data = json.dumps({"images": shown, "layers": layers}).replace("<", "\\u003c")
    return rendered("look/similarity.html", title=title, data=Markup(data))  # its only character that HTML could see is escaped above


def _embedded(picture: Picture) -> str:
    return data_uri(Image.fromarray(picture.pixels.permute(1, 2, 0).numpy()))


def data_uri(image: Image.Image) -> str:
    """A picture inside a page, at most 256 pixels a side (``image`` is reduced in place)."""
    image.thumbnail((_SHOWN, _SHOWN))
    kind, options = ("png", {}) if max(image.size) <= 96 else ("jpeg", {"quality": 88})
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_overlay(inputs: Sequence[str | Path], explanandum: Any, out: str | Path, options: Options | None = None) -> Path:
    """Write the page for images and folders; returns its path.

    Raises:
        ConfigError: the classifier gives scores only, or a layer cannot be shown.
        CorruptSampleError: an image cannot be read.
    """
    o, out = options or Options(), Path(out)
    if not explanandum.differentiable:
        raise ConfigError("this classifier gives scores only: it has no layers that could be looked at. Give a checkpoint.")
    size = height_width(o.side or explanandum.input_size or DEFAULT_SIDE)
    files = list(find_pictures(inputs).items())
    count = min(o.limit, len(files))
    pictures = [load_picture(*files[i * len(files) // count], size) for i in range(count)]
    images = torch.from_numpy(np.stack([p.small for p in pictures])).to(explanandum.mean)
    layers = list(dict.fromkeys(o.layers)) if o.layers else [default_layer(explanandum, images)]
    features = feature_maps(explanandum, images, layers)
    vectors = {name: patch_vectors(values, o.grid) for name, values in features.items()}
    write_text(out, overlay_page(pictures, vectors, o.title))
    return out
