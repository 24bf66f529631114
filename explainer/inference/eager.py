"""The network itself, in torch, behind the interface of an opened file."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from explainer.inference.describe import describe
from explainer.inference.formats import Array, Runtime, check_batch, named
from explainer.models.area_conditioned import AreaConditioned
from explainer.models.explainer import Explainer


class EagerRuntime(Runtime):
    """The network itself, in torch."""

    def __init__(self, net: Explainer, threads: int | None = None) -> None:
        self.net = net
        self.description = describe(net)
        self.explanandum = net.explanandum
        if threads is not None:
            torch.set_num_threads(threads)

    def run(self, images: Array) -> dict[str, Array]:
        """See :class:`Runtime`."""
        check_batch(images, None)
        with torch.inference_mode():
            return named(("masks",), self.net(torch.from_numpy(images)))

    def run_classes(self, images: Array, classes: NDArray[np.int64]) -> Array:
        """See :class:`Runtime`."""
        check_batch(images, None)
        with torch.inference_mode():
            return named(("masks",), self.net(torch.from_numpy(images), torch.from_numpy(classes)))["masks"]

    def area_masks(self, images: Array, area: float) -> Array:
        """See :class:`Runtime`; masks of growing area are nested (:mod:`explainer.models.area_conditioned`)."""
        check_batch(images, None)
        with torch.inference_mode():
            return named(("masks",), AreaConditioned(self.net)(torch.from_numpy(images), area))["masks"]
