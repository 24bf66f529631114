"""AttnLRP (Achtibat et al., ICML 2024): layer-wise relevance propagation through attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from explainer.attribution import check_class_index, check_images
from explainer.attribution.attention import WITHOUT_ATTENTION
from explainer.attribution.watching import refuse_compiled
from explainer.baselines.kernels.attention_lrp import AttentionLrp
from explainer.baselines.kernels.base import Baseline
from explainer.baselines.kernels.hooks import capture, find_layer, untouched
from explainer.baselines.kernels.maps import resize_map
from explainer.baselines.kernels.token_maps import frozen_graph
from explainer.errors import ConfigError, UnsupportedLayerError


class AttnLrp(Baseline):
    """``sum_c x_c g_c`` at every pixel: ``g`` is the gradient of the class's logit under the rules of
    :mod:`~explainer.baselines.kernels.attention_lrp`, ``x`` the normalised image. Biases absorb relevance:
    the map does not sum to the logit.

    Runs on any network with attention whose operations have rules: ViT, DeiT, Swin, BEiT of timm, torchvision
    and Hugging Face.

    Args:
        explanandum: the classifier.
        gamma: gamma of convolutions and of linear layers, ``(conv, linear)``; None: the plain rule, eps = 0.
            The paper uses gamma for
            vision transformers: values around 0.25 in convolutions and 0.05 in linear layers damp noise.
        gamma_in_attention: whether the projections inside ``nn.MultiheadAttention`` (torchvision) get gamma
            too. The public code's hooks miss them, and False repeats that. timm's projections are linear
            layers like others and always get it.
    """

    name = "attn_lrp"
    signed = True
    needs_attention = True
    classes_share_work = True
    passes = "1 forward + 1 modified backward"
    constant_attention: ClassVar[bool] = False

    def __init__(self, explanandum: Any, gamma: Sequence[float] | None = None, gamma_in_attention: bool = False) -> None:
        super().__init__(explanandum)
        if gamma is not None and (len(gamma) != 2 or min(gamma) < 0):
            raise ConfigError(f"{self.name}: gamma must be None or (conv, linear), both at least 0, received {gamma!r}.")
        self.gamma = None if gamma is None else (float(gamma[0]), float(gamma[1]))
        self.gamma_in_attention = gamma_in_attention

    def relevance(self, images: Tensor, class_index: Tensor | int | list[int], at: str = "input") -> Tensor:
        """Relevance before channels are summed and resized.

        Args:
            images: ``[B,3,H,W]`` in [0,1].
            class_index: class per image, ``[B]`` or one int.
            at: ``"input"`` (the normalised image as the classifier received it) or a module path (its output,
                last call).

        Returns:
            A tensor of that place's shape, detached.
        """
        check_images(images)
        index = check_class_index(class_index, images, self.num_classes)
        with untouched(self.explanandum), frozen_graph(self.explanandum):
            logits, place = self._forward(images, at)
            return self._pull(logits, index, place)

    def all_classes(self, images: Tensor, classes: list[int] | None = None, **_: Any) -> Tensor:
        """Maps of several classes from one forward pass, ``[B,len(classes),H,W]``."""
        check_images(images)
        indices = [check_class_index(k, images, self.num_classes) for k in (range(self.num_classes) if classes is None else classes)]
        if not indices:
            return images.new_zeros(images.shape[0], 0, *images.shape[-2:])
        with untouched(self.explanandum), frozen_graph(self.explanandum):
            logits, place = self._forward(images, "input")
            return torch.stack([self._map(self._pull(logits, i, place), images) for i in indices], dim=1)

    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        with frozen_graph(self.explanandum):
            logits, place = self._forward(images, "input")
            return self._map(self._pull(logits, class_index.clone(), place), images)

    def _forward(self, images: Tensor, at: str) -> tuple[Tensor, Tensor]:
        """Logits ``[B,K]`` and the tensor at which relevance is read."""
        classifier = self.explanandum.classifier
        refuse_compiled(classifier, self.name)
        mode = AttentionLrp(classifier, self.name, self.constant_attention, self.gamma, self.gamma_in_attention)
        module = None if at == "input" else find_layer(classifier, at)
        leaves: list[Tensor] = []

        def start(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            leaves.append(args[0].detach().clone().requires_grad_())
            return (leaves[0], *args[1:])

        handle = classifier.register_forward_pre_hook(start)
        try:
            with capture(*([module] if module else [])) as seen, mode.watching():
                logits = self.explanandum(images.detach().clone())
        finally:
            handle.remove()
        if not mode.attentions:
            raise UnsupportedLayerError(
                f"{self.name} is for networks with attention, but none ran in {type(classifier).__name__}. Use one of: {WITHOUT_ATTENTION}."
            )
        if mode.refused is not None:
            raise mode.refused
        if module is None:
            return logits, leaves[0]
        if not seen[module] or not isinstance(seen[module][-1], Tensor):
            raise ConfigError(f"{self.name}: layer {at!r} returns no tensor in the forward pass; name another.")
        return logits, seen[module][-1]

    def _pull(self, logits: Tensor, class_index: Tensor, place: Tensor) -> Tensor:
        scores = logits.gather(1, class_index[:, None]).sum()
        if not scores.requires_grad:
            raise ConfigError(f"{self.name} needs gradients from the logits to the image, but the classifier computes them without.")
        (gradient,) = torch.autograd.grad(scores, place, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise ConfigError(f"{self.name}: the class scores do not depend on the layer asked for; name one between image and logits.")
        return (place * gradient).detach()

    def _map(self, relevance: Tensor, images: Tensor) -> Tensor:
        return resize_map(relevance.sum(1), images.shape[-2:]).to(images.dtype)
