"""Ablation-CAM (Desai, Ramaswamy 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from explainer.attribution.layouts import Layout
from explainer.baselines.kernels.cam import CamBaseline, Convention
from explainer.baselines.kernels.features import forward_features, refuse_silent
from explainer.baselines.kernels.maps import Interpolation
from explainer.errors import ConfigError


class AblationCam(CamBaseline):
    """``sum_c A_c * (s_k - s_k without A_c) / s_k`` (eq. 4), ``s`` the logit: a negative logit flips the map, as in the reference.

    A channel is ablated by 0, as in the paper; pytorch-grad-cam puts ``min A - 1e7`` where the layer's output has no zero minimum,
    which is the same in front of a ReLU. Prefix tokens keep what they carry: they have no place in the map. A logit of exactly 0 is
    not divided by. The ablated scores hold every class, so :meth:`all_classes` costs no more than one class.

    Args:
        layer, convention, relu, interpolation: where the maps are read, and how they become one; see
            :class:`~explainer.baselines.kernels.cam.CamBaseline`.
        batch_size: ablated copies per forward pass.
    """

    name = "ablation_cam"
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
    ) -> None:
        super().__init__(explanandum, layer, convention, relu, interpolation)
        if batch_size < 1:
            raise ConfigError(f"ablation_cam: batch_size must be at least 1, received {batch_size}.")
        self.batch_size = batch_size

    def class_maps(self, images: Tensor, classes: Sequence[Tensor]) -> list[list[Tensor]]:
        """See :meth:`CamBaseline.class_maps`."""
        with torch.no_grad():
            layers = self.layers(images)
            logits, features = forward_features(self.explanandum, layers, images, self.known)
            whole = logits[:, None]
            weights = []
            for module, a in zip(layers.values(), features, strict=True):
                drop = whole - self._ablated(images, module, a.layout, a.values.shape[1])
                refuse_silent(a, drop, 64 * torch.finfo(whole.dtype).eps * float(whole.abs().max()))
                weights.append(torch.where(whole == 0, drop, drop / whole))
            rows = torch.arange(len(images), device=images.device)
            return [[(w[rows, :, k, None, None] * a.values).sum(1) for w, a in zip(weights, features, strict=True)] for k in classes]

    def _ablated(self, images: Tensor, module: nn.Module, layout: Layout, channels: int) -> Tensor:
        """Logits without each channel of the module's feature map, ``[B,C,K]``."""
        scores = []
        for part in torch.arange(len(images) * channels, device=images.device).split(self.batch_size):

            def ablate(_: nn.Module, inputs: object, output: Tensor, part: Tensor = part) -> Tensor:
                output = output.clone()
                layout.spatial(output)[torch.arange(len(part), device=part.device), part % channels] = 0
                return output

            handle = module.register_forward_hook(ablate)
            try:
                scores.append(self.explanandum(images[part // channels]))
            finally:
                handle.remove()
        return torch.cat(scores).view(len(images), channels, -1)
