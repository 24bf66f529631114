"""Deconvolutional network (Zeiler, Fergus 2014, "Visualizing and Understanding Convolutional Networks")."""

from __future__ import annotations

import torch
from torch import Tensor

from explainer.baselines.kernels.channels import GradientBaseline
from explainer.baselines.kernels.functions import relu_rule


class DeconvNet(GradientBaseline):
    """Gradient with ``R_in = max(R_out, 0)`` at every ReLU, whatever its input; maximum of ``|.|`` over channels (TorchRay).

    captum's ``Deconvolution`` is the same signal with its channels: see :meth:`channels`. Max pooling keeps its switches. Other
    rectifiers than ReLU raise :class:`~explainer.errors.UnsupportedLayerError`.
    """

    name = "deconvnet"

    def _channels(self, images: Tensor, class_index: Tensor, generator: torch.Generator) -> Tensor:
        with relu_rule(self.explanandum.classifier, "deconvnet", self.name):
            return self._signal(images, class_index)[1]
