"""Geometry and augmentation of an image with its masks; all randomness comes from one generator.

torchvision's v2 kernels do the work (they dispatch on ``tv_tensors``); its random transform classes are not used, because they
draw from the global generator and a sample must depend on (seed, epoch, index) alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from explainer.errors import ConfigError
from explainer.geometry import PADDING, Placement

__all__ = ["Augmentation", "place_image", "place_masks", "resize_image", "resize_masks", "to_picture"]


def resize_image(image: Tensor, height: int, width: int | None = None) -> Tensor:
    """Squash ``[3,H,W]`` to height x width (a square without ``width``), bilinear with antialiasing. Aspect is lost, as in the paper."""
    size = [height, width or height]
    return image if list(image.shape[-2:]) == size else F.resize_image(image, size, InterpolationMode.BILINEAR, antialias=True)


def resize_masks(masks: Tensor, height: int, width: int | None = None) -> Tensor:
    """The same for ``[N,H,W]`` labels: the nearest pixel centre, so no value is invented.

    "nearest-exact" and not torchvision's default "nearest", which picks a corner and shifts the mask by up to half a source pixel.
    """
    size = [height, width or height]
    return masks if list(masks.shape[-2:]) == size else F.resize_image(masks, size, InterpolationMode.NEAREST_EXACT)


def place_image(image: Tensor, place: Placement) -> Tensor:
    """The network's image ``[3,h,w]`` of a uint8 picture ``[3,H,W]``, which may have been decoded at a smaller size than ``place`` says."""
    if place.cropped:
        top, left, height, width = place.source
        y, x = image.shape[-2] / place.picture[0], image.shape[-1] / place.picture[1]
        rows = slice(round(top * y), max(round(top * y) + 1, round((top + height) * y)))
        image = image[:, rows, round(left * x) : max(round(left * x) + 1, round((left + width) * x))]
    image = resize_image(image, *place.target[2:])
    if not place.padded:
        return image
    top, left, height, width = place.target
    padded = torch.tensor(PADDING, dtype=image.dtype).view(3, 1, 1).expand(3, *place.size).clone()
    padded[:, top : top + height, left : left + width] = image
    return padded


def place_masks(masks: Tensor, place: Placement, padding: int) -> Tensor:
    """The same for ``[N,H,W]`` labels at the picture's own size; ``padding`` is what they hold beside the picture (void)."""
    if place.cropped:
        top, left, height, width = place.source
        masks = masks[:, top : top + height, left : left + width]
    masks = resize_masks(masks, *place.target[2:])
    if not place.padded:
        return masks
    top, left, height, width = place.target
    padded = masks.new_full((len(masks), *place.size), padding)
    padded[:, top : top + height, left : left + width] = masks
    return padded


def to_picture(masks: Tensor, place: Placement, outside: float = 0.0) -> Tensor:
    """Masks ``[N,h,w]`` of the network's image, of any scale, in the picture's own pixels ``[N,H,W]``: bilinear, float32.

    Args:
        masks: at the network's size, or at another one of the same frame.
        place: place of the picture.
        outside: value of the picture's pixels that the network did not see (geometry "crop").
    """
    masks = masks.float()
    if place.padded:
        y, x = masks.shape[-2] / place.size[0], masks.shape[-1] / place.size[1]
        top, left, height, width = place.target
        rows = slice(math.floor(top * y), max(math.floor(top * y) + 1, math.ceil((top + height) * y)))
        masks = masks[:, rows, math.floor(left * x) : max(math.floor(left * x) + 1, math.ceil((left + width) * x))]
    top, left, height, width = place.source
    if len(masks) and tuple(masks.shape[-2:]) != (height, width):
        masks = torch.nn.functional.interpolate(masks[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    if not place.cropped:
        return masks if len(masks) else masks.new_zeros(0, *place.picture)
    whole = masks.new_full((len(masks), *place.picture), outside)
    if len(masks):
        whole[:, top : top + height, left : left + width] = masks
    return whole


@dataclass(frozen=True)
class Augmentation:
    """Random changes to a training sample; the defaults change nothing.

    Attributes:
        flip: probability of a horizontal flip.
        crop_scale: (least, greatest) share of the image's area that a random crop keeps, or None for no crop.
        crop_ratio: (least, greatest) aspect of the crop, relative to the image's own (width / height), log-uniform.
        brightness, contrast, saturation: factors are uniform in [1 - x, 1 + x], x in [0,1].
        hue: shift is uniform in [-x, x], x in [0, 0.5].
    """

    flip: float = 0.0
    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        for key, most in (("flip", 1.0), ("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.5)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
                raise ConfigError(f"augment.{key} must be a number in [0, {most:g}], got {value!r}.")
        for key, least, most in (("crop_scale", 0.01, 1.0), ("crop_ratio", 0.1, 10.0)):
            pair = getattr(self, key)
            if key == "crop_scale" and pair is None:
                continue
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not least <= pair[0] <= pair[1] <= most:
                raise ConfigError(f"augment.{key} must be two numbers, ascending, in [{least:g}, {most:g}], got {pair!r}.")

    @classmethod
    def parse(cls, value: str | Mapping[str, Any] | Augmentation | None) -> Augmentation:
        """From a configuration: None or "none", "light" (flip), "standard" (flip, crop, colour), or a mapping of the attributes."""
        presets = {"none": {}, "light": {"flip": 0.5}, "standard": _STANDARD}
        if isinstance(value, cls):
            return value
        if value is None or isinstance(value, str):
            key = value or "none"
            if key not in presets:
                raise ConfigError(f"augment must be one of {', '.join(presets)} or a mapping, got {value!r}.")
            return cls(**presets[key])
        if not isinstance(value, Mapping):
            raise ConfigError(f"augment must be one of {', '.join(presets)} or a mapping, got {value!r}.")
        known = [f.name for f in fields(cls)]
        for key in value:
            if key not in known:
                raise ConfigError(f"augment has no key {key!r}. Its keys: {', '.join(known)}.")
        options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        return cls(**options)

    def working_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the image before the augmentation: the smallest crop then still has ``size`` pixels (at most twice
        ``size`` a side).
        """
        if self.crop_scale is None:
            return size
        height, width = (min(2 * side, math.ceil(side / math.sqrt(self.crop_scale[0]))) for side in size)
        return height, width

    def __call__(
        self, image: Tensor, masks: Tensor | None, size: tuple[int, int], generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Augment and bring to ``size``.

        Args:
            image: uint8 ``[3,H,W]``.
            masks: uint8 ``[N,H,W]`` labels that move with it, or None.
            size: (height, width) of the result.
            generator: the only source of randomness. The number of draws depends on the options alone.
        """
        draw = torch.rand(8, generator=generator).tolist()  # always all, so that one option does not change another's draws
        image = tv_tensors.Image(image)
        layers = None if masks is None else tv_tensors.Mask(masks)
        if self.crop_scale is not None:
            box = self._crop_box(image.shape[-2], image.shape[-1], draw[:4])
            image = F.crop(image, *box)
            layers = None if layers is None else F.crop(layers, *box)
        if draw[4] < self.flip:
            image = F.horizontal_flip(image)
            layers = None if layers is None else F.horizontal_flip(layers)
        image = resize_image(image.as_subclass(Tensor), *size)
        layers = None if layers is None else resize_masks(layers.as_subclass(Tensor), *size)
        return self._color(image, draw[5:], generator), layers

    def _crop_box(self, height: int, width: int, draw: list[float]) -> tuple[int, int, int, int]:
        """Top, left, height, width of a crop of random area and aspect, cut to the image where it would stick out."""
        assert self.crop_scale is not None
        area = height * width * _between(*self.crop_scale, draw[0])
        ratio = math.exp(_between(math.log(self.crop_ratio[0]), math.log(self.crop_ratio[1]), draw[1]))
        w = max(1, min(width, round(math.sqrt(area * ratio * (width / height)))))
        h = max(1, min(height, round(area / w)))
        return int(draw[2] * (height - h + 1)), int(draw[3] * (width - w + 1)), h, w

    def _color(self, image: Tensor, draw: list[float], generator: torch.Generator) -> Tensor:
        for strength, kernel, value in (
            (self.brightness, F.adjust_brightness, draw[0]),
            (self.contrast, F.adjust_contrast, draw[1]),
            (self.saturation, F.adjust_saturation, draw[2]),
        ):
            if strength:
                image = kernel(image, 1 + strength * (2 * value - 1))
        if self.hue:
            image = F.adjust_hue(image, self.hue * (2 * torch.rand((), generator=generator).item() - 1))
        return image


_STANDARD: dict[str, Any] = {"flip": 0.5, "crop_scale": (0.5, 1.0), "brightness": 0.2, "contrast": 0.2, "saturation": 0.2}


def _between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share
