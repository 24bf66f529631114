"""Linear approximation: the first-order contribution of every feature vector (TorchRay's ``linear_approx``; Kindermans et al. 2016)."""

from __future__ import annotations

import torch
from torch import Tensor

from explainer.baselines.kernels.channels import GradientBaseline


class LinearApprox(GradientBaseline):
    """``sum_c x_c * d s_k / d x_c`` at the network's input or at the output of ``layer``; signed.

    At the input, ``x`` is the normalised image the network sees: ``(image - mean) * d s_k / d image``, which is the same number (the
    standard deviation cancels). With mean 0 and std 1 it equals ``input_x_gradient``.
    """

    name = "linear_approx"
    signed = True
    default_reduction = "sum"

    def _channels(self, images: Tensor, class_index: Tensor, generator: torch.Generator) -> Tensor:
        signal, gradient = self._signal(images, class_index)
        if self.layer is None:
            signal = signal - self.explanandum.mean.to(images).view(1, -1, 1, 1)
        return signal.detach() * gradient
