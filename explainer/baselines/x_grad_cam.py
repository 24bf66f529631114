"""XGrad-CAM (Fu et al. 2020, "Axiom-based Grad-CAM")."""

from __future__ import annotations

from torch import Tensor

from explainer.baselines.kernels.cam import GradientCamBaseline


class XGradCam(GradientCamBaseline):
    """``sum_c A_c * sum_hw (G_c A_c) / sum_hw A_c`` (eq. 8), the default convention's 1e-7 added to the denominator."""

    name = "x_grad_cam"

    def weigh(self, features: Tensor, gradients: Tensor) -> Tensor:
        """``sum_c w_c A_c`` ``[B,h,w]``; ``w_c`` is the mean of ``G_c`` weighted by ``A_c``."""
        weights = (gradients * features).sum((2, 3), keepdim=True) / (features.sum((2, 3), keepdim=True) + 1e-7)
        return (features * weights).sum(1)
