"""Guided Grad-CAM (Selvaraju et al. 2017, section 3.2)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from explainer.baselines.grad_cam import GradCam
from explainer.baselines.guided_backprop import Convention, GuidedBackprop
from explainer.baselines.kernels.channels import ChannelBaseline
from explainer.baselines.kernels.maps import Interpolation, Reduction


class GuidedGradCam(ChannelBaseline):
    """Guided backpropagation times the rectified Grad-CAM map; per pixel the strongest channel, as in guided backpropagation.

    Default: captum's ``GuidedGradCam`` (strict guided ReLU, nearest resize of the map); :meth:`channels` is its ``[B,C,H,W]``. Their sum
    (``reduction="sum"``) is no evidence where colours count: what speaks for red speaks against green and blue, and the sum cancels.

    Args:
        layer: Grad-CAM's layer; None: the last feature map.
        convention: which rule the guided ReLU follows, see :class:`~explainer.baselines.guided_backprop.GuidedBackprop`.
        interpolation: resampling of the Grad-CAM map: ``nearest`` (captum) or ``bilinear`` (the paper).
        reduction, smooth: how channels become one map, and the width of a final Gaussian blur; see
            :class:`~explainer.baselines.kernels.channels.ChannelBaseline`.
    """

    name = "guided_grad_cam"
    revision = 1  # the strongest channel, not the sum
    passes: ClassVar[str] = "2 forward + 2 backward"

    def __init__(
        self,
        explanandum: Any,
        layer: str | None = None,
        *,
        convention: Convention = "captum",
        interpolation: Interpolation = "nearest",
        reduction: Reduction | None = None,
        smooth: float = 0.0,
    ) -> None:
        super().__init__(explanandum, reduction, smooth)
        self.guided = GuidedBackprop(explanandum, convention=convention)
        self.cam = GradCam(explanandum, layer, interpolation=interpolation)

    @property
    def layer(self) -> str | None:
        """Grad-CAM's layer; None until the first call has found it."""
        return self.cam.layer

    def _channels(self, images: Tensor, class_index: Tensor, generator: torch.Generator) -> Tensor:
        return self.guided.channels(images, class_index) * self.cam(images, class_index)[:, None]
