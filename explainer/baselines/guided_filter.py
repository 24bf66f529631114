"""Any method's map as a region: a Gaussian, then the guided filter (He, Sun and Tang 2010) with the image as its guide."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from explainer import plugins
from explainer.attribution import Attributor, one_map
from explainer.baselines import build
from explainer.baselines.kernels.base import Baseline
from explainer.baselines.kernels.maps import guided_filter, smooth_map
from explainer.errors import ConfigError, UnsupportedLayerError


class GuidedFilter(Baseline):
    """What another method finds, spread over the image regions that it lies in: ``guided(gauss(max(map, 0)))``, negative parts cut.

    Sparse relevance (SRD, guided backpropagation) becomes a region with the image's own borders, coarse maps (CAMs) get them. The filter
    looks at colours, not at the classifier: a region that it fills need not all be evidence, so it is a good target to start an Explainer
    from and a strong row for segmentation metrics, and no more faithful than the method inside.

    Args:
        method: a baseline's name.
        options: keyword options of that method.
        smooth: standard deviation of the Gaussian, as a share of the longer side; 0: none.
        radius: radius of the guided filter's windows (``2 radius + 1`` wide), as a share of the longer side; 0: no guided filter.
        eps: variance below which a window counts as flat; see :func:`~explainer.baselines.kernels.maps.guided_filter`.
    """

    name = "guided_filter"
    passes: ClassVar[str] = "those of the method inside (srd)"
    classes_share_work = True

    def __init__(
        self,
        explanandum: Any,
        method: str = "srd",
        *,
        options: Mapping[str, Any] | None = None,
        smooth: float = 0.04,
        radius: float = 0.125,
        eps: float = 1e-3,
    ) -> None:
        super().__init__(explanandum)
        if method == self.name:
            raise ConfigError("guided_filter: method must be another method, received 'guided_filter'.")
        if smooth < 0 or radius < 0 or eps <= 0:
            raise ConfigError(
                "guided_filter: smooth and radius are shares of the longer side and must be at least 0, eps must be positive, "
                f"received smooth={smooth}, radius={radius}, eps={eps}."
            )
        self.inner: Attributor = one_map(build(method, explanandum, **dict(options or {})))
        self.smooth, self.radius, self.eps = smooth, radius, eps
        for fact in ("needs_gradients", "deterministic", "class_specific", "needs_masks", "reference"):
            setattr(self, fact, getattr(self.inner, fact))

    @classmethod
    def inner_method(cls, options: Mapping[str, Any]) -> tuple[str, type, Mapping[str, Any]]:
        """See :meth:`Attributor.inner_method`."""
        return options["method"], plugins.find("explainer.baselines", options["method"]), options["options"] or {}

    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        with self._other_methods():
            maps = self.inner(images, class_index, generator=generator, masks=masks)
        return self._filtered(maps[:, None], images)[:, 0]

    def all_classes(
        self, images: Tensor, classes: list[int] | None = None, *, generator: torch.Generator | None = None, masks: Tensor | None = None
    ) -> Tensor:
        """See :meth:`Attributor.all_classes`; the method inside shares what it shares."""
        with self._other_methods():
            maps = self.inner.all_classes(images, classes, generator=generator, masks=masks)
        return self._filtered(maps, images)

    @contextlib.contextmanager
    def _other_methods(self) -> Iterator[None]:
        """A refusal of the method inside says how to name another."""
        try:
            yield
        except UnsupportedLayerError as error:
            raise UnsupportedLayerError(f"{error} guided_filter takes any of them: method: grad_cam.") from error

    def _filtered(self, maps: Tensor, images: Tensor) -> Tensor:
        """``[B,n,H,W]``."""
        maps = maps.clamp_min(0)
        if self.smooth > 0:
            maps = smooth_map(maps.flatten(0, 1), self.smooth).view_as(maps)
        if self.radius > 0:
            maps = guided_filter(maps, images, self.radius, self.eps).clamp_min(0)
        return maps
