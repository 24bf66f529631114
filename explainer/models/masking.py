"""From class masks to the masks that the losses and the tables use."""

from __future__ import annotations

from torch import Tensor

from explainer.errors import ShapeError


def aggregate(class_masks: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Target mask m = max over present classes, non-target mask n = max over absent classes (Stalder et al. 2022, section 3.2).

    The maximum over no class is 0: an image without labels has m = 0, an image with all labels has n = 0. Ties share their gradient
    evenly.

    Args:
        class_masks: ``[B,K,H,W]`` in [0,1].
        targets: multi-hot ``[B,K]`` in {0,1}.

    Returns:
        ``(target_mask, non_target_mask)``, ``[B,H,W]`` each, in [0,1].
    """
    if class_masks.ndim != 4 or targets.shape != class_masks.shape[:2]:
        raise ShapeError(
            f"class_masks must be [B,K,H,W] and targets [B,K], received {tuple(class_masks.shape)} and {tuple(targets.shape)}."
        )
    present = (targets > 0.5)[:, :, None, None]
    # Multiplying by 0/1 instead of selecting keeps the batch rectangular; masks are >= 0, so 0 is neutral for the maximum.
    return (class_masks * present).amax(dim=1), (class_masks * ~present).amax(dim=1)
