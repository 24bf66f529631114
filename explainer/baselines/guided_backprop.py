"""Guided backpropagation (Springenberg, Dosovitskiy, Brox, Riedmiller 2015, "Striving for Simplicity")."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from explainer.baselines.kernels.channels import GradientBaseline
from explainer.baselines.kernels.functions import ReluRule, relu_rule
from explainer.baselines.kernels.maps import Reduction
from explainer.errors import ConfigError

Convention = Literal["torchray", "captum"]


class GuidedBackprop(GradientBaseline):
    """Gradient with ``R_in = 1[x >= 0] * max(R_out, 0)`` at every ReLU; maximum of ``|.|`` over channels.

    ReLUs are found while the network runs, so ``F.relu`` and in-place ones count; other rectifiers (ReLU6, GELU, SiLU, ...) raise
    :class:`~explainer.errors.UnsupportedLayerError`.

    Args:
        layer: None for the image, or a module path: the modified gradient at that layer's output, resized.
        convention: ``torchray`` (default) lets the gradient pass where the ReLU's input is exactly 0, ``captum`` does not.
        reduction, smooth: how channels become one map, and the width of a final Gaussian blur; see
            :class:`~explainer.baselines.kernels.channels.ChannelBaseline`. :meth:`channels` keeps the channels, as captum.
    """

    name = "guided_backprop"
    rules: ClassVar[dict[str, ReluRule]] = {"torchray": "guided", "captum": "guided_strict"}

    def __init__(
        self,
        explanandum: Any,
        layer: str | None = None,
        convention: Convention = "torchray",
        reduction: Reduction | None = None,
        smooth: float = 0.0,
    ) -> None:
        super().__init__(explanandum, layer, reduction, smooth)
        if convention not in get_args(Convention):
            raise ConfigError(f"{self.name}: convention must be one of {', '.join(get_args(Convention))}, received {convention!r}.")
        self.convention = convention

    def _channels(self, images: Tensor, class_index: Tensor, generator: torch.Generator) -> Tensor:
        with relu_rule(self.explanandum.classifier, self.rules[self.convention], self.name):
            return self._signal(images, class_index)[1]
