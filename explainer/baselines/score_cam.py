"""Score-CAM (Wang et al. 2020, "Score-Weighted Visual Explanations")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from explainer.baselines.kernels.cam import CamBaseline, Convention
from explainer.baselines.kernels.features import forward_features
from explainer.baselines.kernels.maps import Interpolation
from explainer.errors import ConfigError
from explainer.fills import FillKind, blend, make_fill
from explainer.tensors import min_max


class ScoreCam(CamBaseline):
    """``sum_c softmax_c(s_k(image masked by A_c)) * A_c``, the mask being ``A_c`` upsampled and rescaled to [0,1].

    As pytorch-grad-cam: logits without a baseline score, masks upsampled with ``align_corners=True``. The masked scores hold every
    class, so :meth:`all_classes` costs no more than one class.

    Args:
        layer, convention, relu, interpolation: where the maps are read, and how they become one; see
            :class:`~explainer.baselines.kernels.cam.CamBaseline`.
        batch_size: masked images per forward pass.
        fill: what the mask leaves; ``mean`` is 0 after normalisation.
    """

    name = "score_cam"
    revision = 1  # noise as a fill is one draw for all images
    needs_gradients = False
    passes: ClassVar[str] = "1 + C forward (C: channels of the layer), all classes together"

    def __init__(
        self,
        explanandum: Any,
        layer: str | Sequence[str] | None = None,
        *,
        convention: Convention | None = None,
        relu: bool | None = None,
        interpolation: Interpolation | None = None,
        batch_size: int = 32,
        fill: FillKind = "mean",
    ) -> None:
        super().__init__(explanandum, layer, convention, relu, interpolation)
        if batch_size < 1:
            raise ConfigError(f"score_cam: batch_size must be at least 1, received {batch_size}.")
        self.batch_size = batch_size
        self.fill = fill

    def class_maps(self, images: Tensor, classes: Sequence[Tensor]) -> list[list[Tensor]]:
        """See :meth:`CamBaseline.class_maps`."""
        with torch.no_grad():
            features = [f.values for f in forward_features(self.explanandum, self.layers(images), images, self.known)[1]]
            weights = [self._scores(images, a).softmax(1) for a in features]
            rows = torch.arange(len(images), device=images.device)
            return [[(w[rows, :, k, None, None] * a).sum(1) for w, a in zip(weights, features, strict=True)] for k in classes]

    def _scores(self, images: Tensor, features: Tensor) -> Tensor:
        """Logits of every masked image, ``[B,C,K]``."""
        channels = features.shape[1]
        fill = make_fill(images, self.fill, self.explanandum.mean, torch.Generator().manual_seed(0)).expand(images.shape)
        scores = []
        for part in torch.arange(len(images) * channels, device=images.device).split(self.batch_size):
            image, channel = part // channels, part % channels
            mask = features[image, channel][:, None]
            mask = min_max(functional.interpolate(mask, images.shape[-2:], mode="bilinear", align_corners=True), epsilon=1e-8)
            scores.append(self.explanandum(blend(images[image], mask, fill[image])))
        return torch.cat(scores).view(len(images), channels, -1)
