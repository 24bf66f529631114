"""Grad-CAM++ (Chattopadhay, Sarkar, Howlader, Balasubramanian 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from explainer.baselines.kernels.cam import GradientCamBaseline


class GradCamPlusPlus(GradientCamBaseline):
    """``sum_c A_c * sum_hw alpha_c relu(G_c)``, ``alpha = G^2 / (2 G^2 + (sum_hw A) G^3)`` (eq. 19), 0 where ``G`` is 0.

    ``G`` is the logit's gradient. The paper's ``Y = exp(s)`` multiplies every weight of an image by the same ``exp(s)``, which the
    rescaling of the default convention (``pytorch_grad_cam``; its 1e-6 in the denominator is kept) removes again.
    """

    name = "grad_cam_pp"

    def weigh(self, features: Tensor, gradients: Tensor) -> Tensor:
        """``sum_c w_c A_c`` ``[B,h,w]``; ``w_c`` sums the positive gradients, weighted by alpha."""
        square = gradients**2
        alpha = square / (2 * square + features.sum((2, 3), keepdim=True) * square * gradients + 1e-6)
        alpha = torch.where(gradients != 0, alpha, 0)
        return (features * (alpha * gradients.clamp(min=0)).sum((2, 3), keepdim=True)).sum(1)
