"""What replaces removed pixels, and how a mask blends it in.

A mask value of 1 keeps the pixel, 0 replaces it: ``x * m + fill * (1 - m)`` on images in [0,1]. Because normalisation is affine,
blending with the classifier's mean colour equals multiplying the normalised image by the mask, as the paper's code does.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from explainer.errors import ConfigError

FillKind = Literal["mean", "black", "grey", "white", "blur", "noise", "shuffle"]


def make_fill(
    images: Tensor,
    kind: FillKind = "mean",
    mean: Tensor | None = None,
    generator: torch.Generator | None = None,
    blur_sigma: float | None = None,
) -> Tensor:
    """Replacement colours for every pixel.

    Args:
        images: ``[B,3,H,W]`` in [0,1].
        kind: ``mean`` (the classifier's mean colour, 0 after normalisation), ``black``, ``grey`` (0.5), ``white``,
            ``blur`` (Gaussian of the image), ``noise`` (uniform in [0,1] per pixel and channel), ``shuffle`` (the next image of the
            batch: "another image").
        mean: ``[3]`` or broadcastable mean colour in [0,1]; needed by ``mean`` only.
        generator: CPU generator for ``noise``.
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
        return tvf.gaussian_blur(images, [2 * radius + 1, 2 * radius + 1], [sigma, sigma])
    if kind == "noise":
        return torch.rand(images.shape, generator=generator, dtype=images.dtype).to(images.device)
    return images.roll(1, dims=0)


def blend(images: Tensor, mask: Tensor, fill: Tensor) -> Tensor:
    """Keep ``images`` where ``mask`` is 1, show ``fill`` where it is 0.

    Args:
        images: ``[B,3,H,W]``.
        mask: ``[B,H,W]`` or ``[B,1,H,W]`` in [0,1].
        fill: broadcastable to ``images``.
    """
    weight = mask if mask.ndim == 4 else mask.unsqueeze(1)
    return fill + weight * (images - fill)
