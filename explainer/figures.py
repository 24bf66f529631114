"""Pictures: overlays and contact sheets. The only module that imports matplotlib; no pyplot, so no display and no global state."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tvf

from explainer.errors import ConfigError
from explainer.files import replacing

OVERLAY_COLOR = (1.0, 0.1, 0.35)


def overlay(image: Tensor, mask: Tensor, dim: float = 0.25) -> NDArray[np.uint8]:
    """Show what the mask keeps: kept pixels stay, removed ones fade to a dark grey.

    Args:
        image: ``[3,H,W]`` in [0,1].
        mask: ``[H,W]`` in [0,1].
        dim: brightness of removed pixels.

    Returns:
        RGB ``[H,W,3]`` uint8.
    """
    grey = image.mean(dim=0, keepdim=True) * dim
    shown = mask * image + (1 - mask) * grey
    return (shown.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def save_figure(figure: Figure, path: Path, dpi: int = 100) -> None:
    """Write a PNG, creating the folder."""
    FigureCanvasAgg(figure)
    with replacing(path, durable=False) as stream, warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; the user can do nothing about a warning for each of its letters.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(stream, dpi=dpi, format="png")


def signed_overlay(image: Tensor, values: Tensor, dim: float = 0.5) -> NDArray[np.uint8]:
    """A signed map over the grey image: red where it is positive, blue where it is negative.

    Args:
        image: ``[3,H,W]`` in [0,1].
        values: ``[H,W]``; divided by its largest magnitude.
        dim: brightness of the image.

    Returns:
        RGB ``[H,W,3]`` uint8.
    """
    top = values.abs().max()
    scaled = values / top if float(top) > 0 else values
    red, blue = scaled.clamp(min=0), (-scaled).clamp(min=0)
    grey = image.mean(dim=0) * dim
    rest = grey * (1 - red - blue)
    shown = torch.stack([rest + red, rest, rest + blue])
    return (shown.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def visible(values: Tensor, size: tuple[int, int]) -> Tensor:
    """A map of fine lines and few large values, made ready for the eye.

    Args:
        values: ``[h,w]``.
        size: of the picture, (height, width).

    Returns:
        ``[height,width]`` in [-1,1]: at the picture's size, smoothed over a hundredth of its side, and divided by the magnitude that 1 % of
        the pixels exceed (by the largest one where that is 0).
    """
    shown: Tensor = values.float()[None, None]
    if values.shape != size:
        shown = F.interpolate(shown, size, mode="bilinear", align_corners=False)
    sigma = min(size) / 100
    edge = 2 * math.ceil(2 * sigma) + 1
    shown = tvf.gaussian_blur(shown, [edge, edge], [sigma, sigma])[0, 0]
    magnitude = shown.abs()
    top = float(magnitude.flatten().kthvalue(max(1, int(0.99 * magnitude.numel()))).values) or float(magnitude.max()) or 1.0
    return (shown / top).clamp(-1, 1)


def panel_sheet(panels: Sequence[tuple[str, NDArray[np.uint8]]], path: Path, columns: int = 6) -> None:
    """Pictures with titles, row by row.

    Args:
        panels: title and RGB ``[H,W,3]`` uint8 of each.
        path: PNG file.
        columns: pictures a row, at most.
    """
    if not panels:
        raise ConfigError("panel_sheet needs at least one panel.")
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.9 * columns, 2.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, picture) in zip(axes.flat, panels, strict=False):
        axis.imshow(picture)
        axis.set_title(_fitted(title).replace("$", r"\$"), fontsize=9)  # matplotlib reads what stands between two dollars as a formula
    save_figure(figure, path, dpi=130)  # a picture of 224 pixels keeps them


def _fitted(title: str) -> str:
    """At most two lines, so that no title runs into its neighbour's."""
    return "\n".join(textwrap.wrap(title, 28, max_lines=2, placeholder="..."))


def mask_sheet(
    images: Tensor,
    class_masks: Tensor,
    targets: Tensor,
    class_names: Sequence[str],
    path: Path,
    *,
    merged: Tensor | None = None,
    truth: Tensor | None = None,
    titles: Sequence[str] = (),
) -> None:
    """A contact sheet: one row an image; the image, its merged mask, the ground truth if given, and the mask of each chosen class.

    Args:
        images: ``[B,3,H,W]`` in [0,1].
        class_masks: ``[B,K,H,W]`` in [0,1].
        targets: ``[B,K]``, the classes to show per image.
        class_names: names of the K classes.
        path: PNG file.
        merged: ``[B,H,W]``, default the maximum over the chosen classes.
        truth: ``[B,H,W]`` ground truth of the chosen classes, or None.
        titles: one per row, or empty.
    """
    B = len(images)
    if B == 0:
        raise ConfigError("mask_sheet needs at least one image.")
    chosen = [row.nonzero().flatten().tolist() for row in targets > 0.5]
    if merged is None:
        merged = torch.stack([m[c].amax(dim=0) if c else m.new_zeros(m.shape[-2:]) for m, c in zip(class_masks, chosen, strict=True)])
    fixed = 3 + (truth is not None)
    columns = fixed + max(1, max(len(c) for c in chosen))
    figure = Figure(figsize=(1.6 * columns, 1.75 * B), layout="constrained")
    axes = figure.subplots(B, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for b in range(B):
        picture = images[b].permute(1, 2, 0).clamp(0, 1).cpu().numpy()
        axes[b, 0].imshow(picture)
        axes[b, 0].set_title(titles[b] if titles else "image", fontsize=8)
        axes[b, 1].imshow(merged[b].cpu().numpy(), vmin=0, vmax=1, cmap="magma")
        axes[b, 1].set_title(f"mask, area {float(merged[b].mean()):.2f}", fontsize=8)
        axes[b, 2].imshow(overlay(images[b], merged[b]))
        axes[b, 2].set_title("what it keeps", fontsize=8)
        if truth is not None:
            axes[b, 3].imshow(truth[b].cpu().numpy(), vmin=0, vmax=1, cmap="gray")
            axes[b, 3].set_title("ground truth", fontsize=8)
        for column, k in enumerate(chosen[b]):
            axes[b, fixed + column].imshow(overlay(images[b], class_masks[b, k]))
            axes[b, fixed + column].set_title(class_names[k], fontsize=8)
    save_figure(figure, path)
