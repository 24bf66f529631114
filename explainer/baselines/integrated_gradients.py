"""Integrated gradients (Sundararajan, Taly, Yan 2017, "Axiomatic Attribution for Deep Networks")."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from explainer.baselines.kernels.channels import ChannelBaseline
from explainer.baselines.kernels.maps import Reduction
from explainer.errors import ConfigError
from explainer.fills import FillKind, make_fill


class IntegratedGradients(ChannelBaseline):
    """``(x - x') * integral over a in [0,1] of d s_k(x' + a (x - x')) / dx da`` (eq. 1), by captum; summed over channels, so signed.

    Completeness: the map sums to ``s_k(x) - s_k(x')`` up to the quadrature.

    Args:
        baseline: ``x'``: a fill (``black`` is captum's default of zeros; ``mean`` is zero for the network) or a tensor
            ``[C,H,W]``, ``[1,C,H,W]`` or ``[B,C,H,W]`` in [0,1].
        steps: points of the quadrature.
        method: captum's quadrature.
        batch_size: images per forward pass (at least two per image of the batch).
        reduction, smooth: how channels become one map, and the width of a final Gaussian blur; see
            :class:`~explainer.baselines.kernels.channels.ChannelBaseline`.
    """

    name = "integrated_gradients"
    revision = 1  # noise as a fill is one draw for all images
    signed = True
    default_reduction = "sum"
    passes: ClassVar[str] = "steps (50) x (forward + backward)"

    def __init__(
        self,
        explanandum: Any,
        *,
        baseline: FillKind | Tensor = "black",
        steps: int = 50,
        method: Literal["gausslegendre", "riemann_trapezoid", "riemann_left", "riemann_right", "riemann_middle"] = "gausslegendre",
        batch_size: int = 16,
        reduction: Reduction | None = None,
        smooth: float = 0.0,
    ) -> None:
        super().__init__(explanandum, reduction, smooth)
        if steps < 2:
            raise ConfigError(f"integrated_gradients: steps must be at least 2, received {steps}.")
        self.baseline = baseline
        self.steps = steps
        self.method = method
        self.batch_size = batch_size

    def _channels(self, images: Tensor, class_index: Tensor, generator: torch.Generator) -> Tensor:
        from captum.attr import IntegratedGradients as Captum

        if isinstance(self.baseline, Tensor):
            start = self.baseline.to(images)
        else:
            start = make_fill(images, self.baseline, self.explanandum.mean, generator)
        with torch.enable_grad():
            channels: Tensor = Captum(self.explanandum).attribute(
                images.detach().clone(),
                baselines=start.expand(images.shape).contiguous(),
                target=class_index,
                n_steps=self.steps,
                method=self.method,
                internal_batch_size=max(self.batch_size, 2 * len(images)),
            )
            return channels
