"""Boxes from maps by three threshold rules: Fong and Vedaldi, ICCV 2017, section 5.6 (after Cao et al. and Zhang et al.)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from explainer.errors import ConfigError
from explainer.tensors import min_max

Rule = Literal["value", "energy", "mean"]
#: The paper's grids of alpha.
GRIDS: dict[str, tuple[float, ...]] = {
    "value": tuple(i / 20 for i in range(20)),
    "energy": tuple(i / 20 for i in range(20)),
    "mean": tuple(i / 2 for i in range(21)),
}


def thresholds(maps: Tensor, rule: Rule, alphas: Sequence[float]) -> Tensor:
    """The value ``[P,A]`` from which on a pixel of a map in [0,1] survives; infinite where none does.

    Args:
        maps: ``[P,H,W]``; brought to [0,1] per map first.
        rule: ``value``: alpha itself; ``energy``: of the smallest set of highest pixels that holds the share alpha of the sum (pixels as
            high as its last one survive, too); ``mean``: alpha times the map's mean.
        alphas: A numbers.

    Raises:
        ConfigError: an unknown rule.
    """
    if rule not in get_args(Rule):
        raise ConfigError(f"rule must be one of {', '.join(get_args(Rule))}, received {rule!r}.")
    flat = min_max(maps).double().flatten(1)
    alpha = torch.as_tensor(list(alphas), dtype=torch.float64, device=maps.device).expand(len(flat), -1)
    if rule == "value":
        return alpha
    if rule == "mean":
        return alpha * flat.mean(1, keepdim=True)
    ordered = flat.sort(dim=1, descending=True).values
    sums = ordered.cumsum(1)
    # Rounding must not ask for one more pixel.
    number = torch.searchsorted(sums, (alpha * sums[:, -1:] - 1e-12).contiguous()).clamp(max=flat.shape[1] - 1)
    last = ordered.gather(1, number)
    return torch.where((alpha > 0) & (sums[:, -1:] > 0), last, torch.full_like(last, torch.inf))


def tight_boxes(maps: Tensor, limits: Tensor) -> Tensor:
    """The smallest boxes around all pixels of maps (brought to [0,1]) that reach a limit; the whole map where none does.

    Args:
        maps: ``[P,H,W]``.
        limits: ``[P,A]``.

    Returns:
        ``[P,A,4]``: left, top, right, bottom in pixels, half-open (torchvision's order).
    """
    scaled = min_max(maps).double()
    rows, columns = scaled.amax(2), scaled.amax(1)
    top, bottom = _span(rows, limits)
    left, right = _span(columns, limits)
    return torch.stack([left, top, right, bottom], -1).double()


def _span(profile: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last place ``[P,A]`` of ``profile`` ``[P,N]`` that reaches the limit."""
    reached = profile[:, None] >= limits[..., None]
    some, size = reached.any(-1), profile.shape[1]
    place = reached.to(torch.uint8)
    first = torch.where(some, place.argmax(-1), 0)
    last = torch.where(some, size - place.flip(-1).argmax(-1), size)
    return first, last


def box_masks(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """``[...,4]`` half-open boxes as bool masks ``[...,H,W]``."""
    y, x = torch.arange(size[0], device=boxes.device), torch.arange(size[1], device=boxes.device)
    left, top, right, bottom = (boxes[..., i, None] for i in range(4))
    return ((y >= top) & (y < bottom))[..., :, None] & ((x >= left) & (x < right))[..., None, :]
