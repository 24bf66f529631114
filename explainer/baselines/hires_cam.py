"""HiResCAM (Draelos, Carin 2021) and its rectified form, element-wise Grad-CAM."""

from __future__ import annotations

from torch import Tensor

from explainer.baselines.kernels.cam import GradientCamBaseline


class HiResCam(GradientCamBaseline):
    """``sum_c G_c * A_c``: exactly the class score's terms where the head is linear."""

    name = "hires_cam"

    def weigh(self, features: Tensor, gradients: Tensor) -> Tensor:
        """``sum_c G_c * A_c``, ``[B,h,w]``."""
        return (gradients * features).sum(1)


class ElementwiseGradCam(GradientCamBaseline):
    """``sum_c relu(G_c * A_c)``: HiResCAM without cancellation between channels."""

    name = "grad_cam_elementwise"

    def weigh(self, features: Tensor, gradients: Tensor) -> Tensor:
        """``sum_c relu(G_c * A_c)``, ``[B,h,w]``."""
        return (gradients * features).clamp(min=0).sum(1)
