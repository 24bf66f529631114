"""How similar a layer finds a patch to itself when the picture is turned or enlarged (Interactive Similarity Overlays, 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from explainer.data.transforms import resize_image
from explainer.errors import ConfigError

#: The article's largest enlargement is 14.9 = 1.35 ** 9.
ZOOM = 1.35
Matrix = tuple[float, float, float, float]


@dataclass(frozen=True)
class Series:
    """One picture in several states.

    Attributes:
        labels: names of the states, for people.
        images: ``[P,3,H,W]`` in [0,1].
        moves: for each state the matrix (a, b, c, d) that takes a pixel's offset from the centre in the untouched picture, (y, x), to its
            offset
            in this one: ``(a y + b x, c y + d x)``.
        title: title of the chart's axis.
    """

    labels: list[str]
    images: Tensor
    moves: list[Matrix]
    title: str


def rotations(small: Tensor, step: int, fill: Sequence[float], disc: bool = False) -> Series:
    """The picture turned counter-clockwise by 0, ``step``, ... degrees about its centre.

    Args:
        small: ``[3,H,W]`` in [0,1].
        step: degrees, a divisor of 360.
        fill: colour of what comes in from outside, three numbers in [0,1].
        disc: show only the largest disc, so that all states show the same.

    Raises:
        ConfigError: the step does not divide 360, or is 360.
    """
    if not 1 <= step < 360 or 360 % step:
        raise ConfigError(f"the rotation's step must divide 360, received {step}.")
    angles = list(range(0, 360, step))
    turned = [tvf.rotate(small, float(a), InterpolationMode.BILINEAR, fill=list(fill)) if a else small for a in angles]
    images = torch.stack(turned).clamp(0, 1)
    if disc:
        _, H, W = small.shape
        y, x = torch.arange(H) + 0.5 - H / 2, torch.arange(W) + 0.5 - W / 2
        outside = y[:, None] ** 2 + x**2 > (min(H, W) / 2) ** 2
        images[:, :, outside] = torch.tensor(list(fill), dtype=images.dtype).view(1, 3, 1)
    moves: list[Matrix] = []
    for angle in angles:
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        moves.append((cos, -sin, sin, cos))  # rows grow downwards: counter-clockwise takes x to -y
    return Series([f"{a}°" for a in angles], images, moves, "rotation")


def enlargements(pixels: Tensor, size: tuple[int, int], count: int) -> Series:
    """The picture enlarged about its centre by 1, 1.35, 1.35 ** 2, ...

    Args:
        pixels: ``[3,H',W']`` uint8, the whole picture: enlarged parts keep its sharpness.
        size: (height, width) of the network's image.
        count: number of enlargements; the last is ``1.35 ** count``.
    """
    _, H, W = pixels.shape
    factors, images, moves = [ZOOM**k for k in range(count + 1)], [], []
    for wanted in factors:
        # Whole pixels: the factors that come of it are the ones that positions follow.
        height, width = (max(2 - n % 2, n - 2 * round((n - n / wanted) / 2)) for n in (H, W))
        top, left = (H - height) // 2, (W - width) // 2
        images.append(resize_image(pixels[:, top : top + height, left : left + width], *size).float() / 255)
        moves.append((H / height, 0.0, 0.0, W / width))
    return Series([f"{f:.1f}x" for f in factors], torch.stack(images), moves, "enlargement")


def chart_values(features: Tensor, series: Series) -> Tensor:
    """Cosines of every patch of every state with the patch that lies there in every other state.

    Args:
        features: ``[P,C,h,w]``, raw, of the P states.
        series: the states.

    Returns:
        ``[P,h,w,P]`` in [-1,1]; NaN where the place is outside the other state's picture. 1 with itself (0 of a vector of zeros).
    """
    P, _, h, w = features.shape
    H, W = series.images.shape[-2:]
    y, x = (torch.arange(h).double() + 0.5) * H / h - H / 2, (torch.arange(w).double() + 0.5) * W / w - W / 2
    offset = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)  # [h,w,2], in pixels
    matrices = torch.tensor(series.moves, dtype=torch.float64).view(P, 2, 2)
    own = F.normalize(features.double(), dim=1, eps=1e-12)
    found = torch.empty(P, h, w, P, dtype=torch.float64)
    half = torch.tensor([H / 2, W / 2], dtype=torch.float64)
    for a in range(P):
        back = torch.linalg.inv(matrices[a])
        for b in range(P):
            place = torch.einsum("ij,hwj->hwi", matrices[b] @ back, offset) / half  # in [-1,1] inside the picture
            inside = (place.abs() <= 1 + 1e-9).all(-1)
            sampled = F.grid_sample(features[b : b + 1].double(), place.flip(-1)[None], "bilinear", "border", align_corners=False)[0]
            cosine = (own[a] * F.normalize(sampled, dim=0, eps=1e-12)).sum(0)
            found[a, :, :, b] = cosine.masked_fill(~inside, torch.nan)
    return found
