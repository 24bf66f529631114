"""Images that show what a concept's probe sees: those it ranks first, and those at each tenth of its IoU, the ordinary and the bad."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from explainer.commands.concepts_config import ConceptsConfig
from explainer.commands.concepts_layer import Probed
from explainer.concepts import segmentation as seg
from explainer.concepts.iou import ratio
from explainer.concepts.store import ConceptMasks
from explainer.data.datamodule import DataModule
from explainer.figures import overlay
from explainer.files import replacing

_SIDE, _GAP = 112, 4


def write_pictures(
    config: ConceptsConfig,
    data: DataModule,
    *,
    splits: dict[str, tuple[Any, ConceptMasks]],
    probed: dict[str, dict[str, Probed]],
    names: list[str],
    out: Path,
) -> dict[str, Any]:
    """Write ``pictures/*.jpg``.

    Returns:
        ``{layer: {concept: {"ranked": [...], "deciles": [...], "classified": [...]}}}``; each entry has ``file``, ``id`` and the number it
        was chosen by. ``ranked`` and ``classified`` choose among all validation images, not only those that show the concept.
    """
    truth = splits["val"][1]
    dataset = data.dataset(config.val_split)
    place = {dataset.sample_id(i): i for i in range(len(dataset))}
    images: dict[int, Tensor] = {}

    def picture(i: int) -> Tensor:
        if i not in images:
            whole = dataset[place[truth.ids[i]]].image
            images[i] = F.interpolate(whole[None], (_SIDE, _SIDE), mode="bilinear", antialias=True, align_corners=False)[0]
        return images[i]

    folder = out / "pictures"
    found: dict[str, Any] = {}
    for number, (layer, tasks) in enumerate(probed.items()):
        found[layer] = {}
        for c in sorted({c for p in tasks.values() for c in p.concepts}):
            chosen: dict[str, list[dict[str, Any]]] = {}
            if "segmentation" in tasks and c in tasks["segmentation"].concepts:
                p = tasks["segmentation"]
                chosen["ranked"] = _named(_highest(p.images[c], config.pictures), truth)
                chosen["deciles"] = _deciles(p, truth, c, config.pictures)
                for kind in ("ranked", "deciles"):
                    for j, entry in enumerate(chosen[kind]):
                        strip = [picture(entry["index"]), *_masks(p, truth, c, entry["index"])]
                        entry["file"] = _save(strip, folder / f"{number}_{c}_{kind}_{j}.jpg")
            if "classification" in tasks and c in tasks["classification"].concepts:
                chosen["classified"] = _named(_highest(tasks["classification"].images[c], config.pictures), truth)
                for j, entry in enumerate(chosen["classified"]):
                    entry["file"] = _save([picture(entry["index"])], folder / f"{number}_{c}_classified_{j}.jpg")
            for entry in (e for kind in chosen.values() for e in kind):
                entry["shows"] = bool(truth.labels[entry["index"], c])
            found[layer][names[c]] = chosen
    return found


def _highest(scores: Tensor, number: int) -> list[tuple[int, float]]:
    order = torch.sort(scores, descending=True, stable=True).indices[:number]
    return [(int(i), float(scores[i])) for i in order]


def _named(chosen: list[tuple[int, float]], truth: ConceptMasks) -> list[dict[str, Any]]:
    return [{"index": i, "id": truth.ids[i], "value": value} for i, value in chosen]


def _deciles(p: Probed, truth: ConceptMasks, c: int, number: int) -> list[dict[str, Any]]:
    """Images at evenly spaced shares (the paper: 10 to 90 %) of the IoU of single images."""
    some = truth.images_with(c)
    weights, bias = p.fitted.of(c)
    values = ratio(*seg.combination_counts(p.supports, truth, c, some, weights=weights, bias=bias))  # type: ignore[arg-type]
    order = torch.sort(values, stable=True).indices
    shares = np.linspace(0.9, 0.1, number)
    at = [order[min(len(order) - 1, int(share * len(order)))] for share in shares]
    entries = _named([(int(some[i]), float(values[i])) for i in at], truth)
    return [{**e, "share": float(s)} for e, s in zip(entries, shares, strict=True)]


def _masks(p: Probed, truth: ConceptMasks, c: int, image: int) -> list[Tensor]:
    """Masks of the truth, the combination and the single filter, ``[side,side]`` each."""
    assert p.supports is not None
    one = torch.tensor([image])
    target = truth.masks(c, one)[0] if int(truth.rows[image, c]) >= 0 else torch.zeros(truth.side, dtype=torch.bool)
    combined = seg.combination_logits(p.supports.only(one), *p.fitted.of(c), truth.side)[0] > 0
    single = seg.filter_mask(p.supports, truth, one, p.best[c])[0]
    return [F.interpolate(m[None, None].float(), (_SIDE, _SIDE))[0, 0] for m in (target, combined, single)]


def _save(strip: list[Tensor], path: Path) -> str:
    """The image and what each mask keeps of it, side by side."""
    image, *masks = strip
    parts = [overlay(image, torch.ones(_SIDE, _SIDE)), *(overlay(image, m) for m in masks)]
    gap = np.full((_SIDE, _GAP, 3), 255, np.uint8)
    row = [piece for part in parts for piece in (part, gap)][:-1]
    with replacing(path, durable=False) as stream:
        Image.fromarray(np.concatenate(row, axis=1)).save(stream, "JPEG", quality=82)
    return f"{path.parent.name}/{path.name}"
