"""LayerCAM (Jiang, Zhang, Hou, Cheng, Wei 2021)."""

from __future__ import annotations

from torch import Tensor

from explainer.baselines.kernels.cam import GradientCamBaseline


class LayerCam(GradientCamBaseline):
    """``sum_c relu(G_c) * A_c``, one weight per location (eq. 3 and 4); meant for several layers at once."""

    name = "layer_cam"

    def weigh(self, features: Tensor, gradients: Tensor) -> Tensor:
        """``sum_c relu(G_c) * A_c``, ``[B,h,w]``."""
        return (gradients.clamp(min=0) * features).sum(1)
