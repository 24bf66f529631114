"""Input x gradient (Shrikumar, Greenside, Shcherbina, Kundaje 2016, "Not Just a Black Box")."""

from __future__ import annotations

import torch
from torch import Tensor

from explainer.baselines.kernels.channels import ChannelBaseline
from explainer.baselines.kernels.features import input_gradient


class InputXGradient(ChannelBaseline):
    """``x_c * d s_k / d x_c`` on images in [0,1], as captum's ``InputXGradient``; summed over channels, so signed.

    A black pixel scores 0 whatever its gradient. ``linear_approx`` is the same product on the *normalised* image.
    """

    name = "input_x_gradient"
    signed = True
    default_reduction = "sum"

    def _channels(self, images: Tensor, class_index: Tensor, generator: torch.Generator) -> Tensor:
        return images * input_gradient(self.explanandum, images, class_index)
