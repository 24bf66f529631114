"""Occlusion (Zeiler & Fergus, ECCV 2014): how much the class score falls when a patch is hidden."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from explainer.attribution import check_images
from explainer.baselines.kernels.base import Baseline
from explainer.baselines.kernels.hooks import untouched
from explainer.errors import ConfigError, ShapeError
from explainer.fills import FillKind, make_fill

Score = Literal["logit", "probability"]


def window_starts(pixels: int, window: int, stride: int) -> list[int]:
    """First pixel of every window along one side; the last window reaches the border and may be cut by it (as captum's is)."""
    return [i * stride for i in range(math.ceil(max(pixels - window, 0) / stride) + 1)]


class Occlusion(Baseline):
    """Each pixel's value is the mean, over the patches that cover it, of ``f_c(x) - f_c(x with the patch hidden)``.

    The results are those of ``captum.attr.Occlusion`` and, with ``segments``, of ``captum.attr.FeatureAblation``, for patches that span
    all channels; written here because all classes come from one sweep and patches of several images share a forward pass.

    Args:
        explanandum: the classifier.
        window: side of the patch in pixels, or (height, width).
        stride: distance between patches in pixels, or (vertical, horizontal); at most the window, so that no pixel is skipped.
        segments: regions to hide instead of patches: integers ``[1,1,H,W]``, shared by all images, one region per value.
        fill: what replaces hidden pixels; ``mean`` is 0 after normalisation.
        score: ``logit`` or ``probability`` (sigmoid or softmax, by the classifier's task).
        batch_size: most images per forward pass.
        shape: ``square``, or ``disc``: the pixels whose centres lie within half the window of its middle (with ``fill: blur`` the
            blurred discs of Fong and Vedaldi 2017). Discs of one size leave pixels between them uncovered unless the stride is at most
            0.7 of the window.
        blur_sigma: strength of ``fill: blur`` in pixels; None: 9 % of the shorter side.
    """

    name = "occlusion"
    passes = "1 forward per patch, all classes together"
    revision = 1  # noise as a fill is one draw for all images
    classes_share_work = True
    needs_gradients = False
    signed = True

    def __init__(
        self,
        explanandum: Any,
        *,
        window: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] = 8,
        segments: Tensor | None = None,
        fill: FillKind = "mean",
        score: Score = "logit",
        batch_size: int = 64,
        shape: Literal["square", "disc"] = "square",
        blur_sigma: float | None = None,
    ) -> None:
        super().__init__(explanandum)
        if shape not in ("square", "disc"):
            raise ConfigError(f"occlusion: shape must be square or disc, received {shape!r}.")
        self.shape, self.blur_sigma = shape, blur_sigma
        self.window = (window, window) if isinstance(window, int) else tuple(window)
        self.stride = (stride, stride) if isinstance(stride, int) else tuple(stride)
        if min(self.stride) < 1 or any(s > w for s, w in zip(self.stride, self.window, strict=True)):
            raise ConfigError(f"occlusion: stride must lie in 1..window, so that no pixel is skipped, received {stride} for {window}.")
        if segments is not None and (segments.ndim != 4 or segments.shape[:2] != (1, 1) or segments.is_floating_point()):
            raise ShapeError(f"occlusion: segments must be integers [1,1,H,W], received {segments.dtype} {tuple(segments.shape)}.")
        if score not in get_args(Score):
            raise ConfigError(f"occlusion: score must be one of {', '.join(get_args(Score))}, received {score!r}.")
        if batch_size < 1:
            raise ConfigError(f"occlusion: batch_size must be at least 1, received {batch_size}.")
        self.segments, self.fill, self.score, self.batch_size = segments, fill, score, batch_size

    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        return self._maps(images, class_index[:, None], generator).squeeze(1)

    def all_classes(
        self,
        images: Tensor,
        classes: list[int] | None = None,
        *,
        generator: torch.Generator | None = None,
        masks: Tensor | None = None,
    ) -> Tensor:
        """Maps of several classes ``[B,len(classes),H,W]`` from one sweep."""
        check_images(images)
        chosen = torch.as_tensor(range(self.num_classes) if classes is None else classes, device=images.device)
        with untouched(self.explanandum):
            return self._maps(images, chosen.expand(len(images), -1), generator or torch.Generator().manual_seed(0))

    @torch.no_grad()
    def _maps(self, images: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
        """Maps ``[B,k,H,W]`` of the classes ``[B,k]``."""
        size = (images.shape[-2], images.shape[-1])
        if self.segments is not None and tuple(self.segments.shape[-2:]) != size:
            raise ShapeError(f"occlusion: segments are {tuple(self.segments.shape)} but the images are {size[0]}x{size[1]} pixels.")
        mean = getattr(self.explanandum, "mean", None)
        fill = make_fill(images, self.fill, mean, generator, self.blur_sigma).expand_as(images)
        intact = self._value(images).gather(1, classes)  # [B,k]
        total = images.new_zeros(*classes.shape, *size)
        covered = torch.zeros(size, dtype=images.dtype, device=images.device)
        for hidden in self._patches(size, images.device, max(1, self.batch_size // len(images))):
            values = []
            for part in torch.arange(len(images)).split(self.batch_size):
                occluded = torch.where(hidden[:, None], fill[part].unsqueeze(1), images[part].unsqueeze(1))  # [b,n,C,H,W]
                values.append(self._value(occluded.flatten(0, 1)).view(len(part), len(hidden), -1))
            drop = intact[..., None] - torch.cat(values).transpose(1, 2).gather(1, classes[..., None].expand(-1, -1, len(hidden)))
            weights = hidden.to(images.dtype)
            total += torch.einsum("bkn,nhw->bkhw", drop, weights)
            covered += weights.sum(0)
        # Discs can leave corners uncovered: no drop was seen there.
        return total / covered.clamp(min=1)

    def _value(self, images: Tensor) -> Tensor:
        logits: Tensor = self.explanandum(images)
        return logits if self.score == "logit" else self.explanandum.probabilities(logits)

    def _patches(self, size: tuple[int, int], device: torch.device, count: int) -> Iterator[Tensor]:
        """Groups of at most ``count`` hidden regions, bool ``[n,H,W]``."""
        if self.segments is not None:
            labels = self.segments[0, 0].to(device)
            for values in labels.unique().split(count):
                yield labels == values.view(-1, 1, 1)
            return
        rows, columns = (window_starts(n, w, s) for n, w, s in zip(size, self.window, self.stride, strict=True))
        corners = torch.cartesian_prod(torch.tensor(rows), torch.tensor(columns)).to(device)
        y, x = torch.arange(size[0], device=device), torch.arange(size[1], device=device)
        for corner in corners.split(count):
            top, left = corner[:, :1], corner[:, 1:]
            inside_y = (y >= top) & (y < top + self.window[0])
            inside_x = (x >= left) & (x < left + self.window[1])
            inside = inside_y[:, :, None] & inside_x[:, None, :]
            if self.shape == "disc":
                across = [(p + 0.5 - c - w / 2) / (w / 2) for p, c, w in zip((y, x), (top, left), self.window, strict=True)]
                inside &= across[0].square()[:, :, None] + across[1].square()[:, None, :] <= 1
            yield inside
