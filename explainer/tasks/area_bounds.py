"""``losses.area_bound: {min_area: auto, max_area: auto}``: how large each class's evidence is, measured before training.

No ground truth is read. The classifier's class activation (Grad-CAM; occlusion, where layers cannot be seen) orders an image's pixels, and
the classifier's own scores say how many of the first ones are enough: the smallest share of the image that, shown alone, keeps half of the
class's probability, and the smallest one that, removed, leaves at most half of it. The lower bound of a class is half the lower quartile of
the first over its images, the upper bound twice the upper quartile of the larger of both.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from explainer import baselines
from explainer.data.contract import collate
from explainer.data.datamodule import DataModule
from explainer.data.samplers import spread, spread_over_classes
from explainer.errors import ExplainerError
from explainer.files import parse_json, write_json
from explainer.fills import FillKind, blend, judging_fill, make_fill
from explainer.losses.area import AreaBound
from explainer.losses.base import LossTerm

log = logging.getLogger(__name__)
FILE = "area_bounds.json"
IMAGES = 120
"""Most training images that are looked at, some of every class: about twenty passes each."""
SHARES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)
_LARGEST = 0.95
_PART = 8
#: Pixels of a position of a usual decoder (stride 8) by which a class counts as small.
_SMALL = 2 * 8**2


@torch.no_grad()
def evidence_areas(
    explanandum: Any, order: Any, images: Tensor, classes: Tensor, *, fill: FillKind = "mean", shares: Sequence[float] = SHARES
) -> tuple[Tensor, Tensor]:
    """How much of each image holds half of the evidence for its class.

    Args:
        explanandum: the classifier.
        order: attributor ``(images, classes) -> maps [N,H,W]``; the larger values come first.
        images: ``[N,3,H,W]``.
        classes: ``[N]``.
        fill: what replaces removed pixels.
        shares: shares of the image that are tried, rising; the last one is taken where none is enough.

    Returns:
        ``(enough, all)``, ``[N]`` each: the smallest share that alone keeps half of the class's probability, and the larger one of it
        and of the smallest whose removal leaves at most half.
    """
    with torch.enable_grad():
        maps = order(images, classes).detach()
    ranks = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    pixels = ranks.shape[1]
    hidden = make_fill(images, fill, mean=explanandum.mean, generator=torch.Generator().manual_seed(0))

    def probability(shown: Tensor) -> Tensor:
        asked: Tensor = explanandum.probabilities(explanandum(shown)).gather(1, classes[:, None])[:, 0]
        return asked

    whole = probability(images)
    enough, gone = (torch.full_like(whole, shares[-1]) for _ in range(2))
    for share in reversed(shares):
        first = torch.zeros_like(maps).flatten(1).scatter(1, ranks[:, : max(1, round(pixels * share))], 1.0).view_as(maps)
        enough = torch.where(probability(blend(images, first, hidden)) >= whole / 2, share, enough)
        gone = torch.where(probability(blend(images, 1 - first, hidden)) <= whole / 2, share, gone)
    return enough, torch.maximum(enough, gone)


def bounds(areas: Sequence[tuple[Tensor, Tensor]], pixels: int) -> tuple[Tensor, Tensor]:
    """Bounds ``[K]`` from each class's areas ``(enough [n_k], all [n_k])``; a class without images has those of all together.

    Args:
        areas: one pair a class.
        pixels: number of pixels of an image; a lower bound is one pixel at least.
    """
    together = tuple(torch.cat([pair[i] for pair in areas]) for i in range(2))
    if len(together[0]) == 0:
        return torch.full((len(areas),), 1 / pixels), torch.full((len(areas),), _LARGEST)
    low, high = [], []
    for own in areas:
        enough, every = own if len(own[0]) else together
        low.append(max(1 / pixels, float(enough.quantile(0.25)) / 2))
        high.append(max(low[-1], min(_LARGEST, 2 * float(every.quantile(0.75)))))
    return torch.tensor(low), torch.tensor(high)


def measure(explanandum: Any, data: DataModule, seed: int = 0, fill: str = "mean") -> dict[str, tuple[float, float]]:
    """Lower and upper bound by class name, from the training split's images of which the classifier finds the class.

    Args:
        explanandum: the classifier.
        data: images with labels; masks are not read.
        seed: seed of the choice of images.
        fill: fill of the training.
    """
    dataset, K = data.dataset("train"), data.num_classes
    number = min(IMAGES, len(dataset))
    positions = spread_over_classes(data.members("train"), number, seed) if dataset.cheap_targets else spread(len(dataset), number, seed)
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(K)]
    order, pixels = None, 1
    for first in range(0, number, _PART):
        batch = collate([dataset[i] for i in positions[first : first + _PART]]).to(explanandum.mean.device)
        pixels = batch.images.shape[-2] * batch.images.shape[-1]
        with torch.no_grad():
            logits = explanandum(batch.images)
        # Of each image's labels the most probable one, if it is found at all: evidence that the classifier does not see has no size.
        label = (explanandum.probabilities(logits) + batch.targets).argmax(dim=1)
        detected = logits.argmax(dim=1) == label if explanandum.task == "multiclass" else logits.gather(1, label[:, None])[:, 0] > 0
        seen = (batch.targets.gather(1, label[:, None])[:, 0] > 0.5) & detected
        if not bool(seen.any()):
            continue
        images, label = batch.images[seen], label[seen]
        order = order or _order(explanandum, images, label)
        enough, every = evidence_areas(explanandum, order, images, label, fill=judging_fill(fill))
        for k, a, b in zip(label.tolist(), enough.cpu(), every.cpu(), strict=True):
            found[k].append((a[None], b[None]))
    empty = torch.empty(0)
    pairs = [(torch.cat([a for a, _ in own]), torch.cat([b for _, b in own])) if own else (empty, empty) for own in found]
    low, high = bounds(pairs, pixels)
    for_class = {name: (float(a), float(b)) for name, a, b in zip(data.class_names, low, high, strict=True)}
    if small := [name for name, (_, b) in for_class.items() if b * pixels < _SMALL]:
        log.warning(
            "the evidence of %s is a few pixels large: raise data.options.size, or lower the output stride (explainer.options).",
            ", ".join(small),
        )
    return for_class


def _order(explanandum: Any, images: Tensor, classes: Tensor) -> Any:
    """The class activation, where this classifier has one."""
    if explanandum.differentiable:
        try:
            attributor = baselines.build("grad_cam", explanandum)
            attributor(images[:1], classes[:1])
            return attributor
        except ExplainerError as error:
            log.debug("areas are measured with occlusion: %s", error)
    side = min(images.shape[-2:])
    return baselines.build("occlusion", explanandum, window=max(1, side // 6), stride=max(1, side // 12))


def _saved(file: Path, key: str, class_names: Sequence[str]) -> dict[str, tuple[float, float]] | None:
    """What was measured of the same classifier in the same way; None where there is none, or the file is damaged."""
    try:
        saved = parse_json(file.read_bytes())
        found = {str(name): (float(a), float(b)) for name, (a, b) in saved["bounds"].items()}
        sound = all(0 <= a <= b <= 1 for a, b in found.values())
        return found if sound and saved["of"] == key and list(found) == list(class_names) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def settle(terms: Iterable[LossTerm], explanandum: Any, data: DataModule, folder: str | Path, *, seed: int, fill: str) -> None:
    """Give the terms whose bounds are ``auto`` measured ones. ``area_bounds.json`` in the run folder keeps them for whoever resumes or
    tests the run.

    Args:
        terms: terms of the training loss.
        explanandum, data, seed, fill: those of the run.
        folder: the run folder.
    """
    waiting = [term for term in terms if isinstance(term, AreaBound) and term.needs_bounds]
    if not waiting:
        return
    file, key = Path(folder) / FILE, f"{explanandum.fingerprint()} {seed} {fill}"
    found = _saved(file, key, data.class_names)
    if found is None:
        found = measure(explanandum, data, seed, fill)
        write_json(file, {"of": key, "bounds": found})
        told = ", ".join(f"{name} {a:.3f} to {b:.3f}" for name, (a, b) in list(found.items())[:12])
        log.warning("losses.area_bound: auto: %s%s (%s).", told, " ..." if len(found) > 12 else "", file)
    low, high = (torch.tensor([pair[i] for pair in found.values()]) for i in range(2))
    for term in waiting:
        term.use(low, high)
