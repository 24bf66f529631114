"""Does removing what a mask covers suppress the class whatever replaces it? Fong and Vedaldi, ICCV 2017, section 5.2."""

from __future__ import annotations

from typing import Any

import torch

from explainer.evaluation.protocol import Column, Mode, Protocol, Score, scores
from explainer.evaluation.scene import Maps, Scene
from explainer.fills import blend, gaussian_blur, make_fill
from explainer.metrics.suppression import Suppression, fully_blurred
from explainer.tensors import min_max

ALPHAS = tuple(i / 20 for i in range(20))
FILLS = ("blur", "constant", "noise")


class MaskDeletion(Protocol):
    """One row per explained class of an image.

    The mask (1 keeps, the map turned round) is blurred again by 5 pixels at 224, brought to [0,1] and cut: pixels from alpha on stay, the
    others are blurred, replaced by the classifier's mean colour, or by noise. q is 1 for the untouched and 0 for the fully blurred image;
    images that full blur takes less than 0.01 from are left out.

    Args:
        mode: "code" divides by the softly masked image's probability instead of the fully blurred one's, as the public script does.
    """

    name = "mask_deletion"
    heading = "Deletion by masks"
    question = "How far does the score fall when the mask's pixels are removed?"
    source = "Fong and Vedaldi 2017, section 5.2"

    def __init__(self, mode: Mode = "corrected") -> None:
        super().__init__(mode)

    def columns(self) -> dict[str, Column]:
        """Mean of q over alpha, of each fill."""
        return {fill: Column(f"q, {fill}", False) for fill in FILLS}

    def axes(self, class_names: tuple[str, ...]) -> dict[str, list[Any]]:
        """Alpha."""
        return {fill: list(ALPHAS) for fill in FILLS}

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """Blur the map's highest values and measure what is left of the class's probability."""
        assert maps is not None
        rows, classes = scene.pairs
        if len(rows) == 0:
            return []
        images, saliency = scene.images[rows], maps.saliency(rows, classes)
        blurred, side = fully_blurred(images), min(scene.size)
        sigma = 5 * side / 224
        radius = min(int(3 * sigma + 0.5), side - 1)
        keep = 1 - min_max(saliency)
        keep = min_max(gaussian_blur(keep[:, None], radius, sigma)[:, 0])
        zero = blend(images, 1 - min_max(saliency), blurred) if self.mode == "code" else blurred
        q = Suppression(scene.explanandum, images, classes, zero)
        noise = make_fill(images[:1], "noise", generator=torch.Generator().manual_seed(scene.seed))
        fills = {"blur": blurred, "constant": make_fill(images, "mean", mean=scene.explanandum.mean), "noise": noise}
        vectors = {name: torch.stack([q(blend(images, (keep >= a).to(images), f)) for a in ALPHAS], 1) for name, f in fills.items()}
        return scores(rows, classes, {name: v.mean(1) for name, v in vectors.items()}, vectors, digits=5)
