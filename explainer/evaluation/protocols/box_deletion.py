"""How small a box around a map's highest values suppresses the class when it is blurred, and what the mask itself does: Fong and Vedaldi,
ICCV 2017, sections 5.1 (interpretability) and 5.3 (minimality).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from explainer.evaluation.protocol import Column, Mode, Protocol, Score, scores
from explainer.evaluation.scene import Maps, Scene
from explainer.fills import blend
from explainer.metrics.boxes import box_masks, tight_boxes
from explainer.metrics.suppression import Suppression, fully_blurred

HEIGHTS = tuple(i / 10 for i in range(11))
LEVELS = (80, 90, 95, 99)
#: Shares of the image to which a method's box is grown or shrunk, so that methods are compared at equal area.
AREAS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


class BoxDeletion(Protocol):
    """One row per explained class of an image. Images that full blur takes less than 0.01 from are left out.

    Minimality: the tightest box around [map >= h], for h = 0, 0.1, ..., 1 of the map brought to [0,1], is blurred; for each level of
    suppression the smallest area that reaches it, the whole image where none does. Interpretability: q behind the method's own mask (1 is
    removed), behind the box at half the maximum, and behind that box grown or shrunk about its centre to equal areas.

    Args:
        mode: no differences.
    """

    name = "box_deletion"
    heading = "Deletion of a box"
    question = "How small a box must be removed for the score to fall?"
    source = "Fong and Vedaldi 2017, sections 5.1 and 5.3"
    uses_scale = True

    def __init__(self, mode: Mode = "corrected") -> None:
        super().__init__(mode)

    def columns(self) -> dict[str, Column]:
        """Smallest areas by level; q of the mask and of the box, with the areas of both."""
        areas = {f"area_{level}": Column(f"smallest box, {level} %", False, percent=True) for level in LEVELS}
        return areas | {
            "q_mask": Column("q, own mask", False),
            "mask_area": Column("area of the mask", None, percent=True),
            "q_box": Column("q, box", False),
            "box_area": Column("area of the box", None, percent=True),
        }

    def axes(self, class_names: tuple[str, ...]) -> dict[str, list[Any]]:
        """Shares of the image."""
        return {"q_area": list(AREAS)}

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """Delete the boxes around the map's highest values and measure what is left of the class's probability."""
        assert maps is not None
        rows, classes = scene.pairs
        if len(rows) == 0:
            return []
        images, saliency = scene.images[rows], maps.saliency(rows, classes)
        blurred = fully_blurred(images)
        q = Suppression(scene.explanandum, images, classes, blurred)

        def removed(mask: Tensor) -> Tensor:
            return q(blend(images, 1 - mask.to(images), blurred))

        limits = torch.tensor(HEIGHTS, dtype=torch.float64, device=saliency.device).expand(len(rows), -1)
        boxes = tight_boxes(saliency, limits)
        left = torch.stack([removed(box_masks(b, scene.size)) for b in boxes.unbind(1)], 1)
        area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]) / (scene.size[0] * scene.size[1])
        values = {}
        for level in LEVELS:
            reached = left <= 1 - level / 100
            smallest = torch.where(reached, area, torch.ones_like(area)).amin(1)
            values[f"area_{level}"] = smallest.masked_fill(q.undefined, torch.nan)
        half, mask = boxes[:, HEIGHTS.index(0.5)], maps.mask(rows, classes)
        values |= {"q_mask": removed(mask), "mask_area": mask.double().flatten(1).mean(1)}
        values |= {"q_box": left[:, HEIGHTS.index(0.5)], "box_area": area[:, HEIGHTS.index(0.5)]}
        equal = torch.stack([removed(box_masks(resized_boxes(half, a, scene.size), scene.size)) for a in AREAS], 1)
        return scores(rows, classes, values, {"q_area": equal}, digits=5)


def resized_boxes(boxes: Tensor, area: float, size: tuple[int, int]) -> Tensor:
    """Boxes ``[P,4]`` grown or shrunk about their centres to a share of the image; what would leave the image is moved inside.

    Both sides change by the same factor; one that would exceed the image stays the image's, and the other makes up for it.
    """
    H, W = size
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    factor = (area * H * W / (width * height)).sqrt()
    new_width, new_height = (width * factor).clamp(max=W), (height * factor).clamp(max=H)
    new_width = (area * H * W / new_height).clamp(max=W)
    new_height = (area * H * W / new_width).clamp(max=H)
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    left = torch.minimum((x - new_width / 2).clamp(min=0), W - new_width)
    top = torch.minimum((y - new_height / 2).clamp(min=0), H - new_height)
    return torch.stack([left, top, left + new_width, top + new_height], 1).round()
