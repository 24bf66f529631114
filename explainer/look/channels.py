"""Channel attribution made visible: which channels of a layer keep a decision, where they act, and what they stand for.

R. Fong, M. Patrick, A. Vedaldi, "Understanding Deep Networks via Extremal Perturbations and Smooth Masks", ICCV 2019, section 5. m_a* is
the mask of the fewest channels with which the class keeps its logit. Its map is v = sum_k m_a*^k Phi_l^k(x) (eq. 11), and the image that it
stands for is the inversion of m_a* (x) Phi_l(x) (eq. 12, :mod:`explainer.look.inversion`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from explainer.attribution.stages import default_layer
from explainer.baselines.extremal_perturbation import ExtremalPerturbation
from explainer.baselines.kernels.extremal_masks import smallest_sufficient
from explainer.baselines.kernels.features import forward_features
from explainer.baselines.kernels.hooks import find_layer, untouched
from explainer.errors import ConfigError
from explainer.figures import overlay, panel_sheet, signed_overlay
from explainer.files import replacing, write_json
from explainer.geometry import Size, height_width
from explainer.inference.explaining import class_indices, safe_name
from explainer.inference.formats import DEFAULT_SIDE
from explainer.inference.pictures import find_pictures, load_picture
from explainer.look.inversion import Inversion, Objective, Prior, color_matrix, invert

AREAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
_COLUMNS = 4  # of a sheet: image, attribution and two inversions, and below them the top channels


@dataclass(frozen=True)
class Options:
    """What is shown.

    Attributes:
        classes: names; None: of each image the class with the highest score.
        layer: module path; None: the last feature map.
        areas: fractions of the channels in (0,1), or numbers of channels.
        iterations: number of iterations of the search of each mask.
        top: channels an image and class that are inverted by themselves.
        prior, objective, steps, seed: settings of the feature inversion; see :func:`~explainer.look.inversion.invert`.
        limit: most images, spread evenly over those found.
        side: side length in pixels, of the squares that the classifier sees, or (height, width); None: its own, or 224.
    """

    classes: Sequence[str] | None = None
    layer: str | None = None
    areas: Sequence[float] = AREAS
    iterations: int = 300
    top: int = 3
    prior: Prior = "fourier"
    objective: Objective = "dot"
    steps: int | None = None
    seed: int = 0
    limit: int = 12
    side: Size | None = None


@dataclass(frozen=True)
class ChannelAttribution:
    """m_a* of B decisions.

    Attributes:
        masks: ``[B,C]`` in [0,1]. All ones where no area suffices.
        kept: B numbers of channels, a*.
        reached: ``[B]`` bool, whether an area suffices.
        monotone: ``[B]`` bool, whether the class's logit never falls when more channels are kept.
        features: ``[B,C,h,w]``, Phi_l(x).
    """

    masks: Tensor
    kept: list[int]
    reached: Tensor
    monotone: Tensor
    features: Tensor

    @property
    def maps(self) -> Tensor:
        """V of eq. 11, ``[B,h,w]``."""
        return torch.einsum("bc,bchw->bhw", self.masks, self.features)

    def top(self, count: int) -> list[list[int]]:
        """Per decision the kept channels that shape the map the most, ``m^k`` times the standard deviation of Phi^k(x) over positions.

        A channel that is the same everywhere (a ReLU6 at its bound) lifts the map and points nowhere, so that it never counts.
        """
        parts = self.masks * self.features.flatten(2).std(2, unbiased=False)
        return [[int(k) for k in row.argsort(descending=True, stable=True)[:count] if row[k] > 0] for row in parts]


def attribute(
    explanandum: Any, images: Tensor, class_index: Tensor, layer: str, *, areas: Sequence[float] = AREAS, iterations: int = 300
) -> ChannelAttribution:
    """The channels of a layer that keep each decision (section 5).

    Args:
        explanandum: the classifier.
        images: ``[B,3,H,W]`` in [0,1].
        class_index: ``[B]``.
        layer: module path of a layer that runs once and returns a feature map.
        areas: fractions of the channels in (0,1), or numbers of channels.
        iterations: number of iterations of the search.

    Raises:
        ConfigError: areas or layer cannot be used.
    """
    method = ExtremalPerturbation(explanandum, areas=areas, layer=layer, iterations=iterations)
    found = method.channel_masks(images, class_index)
    chosen, reached = smallest_sufficient(found.preserved, found.original, tuple(float(k) for k in found.kept))
    masks = found.masks[torch.arange(len(images)), chosen]
    masks = torch.where(reached[:, None], masks, torch.ones_like(masks))
    order = sorted(range(len(found.kept)), key=lambda a: found.kept[a])
    with untouched(explanandum), torch.no_grad():
        _, (features,) = forward_features(explanandum, {layer: find_layer(explanandum.classifier, layer)}, images)
    kept = [found.kept[int(a)] if r else masks.shape[1] for a, r in zip(chosen, reached, strict=True)]
    return ChannelAttribution(masks, kept, reached, (found.preserved[:, order].diff(dim=1) >= 0).all(1), features.values)


def class_statistics(masks: Tensor, class_index: Tensor) -> dict[int, dict[str, Any]]:
    """What the masks of a class have in common (section 5.2).

    Args:
        masks: ``[N,C]``, m_a* of N decisions.
        class_index: ``[N]``.

    Returns:
        Per class: ``images``, ``mean`` mbar_c ``[C]``, ``channel`` k*_c = argmax mbar_c, its ``specificity`` (mbar_c less the mean of the
        other classes' there; None with one class) and ``shared_with``, the classes with the same k*_c.
    """
    classes = class_index.unique().tolist()
    means = torch.stack([masks[class_index == c].mean(0) for c in classes])
    best = means.argmax(1).tolist()
    statistics = {}
    for row, (c, k) in enumerate(zip(classes, best, strict=True)):
        others = [i for i in range(len(classes)) if i != row]
        statistics[c] = {
            "images": int((class_index == c).sum()),
            "mean": means[row].tolist(),
            "channel": k,
            "specificity": float(means[row, k] - means[others, k].mean()) if others else None,
            "shared_with": [classes[i] for i in others if best[i] == k],
        }
    return statistics


def inversions(
    explanandum: Any, layer: str, features: Tensor, mask: Tensor, *, channels: Sequence[int], size: Size, **how: Any
) -> Inversion:
    """Inversions of one image's features: of all, of those that the mask keeps, and of single channels (mean over positions).

    Args:
        explanandum: the classifier.
        layer: module path.
        features: ``[C,h,w]``.
        mask: ``[C]``.
        channels: K numbers.
        size: size of the images.
        how: options of :func:`~explainer.look.inversion.invert`.

    Returns:
        Of 2 + K images, in this order.
    """
    single = torch.zeros(len(channels), *features.shape).to(features)
    for row, k in enumerate(channels):
        single[row, k] = 1 / features[k].numel()
    return invert(explanandum, layer, torch.cat([features[None], (mask[:, None, None] * features)[None], single]), size, **how)


def write_sheets(inputs: Sequence[str | Path], explanandum: Any, out: str | Path, options: Options | None = None) -> dict[str, Any]:
    """A sheet per image: input, attribution and inversions, below them the top channels; a block for each class.

    ``channels.json`` and ``masks.npy`` lie beside the sheets.

    Returns:
        What ``channels.json`` holds: rows as in ``masks.npy`` ``[N,C]``, and the statistics of each class.

    Raises:
        ConfigError: the classifier gives scores only, or an unknown class or layer, or areas that cannot be used.
        CorruptSampleError: an image cannot be read.
    """
    o, out = options or Options(), Path(out)
    if not explanandum.differentiable:
        raise ConfigError("this classifier gives scores only: it has no layers that could be looked at. Give a checkpoint.")
    names = explanandum.class_names
    chosen = class_indices(o.classes, names)
    size = height_width(o.side or explanandum.input_size or DEFAULT_SIDE)
    files = list(find_pictures(inputs).items())
    count = min(o.limit, len(files))
    pictures = [load_picture(*files[i * len(files) // count], size) for i in range(count)]
    images = torch.from_numpy(np.stack([p.small for p in pictures])).to(explanandum.mean)
    layer = o.layer or default_layer(explanandum, images)
    how = {"prior": o.prior, "objective": o.objective, "steps": o.steps, "seed": o.seed, "colors": color_matrix(images)}
    rows: list[dict[str, Any]] = []
    masks, indices = [], []
    for number, (picture, image) in enumerate(zip(pictures, images, strict=True)):
        with torch.no_grad():
            logits = explanandum(image[None])[0]
        classes = [int(logits.argmax())] if chosen is None else chosen
        index = torch.tensor(classes, device=image.device)
        found = attribute(explanandum, image.expand(len(classes), -1, -1, -1), index, layer, areas=o.areas, iterations=o.iterations)
        sheet, panels = f"{number:03d}_{safe_name(Path(picture.name).stem)}.png", []
        for row, (c, top) in enumerate(zip(classes, found.top(o.top), strict=True)):
            seen = inversions(explanandum, layer, found.features[row], found.masks[row], channels=top, size=size, **how)
            # What lies under the whole map says nothing about where.
            shape = found.maps[row] - found.maps[row].min().clamp(min=0)
            where = F.interpolate(shape[None, None], size, mode="bilinear", align_corners=False)[0, 0]
            kept = f"{found.kept[row]} of {found.masks.shape[1]}"
            stuck = [k for k, stays in zip(top, seen.stuck[2:].tolist(), strict=True) if stays]
            titles = ["all channels", f"{kept} channels", *(f"channel {k}" + (": no slope" if k in stuck else "") for k in top)]
            blank = [("", np.full((*size, 3), 255, np.uint8))] * (-len(top) % _COLUMNS)
            panels += [(picture.name, _pixels(image)), (f"{names[c]}: attribution", signed_overlay(image, where))]
            panels += [*zip(titles, map(_pixels, seen.images), strict=True), *blank]
            rows.append(
                {
                    "image": picture.name,
                    "sheet": sheet,
                    "class": names[c],
                    "logit": float(logits[c]),
                    "kept": found.kept[row],
                    "reached": bool(found.reached[row]),
                    "monotone": bool(found.monotone[row]),
                    "top": top,
                    "stuck": stuck,
                    "cosine": {"all": float(seen.cosine[0]), "kept": float(seen.cosine[1])},
                }
            )
        masks.append(found.masks)
        indices.append(index)
        panel_sheet(panels, out / sheet, columns=_COLUMNS)
    every = torch.cat(masks)
    with replacing(out / "masks.npy", durable=False) as stream:
        np.save(stream, every.cpu().numpy())
    statistics = {
        names[c]: {**of_class, "shared_with": [names[i] for i in of_class["shared_with"]]}
        for c, of_class in class_statistics(every, torch.cat(indices)).items()
    }
    described = {
        "layer": layer,
        "channels": every.shape[1],
        "size": list(size),
        "decisions": rows,
        "monotone": sum(r["monotone"] for r in rows) / len(rows),
        "classes": statistics,
    }
    write_json(out / "channels.json", described)
    return described


def _pixels(image: Tensor) -> np.ndarray:
    return overlay(image, torch.ones_like(image[0]))
