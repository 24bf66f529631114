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
from explainer.look.charts import Series, chart_values, enlargements, rotations
from explainer.look.components import components, pooled
from explainer.look.neighbors import nearest
from explainer.report.page import rendered

_BATCH = 8  # images per forward pass
_SHOWN = 256  # longest side of an embedded picture, in pixels


@dataclass(frozen=True)
class Options:
    """What is shown.

    Attributes:
        layers: module paths (``relu#0`` is the first call of a module that is called several times; default its last). None: the last
            feature map.
        side: side length in pixels, of the squares that the classifier sees, or (height, width); None: its own, or 224.
        grid: most patches a side.
        limit: most images, spread evenly over those found.
        title: title of the page.
        beside: further classifiers with their layers and sides, see :class:`Beside`.
        components: number of components that the patches of a layer are taken apart into (needs scikit-learn); 0: none.
        data: folder in which the nearest patches are looked for, or None.
        data_limit: most images of ``data``, spread evenly over those found.
        neighbors: nearest patches of each patch, each from another image of ``data``.
        rotate: the first image is shown turned by 0, so many, ... degrees, with a chart; None: not.
        zoom: the first image is shown enlarged by 1.35, 1.35 ** 2, ..., this many times, with a chart; None: not.
        disc: show of turned images only the largest disc.
    """

    layers: Sequence[str] | None = None
    side: Size | None = None
    grid: int = 16
    limit: int = 12
    title: str = "Similarity of patches"
    beside: Sequence[Beside] = ()
    components: int = 0
    data: str | Path | None = None
    data_limit: int = 200
    neighbors: int = 12
    rotate: int | None = None
    zoom: int | None = None
    disc: bool = False


@dataclass(frozen=True)
class Beside:
    """A further classifier on the same page. Similarities are within each one's own layers, never across.

    Attributes:
        name: on the page.
        explanandum: the classifier.
        layers, side: as in :class:`Options`.
    """

    name: str
    explanandum: Any
    layers: Sequence[str] | None = None
    side: Size | None = None


@dataclass
class Panel:
    """One row of the page: a layer of a classifier.

    Attributes:
        name: heading.
        vectors: what :func:`patch_vectors` returns, ``[N,h,w,C]``.
        components: how much each patch holds of each component, ``[N,h,w,R]``, or None.
        neighbors: nearest patches of each patch, ``[N,h,w,M,3]`` int: image of the folder, patch, cosine times 1000; or None.
        cells: (height, width) in patches of the folder's images.
        chart: what :func:`~explainer.look.charts.chart_values` returns, or None.
    """

    name: str
    vectors: Tensor
    components: Tensor | None = None
    neighbors: Tensor | None = None
    cells: tuple[int, int] = (1, 1)
    chart: Tensor | None = None


def feature_maps(explanandum: Any, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """Outputs of layers.

    Args:
        explanandum: the classifier; left as it was.
        images: ``[N,3,H,W]`` in [0,1].
        layers: module paths; see :class:`Options`.

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
    return F.normalize(pooled(features, grid), dim=1, eps=1e-12).permute(0, 2, 3, 1).contiguous()


def similarities(vectors: Tensor, image: int, row: int, column: int) -> Tensor:
    """Cosine of one patch with every patch, ``[N,h,w]`` in [-1,1]; 0 where either vector is zero.

    Args:
        vectors: what :func:`patch_vectors` returns.
        image, row, column: place of the one patch.
    """
    return torch.einsum("nhwc,c->nhw", vectors, vectors[image, row, column])


def eight_bits(vectors: Tensor) -> np.ndarray:
    """``[N,h,w,C]`` as int8 of the same direction (each vector scaled to a largest magnitude of 127): an eighth of a page's size.

    The cosine needs no scale; its error from rounding is below 0.01.
    """
    top = vectors.abs().amax(dim=-1, keepdim=True)
    return (vectors / torch.where(top > 0, top, torch.ones_like(top)) * 127).round().to(torch.int8).cpu().numpy()


def overlay_page(
    pictures: Sequence[tuple[str, str]],
    panels: Sequence[Panel],
    title: str,
    *,
    found: Sequence[tuple[str, str]] = (),
    chart: Series | None = None,
) -> str:
    """The file: pictures, vectors and script, nothing from elsewhere.

    Args:
        pictures: N names and pictures (data URIs).
        panels: the rows.
        title: title of the page.
        found: names and pictures of the folder's images, in the numbering of the panels' ``neighbors``.
        chart: the states that the pictures are, where panels have charts.
    """
    layers = []
    for panel in panels:
        values = panel.vectors
        entry: dict[str, Any] = {"name": panel.name, "height": values.shape[1], "width": values.shape[2], "channels": values.shape[3]}
        entry["data"] = _base64(eight_bits(values))
        if panel.components is not None:
            top = panel.components.max()
            shares = panel.components / (top if float(top) > 0 else 1)
            entry["components"] = {
                "count": shares.shape[3],
                "data": _base64((shares * 255).round().to(torch.uint8).numpy()),
            }
        if panel.neighbors is not None:
            entry["neighbors"] = {
                "count": panel.neighbors.shape[3],
                "height": panel.cells[0],
                "width": panel.cells[1],
                "data": _base64(panel.neighbors.to(torch.int16).numpy().astype("<i2")),
            }
        if panel.chart is not None:
            hundredths = torch.where(panel.chart.isnan(), torch.full_like(panel.chart, -128), (panel.chart * 100).round())
            entry["chart"] = _base64(hundredths.to(torch.int8).numpy())
        layers.append(entry)
    content: dict[str, Any] = {"images": _shown(pictures), "layers": layers, "found": _shown(found)}
    if chart is not None:
        content["chart"] = {"labels": chart.labels, "title": chart.title}
    data = json.dumps(content).replace("<", "\\u003c")
    return rendered("look/similarity.html", title=title, data=Markup(data))  # its only character that HTML could see is escaped above


def _shown(pictures: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"name": name, "picture": picture} for name, picture in pictures]


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _embedded(picture: Picture) -> str:
    return _picture_uri(picture.pixels)


def _picture_uri(pixels: Tensor) -> str:
    return data_uri(Image.fromarray(pixels.permute(1, 2, 0).numpy()))


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
        ConfigError: a classifier gives scores only, a layer cannot be shown, or options exclude each other.
        CorruptSampleError: an image cannot be read.
    """
    o, out = options or Options(), Path(out)
    models = [Beside("", explanandum, o.layers, o.side), *o.beside]
    if any(not m.explanandum.differentiable for m in models):
        raise ConfigError("this classifier gives scores only: it has no layers that could be looked at. Give a checkpoint.")
    files = list(find_pictures(inputs).items())
    if o.rotate is not None or o.zoom is not None:
        return _write_chart(files, models, out, o)
    chosen = _spread(files, o.limit)
    others = [] if o.data is None else _spread(list(find_pictures([o.data]).items()), o.data_limit)
    panels: list[Panel] = []
    for model in models:
        size = _size(model)
        pictures = [load_picture(*file, size) for file in chosen]
        images = torch.from_numpy(np.stack([p.small for p in pictures])).to(model.explanandum.mean)
        layers = list(dict.fromkeys(model.layers)) if model.layers else [default_layer(model.explanandum, images)]
        features = {name: pooled(values, o.grid) for name, values in feature_maps(model.explanandum, images, layers).items()}
        database = _database(model.explanandum, others, size, layers, o.grid) if others else {}
        for name, values in features.items():
            panel = Panel(f"{model.name}: {name}" if model.name else name, patch_vectors(values, o.grid))
            if o.components:
                panel.components = components(values, o.components)[0]
            if others:
                panel.neighbors = _neighbors(panel.vectors, database[name], o.neighbors)
                panel.cells = (database[name].shape[-2], database[name].shape[-1])
            panels.append(panel)
    used = sorted({int(n) for p in panels if p.neighbors is not None for n in p.neighbors[..., 0].unique()})
    numbers = {n: i for i, n in enumerate(used)}
    for panel in panels:
        if panel.neighbors is not None:
            panel.neighbors[..., 0] = panel.neighbors[..., 0].apply_(lambda n: numbers[int(n)])
    found = [(others[n][0], _embedded(load_picture(*others[n], (8, 8)))) for n in used]
    shown = [(name, _embedded(load_picture(name, path, (8, 8)))) for name, path in chosen]
    write_text(out, overlay_page(shown, panels, o.title, found=found))
    return out


def _write_chart(files: Sequence[tuple[str, Path]], models: Sequence[Beside], out: Path, o: Options) -> Path:
    """The page of one picture in several states."""
    if (o.rotate is not None and o.zoom is not None) or o.data is not None or o.components:
        raise ConfigError("a page turns one image (rotate) or enlarges it (zoom): one of both, without data and components.")
    if len(files) != 1:
        raise ConfigError(f"rotate and zoom show one image in several states, received {len(files)}. Name one image.")
    panels: list[Panel] = []
    first: Series | None = None
    for model in models:
        size = _size(model)
        picture = load_picture(*files[0], size)
        mean = [float(v) for v in model.explanandum.mean.expand(3)]
        if o.rotate is not None:
            series = rotations(torch.from_numpy(picture.small), o.rotate, mean, o.disc)
        else:
            series = enlargements(picture.pixels, size, o.zoom or 0)
        first = first or series
        images = series.images.to(model.explanandum.mean)
        layers = list(dict.fromkeys(model.layers)) if model.layers else [default_layer(model.explanandum, images)]
        for name, values in feature_maps(model.explanandum, images, layers).items():
            values = pooled(values, o.grid)
            title = f"{model.name}: {name}" if model.name else name
            panels.append(Panel(title, patch_vectors(values, o.grid), chart=chart_values(values.cpu(), series)))
    assert first is not None
    shown = [(label, _picture_uri((x * 255).round().to(torch.uint8))) for label, x in zip(first.labels, first.images, strict=True)]
    write_text(out, overlay_page(shown, panels, o.title, chart=first))
    return out


def _size(model: Beside) -> tuple[int, int]:
    return height_width(model.side or model.explanandum.input_size or DEFAULT_SIDE)


def _spread(files: Sequence[tuple[str, Path]], limit: int) -> list[tuple[str, Path]]:
    count = min(limit, len(files))
    return [files[i * len(files) // count] for i in range(count)]


def _database(
    explanandum: Any, files: Sequence[tuple[str, Path]], size: tuple[int, int], layers: Sequence[str], grid: int
) -> dict[str, Tensor]:
    """Patches of every image of a folder, ``{layer: [N,C,h,w]}`` in half precision: the largest thing here."""
    parts: dict[str, list[Tensor]] = {name: [] for name in layers}
    for start in range(0, len(files), _BATCH):
        images = torch.from_numpy(np.stack([load_picture(*f, size).small for f in files[start : start + _BATCH]])).to(explanandum.mean)
        for name, values in feature_maps(explanandum, images, layers).items():
            # Directions: large activations would overflow.
            parts[name].append(F.normalize(pooled(values, grid), dim=1, eps=1e-12).to(torch.float16))
    return {name: torch.cat(values) for name, values in parts.items()}


def _neighbors(vectors: Tensor, database: Tensor, count: int) -> Tensor:
    """``[N,h,w,M,3]`` int64, see :class:`Panel`."""
    N, h, w, C = vectors.shape
    width = database.shape[3]
    answers = nearest(vectors.reshape(-1, C), database, count)
    rows = [[(n, r * width + c, round(1000 * cosine)) for n, r, c, cosine in answer] for answer in answers]
    return torch.tensor(rows).view(N, h, w, -1, 3)
