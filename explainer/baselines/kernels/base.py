"""What every per-image method shares: the classifier is left as it was found."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from explainer.attribution import Attributor, check_images
from explainer.attribution.gradients import require_gradients
from explainer.attribution.layouts import Known
from explainer.attribution.stages import default_layer
from explainer.baselines.kernels.hooks import find_layer, untouched


class Baseline(Attributor):
    """A per-image method bound to one Explanandum.

    Args:
        explanandum: :class:`explainer.Explanandum` (or any module with its ``classifier``, ``num_classes``, ``task``, ``mean``,
            ``normalize`` and ``probabilities``).
    """

    def __init__(self, explanandum: Any) -> None:
        self.explanandum = explanandum
        self.num_classes: int = explanandum.num_classes
        self.believed = False
        self.known: Known = {}  # layouts of the layers that were read

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """See :meth:`Attributor.__call__`; modes, hooks, gradients and RNG state are restored on the way out.

        Raises:
            NotDifferentiableError: the method needs gradients and the classifier has none that can be believed (asked on the first call).
        """
        with untouched(self.explanandum):
            self.require_gradients(args[0] if args else kwargs.get("images"))
            return super().__call__(*args, **kwargs)

    def all_classes(self, *args: Any, **kwargs: Any) -> Tensor:
        """See :meth:`Attributor.all_classes`; the classifier is restored on the way out."""
        with untouched(self.explanandum):
            return super().all_classes(*args, **kwargs)

    def require_gradients(self, images: Any) -> None:
        """Ask once whether the classifier's gradients can be believed, where the method needs them."""
        if self.believed or not self.needs_gradients:
            return
        check_images(images)
        require_gradients(self.explanandum, images, self.name)
        self.believed = True

    def class_scores(self, images: Tensor, class_index: Tensor) -> Tensor:
        """Logit of each image's class, ``[B]``."""
        scores: Tensor = self.explanandum(images).gather(1, class_index[:, None]).squeeze(1)
        return scores


class LayerBaseline(Baseline):
    """A method that reads one feature map, by default that of the last spatial stage
    (:func:`~explainer.attribution.stages.default_layer`). Channels-last maps and tokens are read as ``[B,C,h,w]``, too.
    """

    def __init__(self, explanandum: Any, layer: str | None = None) -> None:
        super().__init__(explanandum)
        self.layer = layer
        if layer is not None:
            find_layer(explanandum.classifier, layer)

    def target_layer(self, images: Tensor) -> torch.nn.Module:
        """The module whose output is read; found on the first call and remembered."""
        if self.layer is None:
            self.layer = default_layer(self.explanandum, images)
        return find_layer(self.explanandum.classifier, self.layer)
