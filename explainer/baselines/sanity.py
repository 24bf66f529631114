"""Rows that any method must beat or cannot: maps which look at no class, at no image, or at the answer."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from explainer.baselines.kernels.base import Baseline
from explainer.errors import ConfigError, ShapeError


class Constant(Baseline):
    """The same ``value`` everywhere: 0, 0.5 and 1 are the rows of the tables."""

    name = "constant"
    needs_gradients = False
    reference = True
    class_specific = False

    def __init__(self, explanandum: Any, value: float = 0.5) -> None:
        super().__init__(explanandum)
        if not 0 <= value <= 1:
            raise ConfigError(f"constant: value must lie in [0,1], received {value}.")
        self.value = value

    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        return torch.full_like(images[:, 0], self.value)


class Centre(Baseline):
    """A Gaussian around the centre, 1 at its peak; ``sigma`` is a fraction of the shorter side. Photographers centre their objects."""

    name = "centre"
    needs_gradients = False
    reference = True
    class_specific = False

    def __init__(self, explanandum: Any, sigma: float = 0.25) -> None:
        super().__init__(explanandum)
        if sigma <= 0:
            raise ConfigError(f"centre: sigma must be positive, received {sigma}.")
        self.sigma = sigma

    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        scale = self.sigma * min(images.shape[-2:])
        y, x = (torch.arange(n, dtype=images.dtype, device=images.device) - (n - 1) / 2 for n in images.shape[-2:])
        return torch.exp(-(y[:, None] ** 2 + x**2) / (2 * scale**2)).expand(len(images), -1, -1)


class Random(Baseline):
    """Uniform noise in [0,1). An image's noise follows from the generator and its own pixels: alone or in a batch it is the same,
    and two images differ (one common map would make a single lucky pixel decide a whole pointing game).
    """

    name = "random"
    needs_gradients = False
    reference = True
    deterministic = False
    class_specific = False

    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        base = int(torch.randint(2**31, (), generator=generator))
        maps = []
        for image in images.detach().cpu():
            own = torch.Generator().manual_seed(base ^ zlib.crc32(image.contiguous().numpy().tobytes()))
            maps.append(torch.rand(image.shape[-2:], generator=own, dtype=image.dtype))
        return torch.stack(maps).to(images)


class Edges(Baseline):
    """Sobel gradient magnitude of the grey image: what a method shows that merely finds edges (Adebayo et al., NeurIPS 2018)."""

    name = "edges"
    needs_gradients = False
    reference = True
    class_specific = False

    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        grey = F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        sobel = torch.tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=images.dtype, device=images.device) / 8
        dx, dy = F.conv2d(grey, torch.stack([sobel, sobel.T])[:, None]).unbind(1)
        return torch.hypot(dx, dy)


class GroundTruth(Baseline):
    """The object's own mask: the upper bound of localisation metrics. An absent class has an empty map."""

    name = "ground_truth"
    needs_gradients = False
    reference = True
    needs_masks = True

    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        expected = (len(images), self.num_classes, *images.shape[-2:])
        if masks is None or tuple(masks.shape) != expected:
            received = None if masks is None else tuple(masks.shape)
            raise ShapeError(f"ground_truth: masks must be {expected} (B,K,H,W), received {received}.")
        return masks.to(images)[torch.arange(len(images), device=images.device), class_index]
