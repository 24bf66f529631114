"""The pointing game: does the map's maximum lie on the object? Zhang et al., IJCV 2018; protocol of Fong et al., ICCV 2019 (TorchRay).

With ``tolerance`` 15 it is eq. 24 of SRD (Han et al., ICLR 2024).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from explainer.errors import ConfigError, ShapeError
from explainer.metrics.facts import Facts


def first_maximum(saliency: Tensor) -> Tensor:
    """Row and column ``[B,2]`` of the maximum of ``[B,H,W]``; ties go to the first pixel in row-major order, on every device."""
    flat = saliency.flatten(1)
    position = torch.arange(flat.shape[1], device=flat.device)
    index = torch.where(flat == flat.amax(1, keepdim=True), position, flat.shape[1]).amin(1).clamp(max=flat.shape[1] - 1)
    return torch.stack([index // saliency.shape[2], index % saliency.shape[2]], dim=1)


def point_hits(points: Tensor, truth: Tensor, tolerance: float = 15.0) -> Tensor:
    """True ``[B]`` where an object pixel (``truth > 0``) lies strictly nearer than ``tolerance`` pixels; tolerance 0: on it.

    Args:
        points: row, column ``[B,2]``; may lie outside the image.
        truth: ``[B,H,W]``.
        tolerance: pixels.
    """
    rows = torch.arange(truth.shape[1], device=truth.device)[None, :, None] - points[:, 0, None, None]
    columns = torch.arange(truth.shape[2], device=truth.device)[None, None, :] - points[:, 1, None, None]
    squared = rows.square() + columns.square()
    near = (squared < tolerance**2) | (squared == 0)
    return (near & (truth > 0)).flatten(1).any(1)


@Facts("pointing_game", higher_is_better=True, bounds=(0.0, 1.0), optimum=1.0)
def pointing_game(
    saliency: Tensor,
    truth: Tensor,
    void: Tensor | None = None,
    tolerance: float = 15.0,
    empty: Literal["skip", "miss"] = "skip",
    *,
    targets: Tensor | None = None,
    subset: Literal["all", "difficult"] = "all",
) -> Tensor:
    """Hit or miss per image, ``[B]`` float64 in {0,1}.

    Args:
        saliency: ``[B,H,W]`` at the resolution of the ground truth.
        truth: ``[B,H,W]``, object pixels > 0.
        void: ``[B,H,W]`` bool: the maximum is sought elsewhere, and void pixels are no object.
        tolerance: pixels (15 at the image's own resolution), strict.
        empty: an image without object pixels is NaN (``skip``) or 0 (``miss``, as TorchRay counts it).
        targets: ``[B,K]`` multi-hot, for ``subset="difficult"``.
        subset: ``all`` images, or those that :func:`difficult` names; the others are NaN.

    A constant map points nowhere: it is a miss. A map with NaN, or only void pixels, is NaN.
    """
    if empty not in ("skip", "miss") or subset not in ("all", "difficult"):
        raise ConfigError(f"empty must be 'skip' or 'miss' and subset 'all' or 'difficult', received {empty!r} and {subset!r}.")
    if not tolerance >= 0:
        raise ConfigError(f"tolerance must be at least 0 pixels, received {tolerance}.")
    if subset == "difficult" and targets is None:
        raise ConfigError("the difficult subset needs to know which classes are present: pass targets=[B,K].")
    if saliency.shape != truth.shape or saliency.ndim != 3:
        raise ShapeError(f"saliency is {tuple(saliency.shape)} and truth {tuple(truth.shape)}; both must be (B,H,W): resize the map.")
    counts = torch.ones_like(truth, dtype=torch.bool) if void is None else ~void.bool()
    visible = torch.where(counts, saliency.double(), -torch.inf)
    lowest = torch.where(counts, visible, torch.inf).flatten(1).amin(1)
    object_pixels = (truth > 0) & counts
    hit = point_hits(first_maximum(visible), object_pixels, tolerance) & (visible.flatten(1).amax(1) > lowest)
    undefined = visible.isnan().flatten(1).any(1) | ~counts.flatten(1).any(1)
    if empty == "skip":
        undefined |= ~object_pixels.flatten(1).any(1)
    if targets is not None and subset == "difficult":
        undefined |= ~difficult(truth, targets)
    return torch.where(undefined, torch.full_like(lowest, torch.nan), hit.double())


def difficult(truth: Tensor, targets: Tensor, max_area: float = 0.25) -> Tensor:
    """True ``[B]`` where the target covers less than ``max_area`` of the image and another class is present."""
    return ((truth > 0).double().mean(dim=(1, 2)) < max_area) & (targets.sum(1) >= 2)


class BoxMask(NamedTuple):
    """Pixels of a class's boxes, and whether the class counts for the pointing game."""

    mask: Tensor
    counts: bool


def box_mask(boxes: Tensor, is_difficult: Tensor, size: tuple[int, int]) -> BoxMask:
    """The union ``[H,W]`` bool of one class's VOC boxes.

    ``boxes`` ``[N,4]`` are xmin, ymin, xmax, ymax, 1-based and inclusive. A class counts if at least one of its boxes is not marked
    difficult; then all its boxes, also difficult ones, are object.
    """
    mask = torch.zeros(size, dtype=torch.bool)
    for left, top, right, bottom in boxes.tolist():
        mask[int(top) - 1 : int(bottom), int(left) - 1 : int(right)] = True
    return BoxMask(mask, not bool(is_difficult.bool().all()))
