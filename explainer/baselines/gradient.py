"""Gradient saliency (Simonyan, Vedaldi, Zisserman 2014, "Deep Inside Convolutional Networks")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from explainer.baselines.kernels.channels import GradientBaseline
from explainer.baselines.kernels.maps import Reduction


class Gradient(GradientBaseline):
    """``max_c |d s_k / d x_c|`` at every pixel.

    Default: TorchRay's map (the maximum over channels). captum's ``Saliency`` keeps the channels: :meth:`channels` returns them, with
    ``absolute=False`` as ``Saliency(abs=False)`` does. Gradients are with respect to images in [0,1].

    Args:
        layer: None for the image, or a module path: the gradient at that layer's output, resized.
        reduction, smooth: how channels become one map, and the width of a final Gaussian blur; see
            :class:`~explainer.baselines.kernels.channels.ChannelBaseline`.
        absolute: take absolute values before the reduction.
    """

    name = "gradient"

    def __init__(
        self,
        explanandum: Any,
        layer: str | None = None,
        reduction: Reduction | None = None,
        smooth: float = 0.0,
        absolute: bool = True,
    ) -> None:
        super().__init__(explanandum, layer, reduction, smooth)
        self.absolute = absolute

    def _channels(self, images: Tensor, class_index: Tensor, generator: torch.Generator) -> Tensor:
        _, gradient = self._signal(images, class_index)
        return gradient.abs() if self.absolute else gradient
