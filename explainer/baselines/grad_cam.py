"""Grad-CAM (Selvaraju et al. 2017)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from explainer.baselines.kernels.cam import Convention, GradientCamBaseline


class GradCam(GradientCamBaseline):
    """``relu(sum_c A_c * mean_hw G_c)`` (eq. 1 and 2).

    Default: TorchRay's map (sum over channels, relu, bilinear, not rescaled). ``convention="captum"`` is ``LayerGradCam`` (no relu,
    nearest resize), ``convention="pytorch_grad_cam"`` rescales to [0,1]. Options: :class:`~explainer.baselines.kernels.cam.CamBaseline`.
    """

    name = "grad_cam"
    default_convention: ClassVar[Convention] = "torchray"

    def weigh(self, features: Tensor, gradients: Tensor) -> Tensor:
        """``sum_c A_c * mean_hw G_c``."""
        return (features * gradients.mean((2, 3), keepdim=True)).sum(1)
