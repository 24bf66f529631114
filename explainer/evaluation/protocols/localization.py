"""Localisation error of the dominant object by three threshold rules: Table 1 of Fong and Vedaldi, ICCV 2017 (section 5.6)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.ops import box_iou

from explainer.errors import ConfigError
from explainer.evaluation.protocol import Column, Mode, Protocol, Score, scores
from explainer.evaluation.protocols.pointing_game import on_picture
from explainer.evaluation.scene import Maps, Scene
from explainer.metrics.boxes import GRIDS, Rule, thresholds, tight_boxes
from explainer.metrics.localization import bounding_box

RULES: tuple[Rule, ...] = ("value", "energy", "mean")


class Localization(Protocol):
    """One row per explained class of an image. The tightest box around what survives a threshold is wrong where its IoU with every
    instance of the class is below 0.5.

    Each rule's alpha is the one with the fewest errors on held-out images (the least alpha on a tie), per method; errors are counted on
    the others.

    Args:
        mode: no differences.
        held_out: every so-many-th image of the data chooses alpha, at least 2.
        truth: ``boxes``, ``masks`` (the box around the class's pixels), or ``auto``: boxes where the data set has them.
    """

    name = "localization"
    heading = "Localisation by boxes"
    question = "Does the box around the map's highest values meet the object's box?"
    source = "Fong and Vedaldi 2017, Table 1"

    def __init__(self, mode: Mode = "corrected", held_out: int = 10, truth: Literal["auto", "boxes", "masks"] = "auto") -> None:
        super().__init__(mode)
        if truth not in ("auto", "boxes", "masks"):
            raise ConfigError(f"localization: truth must be auto, boxes or masks, received {truth!r}.")
        if held_out < 2:
            raise ConfigError(f"localization: held_out must be at least 2 (every second image chooses alpha), received {held_out}.")
        self.held_out, self.truth = held_out, truth

    def columns(self) -> dict[str, Column]:
        """Each rule's error and alpha."""
        found = {}
        for rule in RULES:
            found[f"{rule}_error"] = Column(f"error, {rule}", False, percent=True, counts=(rule, 0))
            found[f"{rule}_alpha"] = Column(f"alpha, {rule}", None, counts=(rule, 1))
        return found

    def axes(self, class_names: tuple[str, ...]) -> dict[str, list[Any]]:
        """Counts of the held-out images, then of the others: rows, and errors at each alpha."""
        return {r: [f"{part} {name}" for part in ("held out,", "counted,") for name in ("rows", *GRIDS[r])] for r in RULES}

    def from_counts(self, vector: str, summed: Tensor) -> Tensor:
        """The error at the chosen alpha, and alpha. NaN where no image is held out, or all are."""
        held, counted = summed.chunk(2, dim=-1)
        best = held[..., 1:].argmin(-1)
        error = counted[..., 1:].gather(-1, best[..., None])[..., 0] / counted[..., 0]
        alpha = torch.tensor(GRIDS[vector], dtype=error.dtype)[best]
        found = torch.stack([error, alpha], -1)
        return torch.where((held[..., :1] > 0) & (counted[..., :1] > 0), found, torch.full_like(found, torch.nan))

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """Compare boxes around what survives each threshold with the boxes of the class."""
        assert maps is not None
        rows, classes = scene.pairs
        boxed = callable(getattr(scene.dataset, "boxes", None))
        if self.truth == "boxes" and not boxed:
            raise ConfigError("localization: truth is 'boxes', but this data set has no boxes. Use truth: masks.")
        if self.truth == "masks" or not boxed:
            if scene.batch.masks is None or len(rows) == 0:
                return []
            truth = scene.truth(rows, classes)
            targets = [tight_boxes(box[None].double(), torch.ones(1, 1))[0] for box in bounding_box(truth)]
            sound = truth.flatten(1).any(1).tolist()
            saliency = [m[None] for m in maps.saliency(rows, classes)]
        else:
            targets, sound, saliency = self._original(scene, maps, rows, classes)
        kept = torch.tensor([i for i, s in enumerate(sound) if s], dtype=torch.long)
        if len(kept) == 0:
            return []
        vectors = {rule: [self._errors(saliency[i], targets[i], rule) for i in kept.tolist()] for rule in RULES}
        held = torch.tensor([scene.indices[b] % self.held_out == 0 for b in rows.cpu()[kept].tolist()])
        counts: dict[str, Tensor] = {rule: _in_half(torch.stack(v).cpu(), held) for rule, v in vectors.items()}
        return scores(rows.cpu()[kept], classes.cpu()[kept], {"held_out": held.double()}, counts)

    @staticmethod
    def _errors(saliency: Tensor, targets: Tensor, rule: Rule) -> Tensor:
        """1.0 for each alpha ``[A]`` whose box meets none of ``targets`` ``[N,4]``."""
        boxes = tight_boxes(saliency, thresholds(saliency, rule, GRIDS[rule]))[0]
        best: Tensor = box_iou(boxes, targets.to(boxes)).amax(1)
        return (best < 0.5).double()

    @staticmethod
    def _original(scene: Scene, maps: Maps, rows: Tensor, classes: Tensor) -> tuple[list[Tensor], list[bool], list[Tensor]]:
        """Boxes, whether there are any, and maps in the pixels of each picture."""
        targets, saliency = [], []
        for b, k, m in zip(rows.tolist(), classes.tolist(), maps.saliency(rows, classes).cpu(), strict=True):
            index = scene.indices[b]
            own = [[x.x0, x.y0, x.x1, x.y1] for x in scene.dataset.boxes(index) if x.label == k]
            targets.append(torch.tensor(own, dtype=torch.float64).reshape(-1, 4))
            saliency.append(on_picture(scene.dataset, index, m[None], scene.dataset.original_size(index)))
        return targets, [len(t) > 0 for t in targets], saliency


def _in_half(errors: Tensor, held: Tensor) -> Tensor:
    """``[P,A]`` errors as ``[P,2(1+A)]`` counts, in the half of the held-out images or in the other."""
    one = torch.cat([torch.ones(len(errors), 1, dtype=errors.dtype), errors], 1)
    zero = torch.zeros_like(one)
    chosen = held[:, None]
    return torch.cat([torch.where(chosen, one, zero), torch.where(chosen, zero, one)], 1)
