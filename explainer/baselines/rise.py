"""RISE (Petsiuk, Das & Saenko, BMVC 2018): the average of random masks, weighted by the score each one leaves to the class."""

from __future__ import annotations

import math
import time
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from explainer.attribution import check_images
from explainer.baselines.kernels.base import Baseline
from explainer.baselines.kernels.hooks import untouched
from explainer.errors import ConfigError, ShapeError
from explainer.fills import FillKind, make_fill

Score = Literal["probability", "logit"]


def smooth_masks(grids: Tensor, shifts: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinearly enlarged grids, each cropped at its own shift (section 3.2 of the paper).

    A grid of ``g`` x ``g`` cells is enlarged to ``(g+1)`` cells a side and an ``H`` x ``W`` window is cut out. The enlargement is
    separable, so each mask is two small matrix products, and no enlarged grid is ever stored.

    Args:
        grids: ``[N,g,g]``, 1 keeps a cell.
        shifts: ``[N,2]`` long, vertical and horizontal offset, below ``ceil(H/g)`` and ``ceil(W/g)``.
        size: (H, W) in pixels.

    Returns:
        ``[N,1,H,W]``, in [0,1] for grids in [0,1].
    """
    cells = grids.shape[-1]
    sides = []
    for axis, pixels in enumerate(size):
        length = (cells + 1) * math.ceil(pixels / cells)
        identity = torch.eye(cells, dtype=grids.dtype, device=grids.device)[None]
        weights = F.interpolate(identity, size=length, mode="linear", align_corners=False)[0]  # [g, length]
        windows = weights.unfold(1, pixels, 1).transpose(0, 1)  # [length-pixels+1, g, pixels]
        sides.append(windows[shifts[:, axis]])
    return (sides[0].transpose(1, 2) @ grids @ sides[1]).unsqueeze(1)


class RISE(Baseline):
    """``S_c = 1/(N p) sum_i F_c(x * M_i) M_i`` (eq. 6); all classes come from the same N forward passes.

    Every image sees the same masks, so a batch gives the maps of its images one by one.

    Args:
        explanandum: the classifier.
        n_masks: N, classifier passes per image (4000 for VGG-16 and 8000 for ResNet-50 in the paper).
        grid: cells a side before enlarging.
        p: probability that a cell is kept.
        masks: given masks ``[N,1,H,W]`` in [0,1] instead of random ones; ``n_masks`` and ``grid`` are then unused.
        normalize: divide by ``p`` as the paper's equation does; the public code does not.
        score: ``probability`` (sigmoid or softmax, by the classifier's task) or ``logit``.
        fill: what replaces hidden pixels; ``mean`` is 0 after normalisation, as published.
        batch_size: most images per forward pass.
        budget_s: stop after so many seconds and average the masks seen until then (at least one batch); None: use all.

    Attributes:
        masks_used: number of masks behind the last map.
    """

    name = "rise"
    passes = "n_masks forward, all classes together"
    classes_share_work = True
    needs_gradients = False
    deterministic = False
    revision = 1  # noise as a fill is one draw for all images

    def __init__(
        self,
        explanandum: Any,
        *,
        n_masks: int = 4000,
        grid: int = 7,
        p: float = 0.5,
        masks: Tensor | None = None,
        normalize: bool = True,
        score: Score = "probability",
        fill: FillKind = "mean",
        batch_size: int = 64,
        budget_s: float | None = None,
    ) -> None:
        super().__init__(explanandum)
        if n_masks < 1 or grid < 1 or batch_size < 1:
            raise ConfigError(f"rise: n_masks, grid and batch_size must be at least 1, received {n_masks}, {grid}, {batch_size}.")
        if not 0 < p <= 1:
            raise ConfigError(f"rise: p is the probability of keeping a cell and must lie in (0,1], received {p}.")
        if score not in get_args(Score):
            raise ConfigError(f"rise: score must be one of {', '.join(get_args(Score))}, received {score!r}.")
        if masks is not None and (masks.ndim != 4 or masks.shape[1] != 1 or len(masks) == 0):
            raise ShapeError(f"rise: masks must be [N,1,H,W] with N >= 1, received {tuple(masks.shape)}.")
        self.n_masks = n_masks if masks is None else len(masks)
        self.grid, self.p, self.masks, self.normalize = grid, p, masks, normalize
        self.score, self.fill, self.batch_size, self.budget_s = score, fill, batch_size, budget_s
        self.masks_used = 0

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
        """Maps of several classes ``[B,len(classes),H,W]`` from one set of masks."""
        check_images(images)
        chosen = torch.as_tensor(range(self.num_classes) if classes is None else classes, device=images.device)
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        with untouched(self.explanandum):
            return self._maps(images, chosen.expand(len(images), -1), generator)

    @torch.no_grad()
    def _maps(self, images: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
        """Maps ``[B,k,H,W]`` of the classes ``[B,k]``."""
        size = (images.shape[-2], images.shape[-1])
        if self.masks is not None and tuple(self.masks.shape[-2:]) != size:
            raise ShapeError(f"rise: the given masks are {tuple(self.masks.shape)} but the images are {size[0]}x{size[1]} pixels.")
        # Drawn at once, so that the masks do not depend on how they are batched.
        keep = torch.rand(self.n_masks, self.grid, self.grid, generator=generator, dtype=torch.float64) < self.p
        cells = torch.tensor([math.ceil(side / self.grid) for side in size])
        shifts = (torch.rand(self.n_masks, 2, generator=generator, dtype=torch.float64) * cells).long()
        fill = make_fill(images, self.fill, getattr(self.explanandum, "mean", None), generator)
        total = images.new_zeros(*classes.shape, size[0] * size[1])
        step = max(1, self.batch_size // len(images))
        used, start = 0, time.monotonic()
        while used < self.n_masks and not (used and self.budget_s is not None and time.monotonic() - start > self.budget_s):
            chunk = slice(used, min(used + step, self.n_masks))
            if self.masks is not None:
                batch = self.masks[chunk].to(images)
            else:
                batch = smooth_masks(keep[chunk].to(images), shifts[chunk].to(images.device), size)
            scores = self._scores(images, batch, fill, classes)  # [B,k,n]
            total += scores @ batch.flatten(1)
            used = chunk.stop
        self.masks_used = used
        return total.view(*classes.shape, *size) / (used * (self.p if self.normalize else 1.0))

    def _scores(self, images: Tensor, masks: Tensor, fill: Tensor, classes: Tensor) -> Tensor:
        """Score of each class ``[B,k]`` of each image under each mask ``[n,1,H,W]``: ``[B,k,n]``."""
        scores = []
        fills = fill.expand(len(images), -1, -1, -1)
        for part in torch.arange(len(images)).split(self.batch_size):
            hidden = fills[part].unsqueeze(1)
            masked = torch.addcmul(hidden, masks, images[part].unsqueeze(1) - hidden)  # fill + m (x - fill)
            logits = self.explanandum(masked.flatten(0, 1))
            value = logits if self.score == "logit" else self.explanandum.probabilities(logits)
            picked = value.view(len(part), len(masks), -1).transpose(1, 2)  # [b,K,n]
            scores.append(picked.gather(1, classes[part, :, None].expand(-1, -1, len(masks))))
        return torch.cat(scores)
