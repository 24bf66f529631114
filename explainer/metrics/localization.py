"""Attribution localisation: the share of positive attribution inside the object. Kohlbrenner et al., 2020; SRD (ICLR 2024) eq. 25."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from explainer.errors import ConfigError
from explainer.metrics.facts import Facts
from explainer.metrics.ground_truth import align

Region = Literal["mask", "box"]


def bounding_box(truth: Tensor) -> Tensor:
    """The filled bounding box ``[B,H,W]`` bool of the object pixels (``truth > 0``); empty for an empty object."""
    rows, columns = (truth > 0).any(2), (truth > 0).any(1)
    return _span(rows)[:, :, None] & _span(columns)[:, None, :]


@Facts("attribution_localization", higher_is_better=True, bounds=(0.0, 1.0), optimum=1.0)
def attribution_localization(saliency: Tensor, truth: Tensor, void: Tensor | None = None, region: Region = "mask") -> Tensor:
    """``sum_{i in region} max(s_i,0) / sum_i max(s_i,0)``, ``[B]`` in [0,1].

    Args:
        saliency: ``[B,H,W]``, signed maps allowed.
        truth: ``[B,H,W]``, object pixels > 0.
        void: ``[B,H,W]`` bool, pixels left out of both sums.
        region: the object's ``mask`` or its bounding ``box``.

    NaN where no pixel is positive, and for an image without an object.
    """
    if region not in ("mask", "box"):
        raise ConfigError(f"region must be 'mask' or 'box', received {region!r}.")
    pixels = align(saliency, bounding_box(truth) if region == "box" else truth > 0, void)
    positive = pixels.mask.clamp(min=0)
    share = pixels.ratio((positive * pixels.truth).sum(1), positive.sum(1))
    return torch.where(pixels.truth.sum(1) == 0, torch.full_like(share, torch.nan), share)


def _span(occupied: Tensor) -> Tensor:
    """True from the first to the last True of each row of ``[B,N]``."""
    count = occupied.long()
    return (count.cumsum(1) > 0) & (count.flip(1).cumsum(1).flip(1) > 0)
