"""The shared kernel of the perturbation methods: Gaussian smoothing, perturbation pyramids, mask upsampling, jitter.

Fong and Vedaldi (ICCV 2017) and Fong, Patrick and Vedaldi (ICCV 2019). A mask value of 1 keeps the pixel, 0 replaces it.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from explainer.errors import ConfigError, ShapeError

PerturbationKind = Literal["blur", "fade", "constant", "noise"]

_EPSILON = 1.1920928955078125e-7  # keeps sigma = 0 finite; the spacing of float32 at 1, as the public code uses in every precision


def gaussian_kernel(sigma: float, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """Sampled Gaussian of half width ``ceil(4 sigma)`` that sums to 1, ``[2*ceil(4 sigma)+1]``; sigma = 0 gives ``[1]``."""
    half = math.ceil(4 * sigma)
    t = torch.arange(-half, half + 1, dtype=dtype, device=device)
    kernel = torch.exp(-((t / (math.sqrt(2) * sigma + _EPSILON)) ** 2))
    return kernel / kernel.sum()


def imsmooth(
    images: Tensor,
    sigma: float,
    *,
    stride: int = 1,
    padding: int = 0,
    padding_mode: Literal["constant", "replicate", "reflect"] = "constant",
    padding_value: float = 0.0,
    renormalize: bool = False,
) -> Tensor:
    """Separable Gaussian smoothing.

    Args:
        images: ``[B,C,H,W]``.
        sigma: standard deviation in pixels, >= 0.
        stride: keep every ``stride``-th row and column of the result.
        padding: widen the result by ``2 * padding`` pixels on each side in ``constant`` mode and by ``padding`` otherwise
            (each of the public code's two passes pads both axes).
        padding_mode: what lies outside the image; ``constant`` is ``padding_value``.
        padding_value: only for ``constant``.
        renormalize: divide by the part of the window that lies inside the image (the paper's definition); False lets the
            border darken towards ``padding_value`` (the public code's).

    Returns:
        ``[B,C,H',W']``.

    Raises:
        ConfigError: ``sigma`` is negative.
    """
    if sigma < 0:
        raise ConfigError(f"sigma must be at least 0 pixels, received {sigma}.")
    kernel = gaussian_kernel(sigma, images.dtype, images.device)
    half = kernel.numel() // 2

    def pad(x: Tensor, vertical: int, horizontal: int, value: float) -> Tensor:
        sides = (horizontal, horizontal, vertical, vertical)
        return F.pad(x, sides, value=value) if padding_mode == "constant" else F.pad(x, sides, mode=padding_mode)

    def smooth(x: Tensor, value: float) -> Tensor:
        again = padding if padding_mode == "constant" else 0
        x = pad(x, half + padding, padding, value)
        flat = F.conv2d(x.flatten(0, 1)[:, None], kernel.view(1, 1, -1, 1), stride=(stride, 1))
        flat = pad(flat, again, half + again, value)
        flat = F.conv2d(flat, kernel.view(1, 1, 1, -1), stride=(1, stride))
        return flat.view(x.shape[0], x.shape[1], *flat.shape[-2:])

    result = smooth(images, padding_value)
    if renormalize:
        inside = smooth(torch.ones_like(images[:1, :1]), 0.0)
        return result / inside.clamp_min(torch.finfo(inside.dtype).tiny)
    return result


def pyramid(
    images: Tensor,
    kind: PerturbationKind = "blur",
    levels: int = 8,
    *,
    max_blur: float = 20.0,
    origin: Tensor | float = 0.0,
    renormalize: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The image at ``levels`` strengths of a perturbation, from fully perturbed (level 0) to untouched (last level).

    Args:
        images: ``[B,C,H,W]``.
        kind: ``blur`` (Gaussian of sigma ``max_blur * (1 - level/(levels-1))``, zero padded), ``fade`` (towards ``origin``),
            ``constant`` (to each image's own mean colour), ``noise`` (to one pattern of uniform noise, the same for all images).
        levels: number of levels, >= 2.
        max_blur: pixels.
        origin: colour, one number or ``[C]``, to which ``fade`` tends and which surrounds the image for ``blur``. The public code
            works on normalised images, where 0 is the classifier's mean colour; the default is black in the space of ``images``.
        renormalize: divide by the part of the window inside the image; see :func:`imsmooth`.
        generator: CPU generator, for ``noise``.

    Returns:
        ``[B,levels,C,H,W]``.
    """
    if kind not in get_args(PerturbationKind):
        raise ConfigError(f"perturbation must be one of {', '.join(get_args(PerturbationKind))}, received {kind!r}.")
    if levels < 2:
        raise ConfigError(f"levels must be at least 2 (perturbed and untouched), received {levels}.")
    strength = [k / (levels - 1) for k in range(levels)]
    if kind in ("blur", "fade"):
        base = torch.as_tensor(origin, dtype=images.dtype, device=images.device).reshape(1, -1, 1, 1)
        centred = images - base
        if kind == "blur":
            stack = [imsmooth(centred, (1 - s) * max_blur, renormalize=renormalize) for s in strength]
        else:
            stack = [centred * s for s in strength]
        return torch.stack(stack, dim=1) + base.unsqueeze(1)
    if kind == "constant":
        fill = images.mean(dim=(2, 3), keepdim=True)
    else:
        fill = torch.rand((1, *images.shape[1:]), generator=generator, dtype=images.dtype).to(images.device)
    return torch.stack([fill + s * (images - fill) for s in strength], dim=1)


class _Interpolate(torch.autograd.Function):
    """Linear interpolation between the two pyramid levels next to the mask's value; the level itself has no gradient."""

    @staticmethod
    def forward(ctx: Any, mask: Tensor, table: Tensor, first_row: Tensor, levels: int, channels: int) -> Tensor:
        n, height, width = mask.shape
        position = mask.reshape(n, -1) * (levels - 1)
        lower = position.floor().clamp_(0, levels - 1)
        fraction = (position - lower).unsqueeze(-1)
        step = height * width
        rows = first_row[:, None] + lower.long() * step + torch.arange(step, device=mask.device)
        # At the last level both ends coincide: the untouched image has nothing above it to move to.
        above = rows + (lower < levels - 1).long() * step
        low = table.index_select(0, rows.flatten()).view(n, step, channels)
        difference = table.index_select(0, above.flatten()).view(n, step, channels).sub_(low)
        ctx.save_for_backward(difference)
        ctx.levels = levels
        return torch.addcmul(low, fraction, difference).view(n, height, width, channels).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> tuple[Tensor, None, None, None, None]:
        (difference,) = ctx.saved_tensors
        n, _, height, width = grad[0].shape
        flat = grad[0].permute(0, 2, 3, 1).reshape(n, height * width, -1)
        return ((flat * difference).sum(-1).mul_(ctx.levels - 1).view(n, height, width), None, None, None, None)


class Perturbation:
    """Images with a perturbation pyramid, ready to be masked many times.

    Args:
        levels: ``[B,L,C,H,W]`` from :func:`pyramid`.
    """

    def __init__(self, levels: Tensor) -> None:
        self.count, self.levels, self.channels, self.height, self.width = levels.shape
        # Channels last: one index per pixel and level then fetches all its channels.
        self._table = levels.permute(0, 1, 3, 4, 2).reshape(-1, self.channels).contiguous()

    def apply(self, mask: Tensor, image: Tensor | None = None) -> Tensor:
        """Show each pixel at the strength that the mask asks for; differentiable in the mask.

        Args:
            mask: ``[N,H,W]`` in [0,1]; 1 shows the untouched pixel, 0 the fully perturbed one.
            image: ``[N]`` long, which of the B images each mask is for; None when N = B, or B = 1.

        Returns:
            ``[N,C,H,W]``.

        Raises:
            ShapeError: the mask is not of the images' size, or there is not one mask per image.
        """
        if mask.ndim != 3 or mask.shape[1:] != (self.height, self.width):
            raise ShapeError(f"mask must be [N,H,W] with H,W = {self.height},{self.width}, received {tuple(mask.shape)}.")
        if image is None:
            if self.count not in (1, mask.shape[0]):
                raise ShapeError(f"{mask.shape[0]} masks for {self.count} images: pass image=, the image's index for each mask.")
            image = torch.arange(mask.shape[0], device=mask.device) % self.count
        first_row = image * (self.levels * self.height * self.width)
        perturbed: Tensor = _Interpolate.apply(mask, self._table, first_row, self.levels, self.channels)
        return perturbed


def upsampling_matrix(coarse: int, fine: int, sigma: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bilinear upsampling (half-pixel centres) followed by a renormalised Gaussian, as one matrix ``[fine, coarse]``.

    Both are separable and linear, so ``A @ mask @ B.T`` upsamples and smooths a mask; every row sums to 1.
    """
    position = ((torch.arange(fine, dtype=torch.float64) + 0.5) * coarse / fine - 0.5).clamp(0, coarse - 1)
    matrix = (1 - (position[:, None] - torch.arange(coarse, dtype=torch.float64)).abs()).clamp_min(0)
    if sigma > 0:
        offset = torch.arange(fine, dtype=torch.float64)
        smooth = torch.exp(-((offset[:, None] - offset) ** 2) / (2 * sigma**2))
        matrix = (smooth / smooth.sum(1, keepdim=True)) @ matrix
    return matrix.to(dtype)


def shift(images: Tensor, down: int, right: int) -> Tensor:
    """Translate ``[..., H, W]`` by whole pixels; the border pixels are repeated into what the shift uncovers."""
    height, width = images.shape[-2:]
    rows = (torch.arange(height, device=images.device) - down).clamp_(0, height - 1)
    columns = (torch.arange(width, device=images.device) - right).clamp_(0, width - 1)
    return images.index_select(-2, rows).index_select(-1, columns)
