"""DeepLIFT-SHAP (Lundberg, Lee 2017; Shrikumar, Greenside, Kundaje 2017): DeepLIFT averaged over reference images."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from explainer.baselines.channels import ChannelBaseline
from explainer.baselines.functions import require_modules
from explainer.baselines.gradient_shap import reference_images
from explainer.baselines.hooks import out_of_place
from explainer.baselines.maps import Reduction
from explainer.errors import ConfigError

# captum's rescale rules; what is not here would silently get its plain gradient
_SUPPORTED = (
    nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softmax, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
)  # fmt: skip


class DeepLiftShap(ChannelBaseline):
    """Mean over references of DeepLIFT's rescale rule, by captum's ``DeepLiftShap``; summed over channels, so signed.

    The map sums to ``s_k(x) - mean s_k(references)``. captum hooks modules, so functional activations, activations without a rule
    (GELU, SiLU, ...), modules used twice and products of activations are refused by name instead of being treated as linear.

    Args:
        baselines: ``[N,C,H,W]`` references in [0,1], N >= 2; None: black, grey, white and the classifier's mean colour.
        reduction, smooth: see :class:`~explainer.baselines.channels.ChannelBaseline`.

    Raises:
        UnsupportedLayerError: see above; torchvision's ResNets reuse their ReLUs.
    """

    name = "deeplift_shap"
    signed = True
    default_reduction = "sum"
    passes: ClassVar[str] = "1 forward + 2 N (forward + backward), N references (4)"

    def __init__(self, explanandum: Any, baselines: Tensor | None = None, reduction: Reduction | None = None, smooth: float = 0.0) -> None:
        super().__init__(explanandum, reduction, smooth)
        if baselines is not None and len(baselines) < 2:
            raise ConfigError("deeplift_shap: captum needs at least two baselines, received one; pass it twice for plain DeepLIFT.")
        self.baselines = baselines

    def _channels(self, images: Tensor, class_index: Tensor, generator: torch.Generator) -> Tensor:
        from captum.attr import DeepLiftShap as Captum

        require_modules(self.explanandum, images, _SUPPORTED, self.name)
        references = reference_images(self.explanandum, images, self.baselines)
        method = Captum(self.explanandum)
        with torch.enable_grad(), out_of_place(self.explanandum):
            maps = [
                method.attribute(x.detach().clone()[None].requires_grad_(), references, target=int(k)).detach()
                for x, k in zip(images, class_index, strict=True)
            ]
        return torch.cat(maps)
