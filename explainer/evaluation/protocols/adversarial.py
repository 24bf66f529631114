"""Adversarial images seen through maps, and undone by masks: Fong and Vedaldi, ICCV 2017, section 5.5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from explainer.errors import ConfigError
from explainer.evaluation.detector import detection_accuracy
from explainer.evaluation.protocol import Column, Mode, Score, scores
from explainer.evaluation.results import Row
from explainer.evaluation.scene import Maps, Scene
from explainer.evaluation.verdict import Check, Verdict, decide, undecided
from explainer.fills import blend
from explainer.metrics.suppression import fully_blurred
from explainer.tensors import min_max

#: Side of the maps that the detector sees.
SIDE = 28


class Adversarial(Check):
    """One row per image whose predicted class one step of the fast gradient sign method changes; the others are left out (they are in no
    row).

    Detection: a small network is trained to tell maps of clean from maps of adversarial images, each of the class predicted there. Defence:
    the region that the map of the adversarial image's prediction marks is blurred in the adversarial image; how often the clean prediction
    comes back, how often it is among the five best, and how often the label is right.

    Args:
        mode: no differences.
        epsilon: strength of the attack, in [0,1] units of the image.
        least: accuracy of the detector from which on maps are said to give the attack away.
    """

    name = "adversarial"
    heading = "Adversarial images"
    question = "Do the maps of attacked images differ from those of clean ones?"
    title = "Adversarial images"
    source = "Fong and Vedaldi 2017, section 5.5"
    uses_scale = True

    def __init__(self, mode: Mode = "corrected", epsilon: float = 8 / 255, least: float = 0.75) -> None:
        super().__init__(mode)
        if not 0 < epsilon <= 1:
            raise ConfigError(f"adversarial: epsilon must lie in (0,1], received {epsilon}.")
        self.epsilon, self.least = epsilon, least

    def columns(self) -> dict[str, Column]:
        """The defence."""
        return {
            "recovered": Column("clean prediction back", True, percent=True),
            "recovered_top5": Column("clean prediction in the top five", True, percent=True),
            "right": Column("label predicted", True, percent=True),
        }

    def axes(self, class_names: tuple[str, ...]) -> dict[str, list[Any]]:
        """Pixels of the small maps, row by row."""
        places = [f"{r},{c}" for r in range(SIDE) for c in range(SIDE)]
        return {"clean": places, "changed": places}

    def wanted(self, scene: Scene) -> Tensor:
        """The predicted class."""
        return F.one_hot(scene.top, scene.labels.shape[1]).bool()

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """Where the attack changes the predicted class: blur what the new class's mask marks, and see whether the old class is back."""
        assert maps is not None
        attacked = fast_gradient_sign(scene.explanandum, scene.images, scene.top, self.epsilon)
        with torch.no_grad():
            fooled = scene.explanandum(attacked).argmax(1)
        changed = (fooled != scene.top).nonzero()[:, 0]
        if len(changed) == 0:
            return []
        images, clean = attacked[changed], scene.top[changed]
        own, other = maps.saliency(changed, clean), maps.explain(images, fooled[changed])
        defended = blend(images, 1 - maps.as_mask(other).to(images), fully_blurred(images))
        with torch.no_grad():
            logits = scene.explanandum(defended)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        values = {
            "recovered": (best[:, 0] == clean).double(),
            "recovered_top5": (best == clean[:, None]).any(1).double(),
            "right": scene.labels[changed].gather(1, best[:, :1])[:, 0].double(),
        }
        small = {name: F.adaptive_avg_pool2d(min_max(m)[:, None], SIDE).flatten(1) for name, m in (("clean", own), ("changed", other))}
        found = scores(len(changed), None, values, small, digits=3)
        return [Score(b, None, s.values, s.vectors) for b, s in zip(changed.tolist(), found, strict=True)]

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """Whether maps give the attack away."""
        check, who = "maps tell adversarial images from clean ones", (rows[0].method, rows[0].scale)
        usable = [r for r in rows if not any(np.isnan(r.vectors["clean"] + r.vectors["changed"]))]
        clean, changed = (np.array([r.vectors[n] for r in usable]).reshape(-1, SIDE, SIDE) for n in ("clean", "changed"))
        accuracy, count = detection_accuracy(clean, changed, [r.index for r in usable])
        if count == 0:
            return [undecided(check, *who, threshold=self.least, rule="at least", why=f"{len(usable)} changed predictions are too few.")]
        sentence = f"A small network names the kind of {count} held-out maps correctly in {accuracy:.1%} of cases (guessing: 50 %)."
        return [decide(check, *who, value=accuracy, threshold=self.least, rule="at least", sentence=sentence, details={"maps": count})]


def fast_gradient_sign(explanandum: Any, images: Tensor, class_index: Tensor, epsilon: float) -> Tensor:
    """``clip(x + epsilon * sign(d loss(class) / dx))``: cross-entropy, or the class's binary one for multi-label classifiers."""
    given = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = explanandum(given)
        if explanandum.task == "multilabel":
            # Not through the sigmoid, whose slope a sure classifier rounds to 0.
            loss = -F.logsigmoid(logits.gather(1, class_index[:, None])).sum()
        else:
            loss = F.cross_entropy(logits, class_index, reduction="sum")
        (slope,) = torch.autograd.grad(loss, given)
    return (images + epsilon * slope.sign()).clamp(0, 1)
