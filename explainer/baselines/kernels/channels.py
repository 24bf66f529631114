"""Methods that score every channel of the image (or of one layer) before they reduce the channels to one map."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch
from torch import Tensor

from explainer.attribution import check_class_index, check_images
from explainer.baselines.kernels.base import Baseline
from explainer.baselines.kernels.features import feature_gradients, forward_features, input_gradient
from explainer.baselines.kernels.hooks import find_layer, untouched
from explainer.baselines.kernels.maps import Reduction, reduce_channels, resize_map, smooth_map


class ChannelBaseline(Baseline):
    """Base of the methods whose result has channels.

    Args:
        explanandum: the classifier, see :class:`~explainer.baselines.kernels.base.Baseline`.
        reduction: channels to map, see :func:`~explainer.baselines.kernels.maps.reduce_channels`; None: the method's own
            (``default_reduction``). The class attribute ``signed`` describes that default.
        smooth: sigma of a final Gaussian blur, as a fraction of the longer side; 0 switches it off.
    """

    default_reduction: ClassVar[Reduction] = "max_abs"
    passes: ClassVar[str] = "1 forward + 1 backward"

    def __init__(self, explanandum: Any, reduction: Reduction | None = None, smooth: float = 0.0) -> None:
        super().__init__(explanandum)
        self.reduction: Reduction = self.default_reduction if reduction is None else reduction
        self.smooth = smooth
        probe = torch.zeros(1, 1, 1, 1)
        smooth_map(reduce_channels(probe, self.reduction), smooth)

    def channels(self, images: Tensor, class_index: Tensor | int | list[int], *, generator: torch.Generator | None = None) -> Tensor:
        """The unreduced result, ``[B,C,H,W]`` (``[B,C,h,w]`` at a layer), detached; arguments as in the call."""
        check_images(images)
        index = check_class_index(class_index, images, self.num_classes)
        with untouched(self.explanandum):
            return self._channels(images, index, generator or torch.Generator().manual_seed(0)).detach()

    @abc.abstractmethod
    def _channels(self, images: Tensor, class_index: Tensor, generator: torch.Generator) -> Tensor:
        """The method itself: checked arguments in, ``[B,C,h,w]`` out."""

    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        maps = reduce_channels(self._channels(images, class_index, generator), self.reduction)
        return smooth_map(resize_map(maps, images.shape[-2:]), self.smooth)


class GradientBaseline(ChannelBaseline):
    """A :class:`ChannelBaseline` made of one signal ``x`` and its gradient, at the image or at the output of ``layer``.

    Args:
        layer: module path relative to the user's classifier, or None for the image. Maps of a layer are resized bilinearly.
    """

    def __init__(self, explanandum: Any, layer: str | None = None, reduction: Reduction | None = None, smooth: float = 0.0) -> None:
        super().__init__(explanandum, reduction, smooth)
        self.layer = layer
        if layer is not None:
            find_layer(explanandum.classifier, layer)

    def _signal(self, images: Tensor, class_index: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and gradient, each ``[B,C,h,w]``: the image in [0,1], or the layer's output."""
        if self.layer is None:
            return images, input_gradient(self.explanandum, images, class_index)
        with torch.enable_grad():
            module = find_layer(self.explanandum.classifier, self.layer)
            logits, features = forward_features(self.explanandum, {self.layer: module}, images, self.known)
            return features[0].values, feature_gradients(logits, class_index, features)[0]
