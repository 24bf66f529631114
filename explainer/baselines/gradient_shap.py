"""Gradient SHAP, also called expected gradients (Lundberg, Lee 2017; Erion et al. 2021)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from explainer.baselines.kernels.channels import ChannelBaseline
from explainer.baselines.kernels.features import input_gradient
from explainer.baselines.kernels.maps import Reduction
from explainer.errors import ConfigError, ShapeError
from explainer.fills import make_fill


def reference_images(explanandum: Any, images: Tensor, baselines: Tensor | None) -> Tensor:
    """``[N,C,H,W]``: the given references, or black, grey, white and the classifier's mean colour."""
    if baselines is None:
        fills = [make_fill(images[:1], kind, explanandum.mean) for kind in ("black", "grey", "white", "mean")]
        return torch.cat([f.expand(images[:1].shape) for f in fills])
    if baselines.ndim != 4 or baselines.shape[1:] != images.shape[1:]:
        raise ShapeError(f"baselines must be (N,{','.join(map(str, images.shape[1:]))}) in [0,1], received {tuple(baselines.shape)}.")
    return baselines.to(images)


class GradientShap(ChannelBaseline):
    """``mean_i (x_i - r_i) * d s_k(r_i + a_i (x_i - r_i)) / dx``, ``a_i`` uniform in [0,1], ``r_i`` a random reference.

    ``x_i = x + noise``. The estimator of captum's ``GradientShap``, which draws from the global generators; here ``generator`` supplies
    all numbers, the same for every image of a batch. Summed over channels, so signed; in expectation the map sums to
    ``s_k(x) - mean s_k(references)``.

    Args:
        baselines: ``[N,C,H,W]`` references in [0,1]; None: black, grey, white and the classifier's mean colour.
        samples: number of draws.
        stdev: standard deviation of the noise added to the image.
        batch_size: images per forward pass.
        reduction, smooth: how channels become one map, and the width of a final Gaussian blur; see
            :class:`~explainer.baselines.kernels.channels.ChannelBaseline`.
    """

    name = "gradient_shap"
    deterministic = False
    signed = True
    default_reduction = "sum"
    passes: ClassVar[str] = "samples (32) x (forward + backward)"

    def __init__(
        self,
        explanandum: Any,
        *,
        baselines: Tensor | None = None,
        samples: int = 32,
        stdev: float = 0.0,
        batch_size: int = 16,
        reduction: Reduction | None = None,
        smooth: float = 0.0,
    ) -> None:
        super().__init__(explanandum, reduction, smooth)
        if samples < 1 or stdev < 0:
            raise ConfigError(f"gradient_shap needs samples >= 1 and stdev >= 0, received samples={samples}, stdev={stdev}.")
        self.baselines, self.samples, self.stdev, self.batch_size = baselines, samples, stdev, batch_size

    def _channels(self, images: Tensor, class_index: Tensor, generator: torch.Generator) -> Tensor:
        references = reference_images(self.explanandum, images, self.baselines)
        chosen = torch.randint(len(references), (self.samples,), generator=generator)
        alpha = torch.rand((self.samples, 1, 1, 1), generator=generator, dtype=torch.float64).to(images)
        noise = images.new_zeros(self.samples, 1, 1, 1)
        if self.stdev > 0:
            noise = self.stdev * torch.randn((self.samples, *images.shape[1:]), generator=generator, dtype=torch.float64).to(images)
        total = torch.zeros_like(images)
        for part in torch.arange(self.samples).split(max(1, self.batch_size // len(images))):
            reference = references[chosen[part].to(references.device)][None]
            step = images[:, None] + noise[part] - reference
            points = (reference + alpha[part] * step).flatten(0, 1)
            gradient = input_gradient(self.explanandum, points, class_index.repeat_interleave(len(part)))
            total += (step * gradient.view(step.shape)).sum(1) / self.samples
        return total
