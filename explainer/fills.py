"""What replaces removed pixels, and how a mask blends it in.

A mask value of 1 keeps the pixel, 0 replaces it: ``x * m + fill * (1 - m)`` on images in [0,1]. Because normalisation is affine,
blending with the classifier's mean colour equals multiplying the normalised image by the mask, as the paper's code does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from explainer.errors import ConfigError
from explainer.vocabulary import FillKind as FillKind  # re-exported: the functions below take it

#: One CPU generator for a whole batch, or one for each image, so that an image's draws do not depend on its neighbours.
Generators = torch.Generator | Sequence[torch.Generator] | None


def make_fill(
    images: Tensor,
    kind: FillKind = "mean",
    mean: Tensor | None = None,
    generator: Generators = None,
    blur_sigma: float | None = None,
) -> Tensor:
    """Replacement colours for every pixel.

    Args:
        images: ``[B,3,H,W]`` in [0,1].
        kind: ``mean`` (the classifier's mean colour, 0 after normalisation), ``black``, ``grey`` (0.5), ``white``,
            ``blur`` (Gaussian of the image), ``noise`` (uniform in [0,1] per pixel and channel), ``shuffle`` (the next image of the
            batch: "another image").
        mean: ``[3]`` or broadcastable mean colour in [0,1]; needed by ``mean`` only.
        generator: source of ``noise``: one for each image, or one whose draw all images share, so that a map does not depend on what is
            beside it in the batch. None: torch's own, drawn for each image.
        blur_sigma: pixels; default 9 % of the shorter side.

    Returns:
        ``[B,3,H,W]`` or a shape that broadcasts to it.
    """
    if kind not in get_args(FillKind):
        raise ConfigError(f"fill must be one of {', '.join(get_args(FillKind))}, received {kind!r}.")
    if kind == "mean":
        if mean is None:
            raise ConfigError("fill 'mean' needs the classifier's mean colour: pass mean=explanandum.mean.")
        return mean.to(images).reshape(1, -1, 1, 1)
    constant = {"black": 0.0, "grey": 0.5, "white": 1.0}.get(kind)
    if constant is not None:
        return images.new_full((1, 1, 1, 1), constant)
    if kind == "blur":
        sigma = blur_sigma if blur_sigma is not None else 0.09 * min(images.shape[-2:])
        radius = min(int(3 * sigma + 0.5), min(images.shape[-2:]) - 1)
        return gaussian_blur(images, radius, sigma)
    if kind == "noise":
        shape = (1, *images.shape[1:]) if isinstance(generator, torch.Generator) else images.shape
        return _drawn(torch.rand, shape, generator, images.dtype).to(images.device)
    return images.roll(1, dims=0)


def gaussian_blur(images: Tensor, radius: int, sigma: float) -> Tensor:
    """Gaussian of ``[B,C,H,W]`` by torchvision, borders mirrored, cut at ``radius`` pixels: one axis after the other.

    torchvision takes both at once, with ``(2 radius + 1) / 2`` times the products: for large radii more than a classifier's pass.
    """
    length = 2 * radius + 1
    blurred: Tensor = tvf.gaussian_blur(tvf.gaussian_blur(images, [length, 1], [sigma, sigma]), [1, length], [sigma, sigma])
    return blurred


def _drawn(draw: Any, shape: Sequence[int], generator: Generators, dtype: torch.dtype) -> Tensor:
    """``draw`` (``torch.rand`` or ``torch.randn``) of ``shape``, by one generator or by one for each image."""
    if generator is None or isinstance(generator, torch.Generator):
        return draw(tuple(shape), generator=generator, dtype=dtype)  # type: ignore[no-any-return]
    return torch.stack([draw(tuple(shape[1:]), generator=g, dtype=dtype) for g in generator])


def judging_fill(trained: Any) -> FillKind:
    """The fill by which a single mask is judged or refined later: the training's, where it can be made for one image and is always the same
    (an unknown one, another image and one drawn anew each time cannot: then the mean colour, the paper's).

    Args:
        trained: ``metadata["fill"]`` of an Explainer, or None.
    """
    kinds: tuple[FillKind, ...] = ("black", "grey", "white", "blur", "noise")
    return next((kind for kind in kinds if kind == trained), "mean")


def alternative_fill(
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    generator: Generators = None,
    kind: Literal["blur", "color", "random"] = "random",
    blur_sigma: float = 10.0,
) -> Tensor:
    """The alternative image of Dabkowski & Gal (2017), as adapted by Stalder et al.'s public code; made from normalised images.

    ``blur``: Gaussian of the normalised image, surrounded by zeros (the mean colour). ``color``: per image and channel one value uniform
    in [-0.33, 0.33], plus noise of mean 0.11 and standard deviation 1 per pixel (so in the code; 0.11 was meant as the deviation).
    ``random``: one of the two for the whole batch.

    Args:
        images: ``[B,3,H,W]`` in [0,1].
        mean, std: mean and standard deviation of the classifier's normalisation, ``[3]`` or one number.
        generator: one for the batch, one for each image (then ``kind`` says which image is made), or None: torch's own.
        kind: which of the two images.
        blur_sigma: pixels.

    Returns:
        ``[B,3,H,W]``; ``color`` may leave [0,1].
    """
    if kind not in ("blur", "color", "random"):
        raise ConfigError(f"the alternative image must be blur, color or random, received {kind!r}.")
    if kind == "random":
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ConfigError("one generator for each image cannot choose for the batch: name the kind, blur or color.")
        kind = alternative_kind(generator)
    center, scale = mean.to(images).reshape(1, -1, 1, 1), std.to(images).reshape(1, -1, 1, 1)
    if kind == "blur":
        return zero_padded_blur((images - center) / scale, blur_sigma) * scale + center
    color = _drawn(torch.rand, (*images.shape[:2], 1, 1), generator, images.dtype) * 0.66 - 0.33
    noise = _drawn(torch.randn, images.shape, generator, images.dtype) + 0.11
    return (color + noise).to(images) * scale + center


def alternative_kind(generator: torch.Generator | None = None) -> Literal["blur", "color"]:
    """Which alternative image a batch gets, each as likely."""
    return "blur" if bool(torch.rand((), generator=generator) < 0.5) else "color"


def zero_padded_blur(images: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur of ``[B,C,H,W]`` (window ``+- ceil(4 sigma)``) with zeros outside the image."""
    if sigma <= 0:
        raise ConfigError(f"blur_sigma must be positive, received {sigma}.")
    half = math.ceil(4 * sigma)
    offsets = torch.arange(-half, half + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    flat = images.flatten(0, 1).unsqueeze(1)
    flat = torch.nn.functional.conv2d(flat, kernel.view(1, 1, -1, 1), padding=(half, 0))
    flat = torch.nn.functional.conv2d(flat, kernel.view(1, 1, 1, -1), padding=(0, half))
    return flat.view_as(images)


def blend(images: Tensor, mask: Tensor, fill: Tensor) -> Tensor:
    """Keep ``images`` where ``mask`` is 1, show ``fill`` where it is 0.

    Args:
        images: ``[B,3,H,W]``.
        mask: ``[B,H,W]`` or ``[B,1,H,W]`` in [0,1].
        fill: broadcastable to ``images``.
    """
    weight = mask if mask.ndim == 4 else mask.unsqueeze(1)
    return fill + weight * (images - fill)
