"""How a picture of any shape becomes the network's image, and the way back. Importing this module imports neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from explainer.errors import ConfigError

__all__ = ["GEOMETRIES", "PADDING", "Box", "Geometry", "Placement", "Size", "as_size", "height_width", "placement", "size_text"]

Geometry = Literal["squash", "letterbox", "crop"]
GEOMETRIES: tuple[str, ...] = get_args(Geometry)
# ImageNet's mean colour in 8 bits: close to zero after the normalisation of the usual classifiers.
PADDING = (124, 116, 104)
Box = tuple[int, int, int, int]
# Of the network's image, in pixels: the side of a square, or (height, width).
Size = int | tuple[int, int]
SMALLEST, LARGEST = 8, 4096


def as_size(value: Any) -> Size | None:
    """A stored or configured size in its one form, an int for squares; None for anything that is not a size in [8, 4096]."""
    sides = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if len(sides) != 2 or not all(type(s) is int and SMALLEST <= s <= LARGEST for s in sides):
        return None
    return sides[0] if sides[0] == sides[1] else (sides[0], sides[1])


def height_width(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def size_text(size: int | Sequence[int]) -> str:
    """For people: "224 px", or "288 x 192 px" (height x width)."""
    return f"{size} px" if isinstance(size, int) else f"{size[0]} x {size[1]} px"


@dataclass(frozen=True)
class Placement:
    """Where a picture lies in the network's image. Boxes are (top, left, height, width) in whole pixels.

    Attributes:
        picture: (height, width) of the picture.
        size: (height, width) of the network's image.
        source: the part of the picture that is shown.
        target: where it lies in the network's image; the rest of that is padding.
    """

    picture: tuple[int, int]
    size: tuple[int, int]
    source: Box
    target: Box

    @property
    def padded(self) -> bool:
        """Whether the network's image has padding."""
        return self.target[2:] != self.size

    @property
    def cropped(self) -> bool:
        """Whether a part of the picture is not shown."""
        return self.source[2:] != self.picture


def placement(geometry: str, picture: tuple[int, int], size: tuple[int, int]) -> Placement:
    """Place a picture.

    Args:
        geometry: "squash" fills the image and changes the aspect; "letterbox" shows the whole picture, centred, in its own aspect, beside
            padding; "crop" fills the image with the largest centred part of the picture that has the image's aspect.
        picture: (height, width) of the picture, at least 1 each.
        size: (height, width) of the network's image.

    Raises:
        ConfigError: no such geometry.
    """
    (H, W), (h, w) = picture, size
    whole: Box = (0, 0, H, W)
    if geometry == "squash":
        return Placement(picture, size, whole, (0, 0, h, w))
    if geometry == "letterbox":
        scale = min(h / H, w / W)
        inner_h, inner_w = min(h, max(1, round(H * scale))), min(w, max(1, round(W * scale)))
        return Placement(picture, size, whole, ((h - inner_h) // 2, (w - inner_w) // 2, inner_h, inner_w))
    if geometry == "crop":
        scale = min(H / h, W / w)
        part_h, part_w = min(H, max(1, round(h * scale))), min(W, max(1, round(w * scale)))
        return Placement(picture, size, ((H - part_h) // 2, (W - part_w) // 2, part_h, part_w), (0, 0, h, w))
    raise ConfigError(f"geometry must be one of {', '.join(GEOMETRIES)}, got {geometry!r}.")
