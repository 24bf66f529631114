"""Class activations that compete for a position, where something is: ours, for pictures with several labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from explainer.attribution.shares import SHARP, class_shares, similarity, spread_over_similar
from explainer.baselines.hires_cam import HiResCam
from explainer.baselines.kernels.cam import Convention
from explainer.baselines.kernels.features import forward_features
from explainer.baselines.kernels.hooks import find_layer
from explainer.baselines.kernels.maps import Interpolation
from explainer.errors import ConfigError
from explainer.tensors import min_max


class CompetitionCam(HiResCam):
    """``share_k * m``: the class's share of a position, times how much there is at it.

    ``share_k = softmax_k(contrast * a_k / s + log p_k)`` over all classes, a_k the class's HiResCAM, s the standard deviation of all a of
    the image, p_k its probability; m the mean of the position's features, scaled to [0,1] in each image, because what a network has learned
    to see activates more of them than a background does. Not from a paper: objects that occur together (garments of one person) have
    activations that are alike, and an activation alone does not tell one from the other. It is what a shared encoder's masks begin as with
    ``explainer.options.start: foreground``; ``spread`` is a part of that start, too.

    Args:
        explanandum, layer, convention, relu, interpolation: see :class:`~explainer.baselines.kernels.cam.CamBaseline`.
        contrast: how strongly the differences between classes count, > 0.
        foreground: whether the share is multiplied by m. False: for images whose every pixel belongs to a class, and for features that are
            not rectified (ConvNeXt, ViT, Swin: behind a layer norm the mean feature says nothing of what is there).
        spread: module path of a feature map, best a step finer than the layer's own. A position then takes the mean of the shares at all
            positions whose features there are like its own (:func:`~explainer.attribution.shares.spread_over_similar`, power 3), so that
            the map follows objects. None: shares stay where they are.
    """

    name = "competition_cam"
    passes: ClassVar[str] = "1 forward + K backward from the layer, all classes together"

    def __init__(
        self,
        explanandum: Any,
        layer: str | Sequence[str] | None = None,
        *,
        convention: Convention | None = None,
        relu: bool | None = None,
        interpolation: Interpolation | None = None,
        contrast: float = 1.0,
        foreground: bool = True,
        spread: str | None = None,
    ) -> None:
        super().__init__(explanandum, layer, convention, relu, interpolation)
        if contrast <= 0:
            raise ConfigError(f"competition_cam: contrast must be above 0, received {contrast}.")
        if spread is not None:
            find_layer(explanandum.classifier, spread)
        self.contrast, self.foreground, self.spread = contrast, foreground, spread

    def class_maps(self, images: Tensor, classes: Sequence[Tensor]) -> list[list[Tensor]]:
        """See :meth:`CamBaseline.class_maps`; the K backward passes are shared by all entries."""
        watched = self.layers(images)
        if self.spread is not None:
            watched = watched | {self.spread: find_layer(self.explanandum.classifier, self.spread)}
        with torch.enable_grad():
            logits, seen = forward_features(self.explanandum, watched, images, self.known)
            by_path = dict(zip(watched, seen, strict=True))
            features = [by_path[path] for path in self.layers(images)]
            activations: list[list[Tensor]] = []
            for k in range(self.num_classes):
                index = torch.full((len(images),), k, device=images.device)
                gradients = self.slopes(logits, index, features, retain_graph=k + 1 < self.num_classes)
                activations.append([self.weigh(a.values, g) for a, g in zip(features, gradients, strict=True)])
        alike = None if self.spread is None else similarity(by_path[self.spread].values, SHARP)
        maps = [
            self._compete(torch.stack(of_layer, 1), logits.detach(), values=a.values, alike=alike)
            for of_layer, a in zip(zip(*activations, strict=True), features, strict=True)
        ]
        rows = torch.arange(len(images), device=images.device)
        return [[m[rows, index] for m in maps] for index in classes]

    def _compete(self, activations: Tensor, logits: Tensor, *, values: Tensor, alike: Tensor | None) -> Tensor:
        """``[B,K,h,w]`` of one layer, at the resolution of ``alike`` if there is one."""
        log_p = F.logsigmoid(logits) if self.explanandum.task == "multilabel" else F.log_softmax(logits, dim=1)
        shares = class_shares(activations, log_p, self.contrast)
        if self.foreground:
            shares = shares * min_max(values.mean(dim=1, keepdim=True))
        if alike is None:
            return shares
        enlarged = F.interpolate(shares, size=alike.shape[-2:], mode="bilinear", align_corners=False)
        return spread_over_similar(enlarged, alike)
