"""A decision explained by feature vectors: SRD's map, effective receptive fields, nearest vectors and a recursive explanation.

S. Han, Y. Kim, N. Kwak, "Respect the model", ICLR 2024, appendix A. The root of the tree is a class. Its children are the vectors of the
encoder's output with the largest relevance R_i, shown as shares of the sum of R. The children of a vector j are the vectors i of the
activations before it with the largest sharing ratio mu_{i->j} (eq. 6), which may be negative or above 1.
"Rest" is 1 minus the shown shares.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from explainer.baselines.srd import SRD
from explainer.errors import ConfigError
from explainer.figures import overlay, panel_sheet, signed_overlay, visible
from explainer.files import replacing, write_json, write_text
from explainer.geometry import Size, height_width
from explainer.inference.explaining import class_indices
from explainer.inference.formats import DEFAULT_SIDE
from explainer.inference.pictures import Picture, find_pictures, load_picture
from explainer.look.neighbors import nearest
from explainer.look.similarity import data_uri
from explainer.report.page import rendered

_BATCH = 8  # images per pass: a recorded pass keeps every activation
_MASS = 0.9  # share of a receptive field's positive part that its box holds
_ABLATIONS: tuple[tuple[str, dict[str, Any]], ...] = (("single neurons", {"unit": "scalar"}), ("behind activations", {"vector": "post"}))


@dataclass(frozen=True)
class Options:
    """What is shown.

    Attributes:
        class_name: None: the class with the highest score.
        layer: whose strongest vectors are shown; None: the encoder's output.
        vectors: how many of them.
        children: largest number of children of every node of the tree.
        depth: levels of vectors below the class.
        data: folder in which the nearest vectors are looked for, or None.
        neighbors: per vector, each from another image.
        limit: most images of ``data``, spread evenly over those found.
        side: side in pixels of the squares that the classifier sees, or (height, width); None: its own, or 224.
        ablations: show SRD's two ablations beside its map.
    """

    class_name: str | None = None
    layer: str | None = None
    vectors: int = 6
    children: int = 3
    depth: int = 2
    data: str | None = None
    neighbors: int = 3
    limit: int = 100
    side: Size | None = None
    ablations: bool = False


@dataclass
class VectorNode:
    """One vector of the tree.

    Attributes:
        layer: module path.
        row, column: pixel of its map.
        share: this vector's share in the parent's relevance, see the module.
        path_share: product of the shares from the root down to here.
        field: its effective receptive field ``[h_0,w_0]``, sum 1.
        rest: 1 minus the shares of the children that are shown; None without children.
        children: largest share first.
        neighbors: the nearest vectors in other images, nearest first.
    """

    layer: str
    row: int
    column: int
    share: float
    path_share: float
    field: Tensor
    rest: float | None = None
    children: list[VectorNode] = dataclasses.field(default_factory=list)
    neighbors: list[Neighbor] = dataclasses.field(default_factory=list)


@dataclass
class Neighbor:
    """A vector of another image: the image's number, the pixel of its map, the cosine, and its receptive field ``[h_0,w_0]``."""

    image: int
    row: int
    column: int
    cosine: float
    field: Tensor


def strongest(vectors: Tensor, count: int) -> list[tuple[int, int]]:
    """(row, column) of the vectors with the largest norms, largest first.

    Args:
        vectors: ``[C,h,w]``.
        count: at most so many.
    """
    return [place for place, _ in _largest(torch.linalg.vector_norm(vectors, dim=0), count)]


def _largest(values: Tensor, count: int) -> list[tuple[tuple[int, int], float]]:
    flat = values.flatten()
    order = flat.argsort(descending=True, stable=True)[:count].tolist()
    return [(divmod(i, values.shape[1]), float(flat[i])) for i in order]


def mass_box(receptive: Tensor, mass: float = _MASS) -> tuple[int, int, int, int]:
    """The box (top, left, bottom, right; half-open) around the smallest set of pixels that holds ``mass`` of the positive part.

    Args:
        receptive: ``[h,w]``. Without a positive value the box is the whole map.
        mass: share of the positive part that the pixels hold, in (0,1].
    """
    positive = receptive.double().clamp(min=0)
    total = float(positive.sum())
    if total <= 0:
        return 0, 0, receptive.shape[0], receptive.shape[1]
    values, order = positive.flatten().sort(descending=True, stable=True)
    before = values.cumsum(0) - values
    chosen = order[(before < mass * total - 1e-12 * total) & (values > 0)]
    rows, columns = chosen // receptive.shape[1], chosen % receptive.shape[1]
    return int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1


def receptive_fields(srd: SRD, image: Tensor, layer: str, places: Sequence[tuple[int, int]]) -> Tensor:
    """Effective receptive fields of several vectors of one image, ``[N,h_0,w_0]``.

    Args:
        srd: the method.
        image: ``[3,H,W]`` in [0,1].
        layer: module path.
        places: N pixels (row, column) of the layer's map.
    """
    where = torch.tensor(list(places)).reshape(-1, 2)
    return torch.cat([srd.erf(image.expand(len(part), -1, -1, -1), layer, part) for part in where.split(_BATCH)])


def explain_recursively(srd: SRD, image: Tensor, class_index: int, children: int, depth: int) -> tuple[list[VectorNode], float]:
    """The tree of vectors behind one decision.

    Args:
        srd: the method.
        image: ``[3,H,W]`` in [0,1].
        class_index: the root.
        children: largest number of children of every node.
        depth: levels below the root, at least 1.

    Returns:
        The root's children, largest share first, and the rest of the root's shares (0 where all are shown). No children where the class
        has no relevance.
    """
    encoder = list(srd.nodes(image[None]))[-1]
    relevance = srd.relevance(image[None], class_index, [encoder])[encoder][0]
    total = float(relevance.sum())
    if not total > 0:
        return [], 1.0
    first = [(encoder, place, value / total) for place, value in _largest(relevance, children) if value > 0]
    level = _nodes(srd, image, first, 1.0)
    roots = level
    for _ in range(depth - 1):
        below: list[VectorNode] = []
        for node in level:
            if node.layer == "input":
                continue
            sources = srd.shares(image[None], node.layer, (node.row, node.column))
            found = [(name, place, mu) for name, mus in sources.items() for place, mu in _largest(mus[0], children)]
            found = sorted(found, key=lambda f: -f[2])[:children]
            node.children = _nodes(srd, image, found, node.path_share)
            node.rest = 1 - sum(c.share for c in node.children)
            below += node.children
        level = below
    return roots, 1 - sum(n.share for n in roots)


def _nodes(srd: SRD, image: Tensor, found: Sequence[tuple[str, tuple[int, int], float]], above: float) -> list[VectorNode]:
    fields: dict[tuple[str, tuple[int, int]], Tensor] = {}
    for layer in dict.fromkeys(name for name, _, _ in found):
        places = [place for name, place, _ in found if name == layer]
        fields |= zip([(layer, place) for place in places], receptive_fields(srd, image, layer, places), strict=True)
    return [VectorNode(layer, *place, share, above * share, fields[layer, place]) for layer, place, share in found]


def all_nodes(roots: Sequence[VectorNode]) -> list[VectorNode]:
    """Every node of the tree, parents first."""
    return [node for root in roots for node in (root, *all_nodes(root.children))]


def add_neighbors(srd: SRD, image: Tensor, roots: Sequence[VectorNode], others: Tensor, count: int) -> None:
    """Give every node of the tree its nearest vectors in other images.

    Args:
        srd: the method.
        image: ``[3,H,W]``, the explained one.
        roots: what :func:`explain_recursively` returns.
        others: ``[N,3,H,W]``.
        count: per node, each from another image.
    """
    nodes = [node for node in all_nodes(roots) if node.layer != "input"]
    for layer in dict.fromkeys(node.layer for node in nodes):
        own = [node for node in nodes if node.layer == layer]
        # half precision: the database of a fine layer is the largest thing here
        database = torch.cat([srd.vectors(part, layer).to(torch.float16) for part in others.split(_BATCH)])
        vectors = srd.vectors(image[None], layer)[0]
        queries = torch.stack([vectors[:, node.row, node.column] for node in own])
        answers = nearest(queries, database, count)
        flat = [answer for row in answers for answer in row]
        where = torch.tensor([[row, column] for _, row, column, _ in flat]).reshape(-1, 2)
        numbers = torch.tensor([n for n, _, _, _ in flat])
        parts = zip(numbers.split(_BATCH), where.split(_BATCH), strict=True)
        fields = iter(torch.cat([srd.erf(others[n], layer, place) for n, place in parts]))
        for node, row in zip(own, answers, strict=True):
            node.neighbors = [Neighbor(*answer, next(fields)) for answer in row]


def write_view(file: str | Path, explanandum: Any, out: str | Path, options: Options | None = None) -> dict[str, Any]:
    """Look into one decision; writes ``srd.png``, ``fields.png``, ``tree.json`` and ``index.html`` into a folder.

    Returns:
        What ``tree.json`` holds.

    Raises:
        ConfigError: the classifier gives scores only, an unknown class or layer, or ``data`` holds no other image.
        UnsupportedLayerError: SRD has no rule for an operation of the classifier.
        CorruptSampleError: an image cannot be read.
    """
    o, out = options or Options(), Path(out)
    if not explanandum.differentiable:
        raise ConfigError("this classifier gives scores only: it has no layers that could be looked at. Give a checkpoint.")
    size = height_width(o.side or explanandum.input_size or DEFAULT_SIDE)
    picture = _one_picture(file, size)
    image = torch.from_numpy(picture.small).to(explanandum.mean)
    others = _other_pictures(o, Path(file), size)
    with torch.no_grad():
        logits = explanandum(image[None])[0]
    chosen = class_indices(None if o.class_name is None else [o.class_name], explanandum.class_names)
    class_index = int(logits.argmax()) if chosen is None else chosen[0]
    srd = SRD(explanandum)
    layer = o.layer or list(srd.nodes(image[None]))[-1]
    vectors = srd.vectors(image[None], layer)[0]
    places = strongest(vectors, o.vectors)
    fields = receptive_fields(srd, image, layer, places)
    srd_map = srd(image[None], class_index)[0]
    roots, rest = explain_recursively(srd, image, class_index, o.children, o.depth)
    if others:
        add_neighbors(srd, image, roots, torch.from_numpy(np.stack([p.small for p in others])).to(image), o.neighbors)
    norms = torch.linalg.vector_norm(vectors, dim=0)
    described: dict[str, Any] = {
        "image": picture.name,
        "class": explanandum.class_names[class_index],
        "logit": float(logits[class_index]),
        "probability": float(explanandum.probabilities(logits[None])[0, class_index]),
        "size": list(size),
        "layer": layer,
        "layer_size": list(vectors.shape[-2:]),
        "strongest": [
            {"row": row, "column": column, "norm": float(norms[row, column]), "box": list(mass_box(erf))}
            for (row, column), erf in zip(places, fields, strict=True)
        ],
        "children": [_described(node, others) for node in roots],
        "rest": rest,
    }
    top = f"{described['class']}: SRD"
    maps = [(top, srd_map)]
    if o.ablations:
        maps += [(f"{described['class']}: {title}", SRD(explanandum, **way)(image[None], class_index)[0]) for title, way in _ABLATIONS]
    panels = [(f"{layer} ({r}, {c})", _under(image, erf)) for (r, c), erf in zip(places, fields, strict=True)]
    shown = [(title, signed_overlay(image, visible(values, size))) for title, values in maps]
    panel_sheet([(picture.name, overlay(image, torch.ones_like(srd_map))), *shown], out / "srd.png")
    panel_sheet(panels, out / "fields.png")
    with replacing(out / "srd.npy", durable=False) as stream:
        np.save(stream, srd_map.cpu().numpy())
    write_json(out / "tree.json", described)
    page = rendered(
        "look/vectors.html",
        title=f"{picture.name}: why {described['class']}",
        described=described,
        photograph=_uri(overlay(image, torch.ones_like(srd_map))),
        maps=[{"title": title, "picture": _uri(pixels)} for title, pixels in shown],
        fields=[{"title": title, "picture": _uri(pixels)} for title, pixels in panels],
        nodes=[_shown(node, image, others) for node in roots],
    )
    write_text(out / "index.html", page)
    return described


def _one_picture(file: str | Path, size: tuple[int, int]) -> Picture:
    if Path(file).is_dir():
        raise ConfigError(f"{file} is a folder. Name one image.")
    ((name, path),) = find_pictures([file]).items()
    return load_picture(name, path, size)


def _other_pictures(o: Options, file: Path, size: tuple[int, int]) -> list[Picture]:
    """Pictures of the folder without the explained one."""
    if o.data is None:
        return []
    files = [(name, path) for name, path in find_pictures([o.data]).items() if path.resolve() != file.resolve()]
    if not files:
        raise ConfigError(f"{o.data} holds no image beside the explained one. Give a folder with more.")
    count = min(o.limit, len(files))
    return [load_picture(*files[i * len(files) // count], size) for i in range(count)]


def _described(node: VectorNode, others: Sequence[Picture]) -> dict[str, Any]:
    return {
        "layer": node.layer,
        "row": node.row,
        "column": node.column,
        "share": node.share,
        "path_share": node.path_share,
        "box": list(mass_box(node.field)),
        "rest": node.rest,
        "neighbors": [
            {"image": others[n.image].name, "row": n.row, "column": n.column, "cosine": n.cosine, "box": list(mass_box(n.field))}
            for n in node.neighbors
        ],
        "children": [_described(child, others) for child in node.children],
    }


def _shown(node: VectorNode, image: Tensor, others: Sequence[Picture]) -> dict[str, Any]:
    neighbors = []
    for n in node.neighbors:
        other = torch.from_numpy(others[n.image].small)
        neighbors.append({"title": f"{others[n.image].name}, cosine {n.cosine:.2f}", "picture": _uri(_crop(other, n.field))})
    where = f"{node.layer} ({node.row}, {node.column})"
    return {
        "title": f"{where}: share {node.share:.3f}, of the decision {node.path_share:.3f}",
        "picture": _uri(_under(image, node.field)),
        "crop": _uri(_crop(image, node.field)),
        "rest": None if node.rest is None else f"{node.rest:.3f}",
        "neighbors": neighbors,
        "children": [_shown(child, image, others) for child in node.children],
    }


def _under(image: Tensor, receptive: Tensor) -> np.ndarray:
    """The image where the receptive field is, dark elsewhere."""
    height, width = image.shape[-2:]
    return overlay(image, visible(receptive, (height, width)).clamp(min=0).sqrt().to(image))


def _crop(image: Tensor, receptive: Tensor) -> np.ndarray:
    """The part of the image that holds most of the receptive field, at least an eighth of the side so that it can be recognised."""
    (h, w), (height, width) = receptive.shape, image.shape[-2:]
    top, left, bottom, right = mass_box(receptive)
    rows = _widened(top * height // h, -(-bottom * height // h), height)
    columns = _widened(left * width // w, -(-right * width // w), width)
    part = image[:, rows, columns]
    return overlay(part, torch.ones_like(part[0]))


def _widened(start: int, stop: int, size: int) -> slice:
    missing = max(0, -(-size // 8) - (stop - start))
    start = max(0, min(start - missing // 2, size - (stop - start) - missing))
    return slice(start, max(stop, start + -(-size // 8)))


def _uri(pixels: np.ndarray) -> str:
    picture = Image.fromarray(pixels)
    if max(picture.size) < 96:  # pixels stay pixels
        scale = 96 // max(picture.size)
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    return data_uri(picture)
