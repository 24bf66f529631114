"""Class activations that compete for a position, where something is: ours, for pictures with several labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from explainer.attribution.shares import class_shares
from explainer.baselines.hires_cam import HiResCam
from explainer.baselines.kernels.cam import Convention
from explainer.baselines.kernels.features import FeatureMap, forward_features
from explainer.baselines.kernels.maps import Interpolation
from explainer.errors import ConfigError
from explainer.tensors import min_max


class CompetitionCam(HiResCam):
    """``share_k * m``: the class's share of a position, times how much there is at it.

    ``share_k = softmax_k(contrast * a_k / s + log p_k)`` over all classes, a_k the class's HiResCAM, s the standard deviation of all a of
    the image, p_k its probability; m the mean of the position's features, scaled to [0,1] in each image, because what a network has learned
    to see activates more of them than a background does. Not from a paper: objects that occur together (garments of one person) have
    activations that are alike, and an activation alone does not tell one from the other. It is what a shared encoder's masks begin as with
    ``explainer.options.start: foreground``, without the spreading over similar positions.

    Args:
        explanandum, layer, convention, relu, interpolation: see :class:`~explainer.baselines.kernels.cam.CamBaseline`.
        contrast: how strongly the differences between classes count, > 0.
        foreground: whether the share is multiplied by m. False: for images whose every pixel belongs to a class.
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
    ) -> None:
        super().__init__(explanandum, layer, convention, relu, interpolation)
        if contrast <= 0:
            raise ConfigError(f"competition_cam: contrast must be above 0, received {contrast}.")
        self.contrast, self.foreground = contrast, foreground

    def class_maps(self, images: Tensor, classes: Sequence[Tensor]) -> list[list[Tensor]]:
        """See :meth:`CamBaseline.class_maps`; the K backward passes are shared by all entries."""
        with torch.enable_grad():
            logits, features = forward_features(self.explanandum, self.layers(images), images, self.known)
            every = [torch.full((len(images),), k, device=images.device) for k in range(self.num_classes)]
            activations: list[list[Tensor]] = []
            for k, index in enumerate(every):
                gradients = self.slopes(logits, index, features, retain_graph=k + 1 < len(every))
                activations.append([self.weigh(a.values, g) for a, g in zip(features, gradients, strict=True)])
        maps = [
            self._compete(torch.stack(of_layer, 1), logits.detach(), a)
            for of_layer, a in zip(zip(*activations, strict=True), features, strict=True)
        ]
        rows = torch.arange(len(images), device=images.device)
        return [[m[rows, index] for m in maps] for index in classes]

    def _compete(self, activations: Tensor, logits: Tensor, features: FeatureMap) -> Tensor:
        """``[B,K,h,w]``."""
        log_p = F.logsigmoid(logits) if self.explanandum.task == "multilabel" else F.log_softmax(logits, dim=1)
        shares = class_shares(activations, log_p, self.contrast)
        return shares * min_max(features.values.mean(dim=1, keepdim=True)) if self.foreground else shares
