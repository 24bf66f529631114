"""SmoothGrad (Smilkov et al. 2017) with its squared (Hooker et al. 2019) and variance (Adebayo et al. 2018) forms."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from explainer.baselines.kernels.channels import ChannelBaseline
from explainer.baselines.kernels.features import input_gradient
from explainer.baselines.kernels.maps import Reduction
from explainer.errors import ConfigError, ShapeError

Statistic = Literal["smoothgrad", "smoothgrad_sq", "vargrad"]


class SmoothGrad(ChannelBaseline):
    """Mean gradient over noisy copies ``x + stdev * n_i`` of the image.

    Default: captum's ``NoiseTunnel(Saliency)``: absolute values *before* the mean (``absolute=False``: the paper's signed mean), then
    summed over channels. captum draws from the global generator; here the noise comes from ``generator`` (standard normal,
    ``[samples,C,H,W]``, drawn in float64 so that both precisions see the same numbers), and every image of a batch gets the same noise,
    so that a batch of two equals two singles.

    Args:
        samples: number of noisy copies.
        stdev: standard deviation of the noise on images in [0,1]; the paper advises 0.1 to 0.2.
        statistic: ``smoothgrad`` mean, ``smoothgrad_sq`` mean of squares, ``vargrad`` mean of squares minus squared mean.
        absolute: take ``|gradient|`` of each copy first.
        noise: given standard normal noise instead of drawn: ``[samples,C,H,W]`` for all images, or ``[B*samples,C,H,W]`` with the
            rows of image b at ``b*samples..(b+1)*samples-1`` (captum's order).
        batch_size: copies per forward pass.
        reduction, smooth: how channels become one map, and the width of a final Gaussian blur; see
            :class:`~explainer.baselines.kernels.channels.ChannelBaseline`.
    """

    name = "smooth_grad"
    deterministic = False
    default_reduction = "sum"
    passes: ClassVar[str] = "samples (25) x (forward + backward)"

    def __init__(
        self,
        explanandum: Any,
        *,
        samples: int = 25,
        stdev: float = 0.15,
        statistic: Statistic = "smoothgrad",
        absolute: bool = True,
        noise: Tensor | None = None,
        batch_size: int = 16,
        reduction: Reduction | None = None,
        smooth: float = 0.0,
    ) -> None:
        super().__init__(explanandum, reduction, smooth)
        if statistic not in get_args(Statistic):
            raise ConfigError(f"smooth_grad: statistic must be one of {', '.join(get_args(Statistic))}, received {statistic!r}.")
        if samples < 1 or stdev < 0:
            raise ConfigError(f"smooth_grad needs samples >= 1 and stdev >= 0, received samples={samples}, stdev={stdev}.")
        self.samples, self.stdev, self.statistic, self.absolute = samples, stdev, statistic, absolute
        self.noise, self.batch_size = noise, batch_size

    def _noise(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """``[1 or B, samples, C, H, W]``."""
        if self.noise is None:
            drawn = torch.randn((self.samples, *images.shape[1:]), generator=generator, dtype=torch.float64)
            return drawn[None].to(images)
        rows = {self.samples: 1, self.samples * len(images): len(images)}
        if self.noise.shape[0] not in rows or self.noise.shape[1:] != images.shape[1:]:
            raise ShapeError(
                f"smooth_grad: noise must be ({self.samples} or {self.samples * len(images)},{','.join(map(str, images.shape[1:]))}), "
                f"received {tuple(self.noise.shape)}."
            )
        return self.noise.to(images).reshape(rows[self.noise.shape[0]], self.samples, *images.shape[1:])

    def _channels(self, images: Tensor, class_index: Tensor, generator: torch.Generator) -> Tensor:
        noise = self._noise(images, generator)
        mean = torch.zeros_like(images)
        square = torch.zeros_like(images)
        for part in noise.split(max(1, self.batch_size // len(images)), dim=1):
            copies = images[:, None] + self.stdev * part
            gradient = input_gradient(self.explanandum, copies.flatten(0, 1), class_index.repeat_interleave(part.shape[1]))
            gradient = gradient.view(copies.shape)
            gradient = gradient.abs() if self.absolute else gradient
            mean += gradient.sum(1) / self.samples
            square += gradient.square().sum(1) / self.samples
        return {"smoothgrad": mean, "smoothgrad_sq": square, "vargrad": (square - mean.square()).clamp_min(0)}[self.statistic]
