"""What the mask leaves: are the classes still detected when the target mask is removed, and how undecided (grey) is it?"""

from __future__ import annotations

import torch

from explainer.evaluation.protocol import Column, Mode, Protocol, Score, scores
from explainer.evaluation.scene import Maps, Scene
from explainer.fills import FillKind
from explainer.metrics.classifier import class_outputs, correct, masked
from explainer.metrics.grey_share import grey_share
from explainer.metrics.probability import prob_entropy


class InverseMask(Protocol):
    """Per class of an image: is it detected through the inverse target mask (``left``) and through the mask (``kept``)? Per image: the grey
    share of the merged mask and the entropy under its inverse, relative to its maximum log K.

    Args:
        mode: no differences.
        fill: replaces removed pixels.
    """

    name = "inverse_mask"
    heading = "What the inverse mask leaves"
    question = "Score left when the mask's pixels are gone."
    source = "this project"
    uses_scale = True

    def __init__(self, mode: Mode = "corrected", fill: FillKind = "mean") -> None:
        super().__init__(mode)
        self.fill: FillKind = fill

    def columns(self) -> dict[str, Column]:
        """left, kept, grey share, entropy."""
        return {
            "left": Column("left", False, percent=True),
            "kept": Column("kept", True, percent=True),
            "grey_share": Column("grey share", False, percent=True),
            "inverse_entropy": Column("entropy under the inverse", True, percent=True),
        }

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """What the merged mask's inverse leaves: one row per image, and one per image and explained class."""
        assert maps is not None
        mask = maps.merged()
        kept = masked(scene.explanandum, scene.images, mask, self.fill)
        gone = masked(scene.explanandum, scene.images, 1 - mask, self.fill)
        softmax = class_outputs(scene.explanandum, gone, "softmax")
        whole = torch.log(torch.tensor(float(max(softmax.shape[1], 2)), dtype=torch.float64))
        found = scores(len(mask), None, {"grey_share": grey_share(mask), "inverse_entropy": prob_entropy(softmax).cpu() / whole})
        rows, classes = scene.pairs
        if len(rows):
            values = {
                "left": correct(scene.explanandum, gone[rows], classes),
                "kept": correct(scene.explanandum, kept[rows], classes),
            }
            found += scores(rows, classes, values)
        return found
