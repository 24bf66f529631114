"""NormGrad (Rebuffi, Fong, Ji, Vedaldi 2020, "There and Back Again: Revisiting Backpropagation Saliency Methods")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from explainer.baselines.kernels.cam import Convention, GradientCamBaseline
from explainer.baselines.kernels.features import forward_features
from explainer.baselines.kernels.maps import Interpolation
from explainer.baselines.kernels.meta import stepped_parameters
from explainer.errors import ConfigError

Mode = Literal["paper", "code"]
Contribution = Literal["convolution", "scaling", "bias", "selective"]


class NormGrad(GradientCamBaseline):
    """Norm of each location's contribution to the weight gradient of a virtual identity layer behind ``layer``.

    The gradient of a layer's weights is a sum over locations u; NormGrad is the Frobenius norm of each summand. With ``x_u`` the
    feature vector and ``g_u`` the gradient there of the class's loss (``mode="paper"``) or of its logit (``mode="code"``):

    - ``convolution`` (default): ``||g_u x_N(u)^T||_F = ||g_u|| * ||x_N(u)||``, N(u) the ``kernel_size`` window (zero padded);
    - ``scaling``: ``||g_u * x_u||``; ``bias``: ``||g_u||``; ``selective``: ``||relu(g_u * x_u)||`` (the authors' code; of minus the loss,
      so that evidence for the class counts).

    The loss is the cross-entropy (multi-class) or the binary cross-entropy of the class (multi-label): with p the probabilities, its
    slopes at the logits are ``p_j`` for the other classes and ``-(1 - p_k)``. So evidence against the others counts as well; for
    multi-label classifiers the two modes differ by the factor ``1 - p_k`` an image.

    Several layers: ``combine="product"`` multiplies the resized maps, ``prod_j M_j ** w_j``; ``"mean"`` is their weighted mean.
    Each map is first divided by its maximum, so that no layer's scale counts.

    Meta-saliency (``meta_rate``): the map is taken at ``theta' = theta - meta_rate * d loss(theta) / d theta``, one step of gradient
    descent on this image and class (cross-entropy for multi-class, binary cross-entropy of the class for multi-label), per image and
    without touching the model's weights. The maps become more sensitive to the class. A negative rate is the authors' negated loss.

    Args:
        layer, convention, relu, interpolation: where the maps are read, and how they become one; see
            :class:`~explainer.baselines.kernels.cam.CamBaseline`; default convention: TorchRay's.
        contribution: which virtual layer, see above.
        kernel_size: odd side of the virtual convolution.
        combine: over layers.
        weights: one per layer, e.g. of :func:`~explainer.baselines.layer_weights.layer_weights`; None: ``1 / layers`` each (the geometric
            or arithmetic mean).
        mode: ``paper`` or ``code``, see above.
        meta_rate: step of the inner optimisation; 0 switches it off. The authors' code uses 1e-4 to 2.5e-3.
    """

    name = "norm_grad"
    default_convention: ClassVar[Convention] = "torchray"
    revision = 1  # the gradient is the loss's
    passes: ClassVar[str] = "1 forward + 1 backward from the layer; meta-saliency: + 1 forward + 1 backward"

    def __init__(
        self,
        explanandum: Any,
        layer: str | Sequence[str] | None = None,
        *,
        convention: Convention | None = None,
        relu: bool | None = None,
        interpolation: Interpolation | None = None,
        contribution: Contribution = "convolution",
        kernel_size: int = 1,
        combine: Literal["product", "mean"] = "product",
        weights: Sequence[float] | None = None,
        meta_rate: float = 0.0,
        mode: Mode = "paper",
    ) -> None:
        super().__init__(explanandum, layer, convention, relu, interpolation)
        if contribution not in get_args(Contribution) or combine not in ("product", "mean"):
            raise ConfigError(
                f"norm_grad: contribution must be one of {', '.join(get_args(Contribution))} and combine product or mean, "
                f"received {contribution!r} and {combine!r}."
            )
        if mode not in get_args(Mode):
            raise ConfigError(f"norm_grad: mode must be paper (gradient of the loss) or code (of the logit), received {mode!r}.")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ConfigError(f"norm_grad: kernel_size must be odd and positive, received {kernel_size}.")
        count = 1 + len(self.more_layers)
        if weights is not None and len(weights) != count:
            raise ConfigError(f"norm_grad: weights must have one entry per layer ({count}), received {len(weights)}.")
        self.contribution, self.kernel_size, self.combination = contribution, kernel_size, combine
        self.weights = tuple(weights) if weights is not None else (1 / count,) * count
        self.meta_rate, self.mode = meta_rate, mode

    def score(self, logits: Tensor, class_index: Tensor) -> Tensor:
        """The logit, or minus the loss: written as logits times slopes, which a sure classifier's rounded loss does not lose."""
        if self.mode == "code":
            return super().score(logits, class_index)
        own = functional.one_hot(class_index, logits.shape[1]).to(logits)
        given = logits.detach()
        if self.explanandum.task == "multilabel":
            return (own * torch.sigmoid(-given) * logits).sum(1)
        others = given.softmax(1) * (1 - own)
        return ((own * others.sum(1, keepdim=True) - others) * logits).sum(1)

    def weigh(self, features: Tensor, gradients: Tensor) -> Tensor:
        """Length over channels of the chosen contribution to the gradient at each position, ``[B,h,w]``."""
        strength: Tensor
        if self.contribution in ("scaling", "selective"):
            product = features * gradients
            strength = torch.linalg.vector_norm(product.clamp(min=0) if self.contribution == "selective" else product, dim=1)
            return strength
        strength = torch.linalg.vector_norm(gradients, dim=1)
        if self.contribution == "bias":
            return strength
        energy = features.square().sum(1, keepdim=True)
        if self.kernel_size > 1:
            window = energy.new_ones(1, 1, self.kernel_size, self.kernel_size)
            energy = functional.conv2d(energy, window, padding=self.kernel_size // 2)
        return strength * energy[:, 0].sqrt()

    def combine(self, maps: list[Tensor]) -> Tensor:
        """Maps of several layers, each divided by its maximum, as a weighted product or sum; a single layer's map stays as it is."""
        if len(maps) == 1:
            return maps[0]
        tiny = torch.finfo(maps[0].dtype).tiny
        scaled = torch.stack([m / m.amax((1, 2), keepdim=True).clamp(min=tiny) for m in maps])
        weights = torch.tensor(self.weights, dtype=scaled.dtype, device=scaled.device).view(-1, 1, 1, 1)
        return (scaled**weights).prod(0) if self.combination == "product" else (scaled * weights).sum(0)

    def class_maps(self, images: Tensor, classes: Sequence[Tensor]) -> list[list[Tensor]]:
        """See :meth:`CamBaseline.class_maps`; with meta-saliency one more forward and backward pass per image and class."""
        if self.meta_rate == 0:
            return super().class_maps(images, classes)
        layers = self.layers(images)
        return [
            [
                torch.cat(rows)
                for rows in zip(*(self._meta_maps(x[None], k[None], layers) for x, k in zip(images, index, strict=True)), strict=True)
            ]
            for index in classes
        ]

    def _meta_maps(self, image: Tensor, class_index: Tensor, layers: dict[str, torch.nn.Module]) -> list[Tensor]:
        """Maps of one image ``[1,C,H,W]`` at the weights after the inner step."""
        after = stepped_parameters(self.explanandum, image, class_index, self.meta_rate)
        with torch.enable_grad():
            moved = _Moved(self.explanandum, after)
            logits, features = forward_features(moved, layers, image, self.known)
            gradients = self.slopes(logits, class_index, features)
        return [self.weigh(a.values, g) for a, g in zip(features, gradients, strict=True)]


class _Moved:
    """The classifier at other weights: called like it, without changing it."""

    def __init__(self, explanandum: Any, parameters: dict[str, Tensor]) -> None:
        self.explanandum, self.parameters = explanandum, parameters
        self.classifier, self.input_size = explanandum.classifier, explanandum.input_size

    def __call__(self, images: Tensor) -> Tensor:
        """Images -> logits ``[B,K]``."""
        logits: Tensor = functional_call(self.explanandum, self.parameters, (images,))
        return logits
