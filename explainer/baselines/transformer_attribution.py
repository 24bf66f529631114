"""Transformer attribution (Chefer, Gur & Wolf, CVPR 2021): relevance of the attention, times its gradient,
rolled out.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from explainer.baselines.kernels.relevance_attributor import one_hot
from explainer.baselines.kernels.token_maps import AttentionPass, Row, TokenBaseline, chain
from explainer.baselines.kernels.token_relevance import RelevanceTape
from explainer.errors import ConfigError

Variant = Literal["transformer_attribution", "rollout", "last_layer", "last_layer_ablation", "last_layer_attn", "full"]


class TransformerAttribution(TokenBaseline):
    """``R = M_L ... M_{s+1}`` with ``M_l = 1 + mean_heads((G_l * C_l)+)``, rows not normalised (eq. 13 and
    14).

    ``G_l`` is the gradient of the class's logit with respect to the attention of layer l, ``C_l`` the
    attention's relevance by the rules of :mod:`~explainer.baselines.kernels.token_relevance`; every image is
    explained on its own, whatever else is in the batch.

    Args:
        explanandum: the classifier.
        start_layer: s, counted from 0. The paper and the authors' notebook use 0, their evaluation scripts 1.
        variant: ``transformer_attribution``; the authors' ablations ``rollout`` (``C_l`` alone instead of
            ``G_l * C_l``), ``last_layer`` (the last layer's ``mean_heads(C+)`` without the identity),
            ``last_layer_ablation`` (its ``(G * C)+``) and ``last_layer_attn`` (its attention); ``full``: the
            relevance of the pixels, summed over channels (signed; ``row`` and ``start_layer`` have no say).
        row: which token is read; see :class:`~explainer.baselines.kernels.token_maps.TokenBaseline`.
    """

    name = "transformer_attribution"
    passes: ClassVar[str] = "1 forward + 1 backward + 1 relevance pass"

    def __init__(self, explanandum: Any, start_layer: int = 0, variant: Variant = "transformer_attribution", row: Row = "auto") -> None:
        super().__init__(explanandum, row, start_layer)
        if variant not in get_args(Variant):
            raise ConfigError(f"{self.name}: variant must be one of {', '.join(get_args(Variant))}, received {variant!r}.")
        self.variant: Variant = variant

    def _pass(self, images: Tensor) -> AttentionPass:
        tape = RelevanceTape(self.explanandum.classifier, self.name)
        handle = self.explanandum.classifier.register_forward_pre_hook(tape.begin)
        try:
            return self._recorded(images, tape)
        finally:
            handle.remove()

    def _relevance(self, run: AttentionPass, class_index: Tensor, until: Tensor) -> list[Tensor]:
        """Relevance of the attention matrices from the last to ``until`` (which may also be the image)."""
        assert isinstance(run.watch, RelevanceTape)
        start = one_hot(class_index, torch.ones_like(class_index), run.logits.detach())
        return [value for _, value in run.watch.walk(start, run.logits, until)]

    def _tokens(self, run: AttentionPass, class_index: Tensor) -> Tensor:
        if self.variant == "full":
            raise ConfigError(f"{self.name}: variant 'full' has values per pixel, not per token; call the method itself.")
        tokens: Tensor
        if self.variant == "last_layer_attn":
            tokens = self.read(run, run.attentions[-1].detach().mean(1)).unflatten(-1, run.grid)
            return tokens
        last = self.variant.startswith("last_layer")
        until = run.attentions[-1 if last else self.start_layer]
        evidence = self._relevance(run, class_index, until)[::-1]
        if self.variant in ("transformer_attribution", "last_layer_ablation"):
            gradients = run.gradients(class_index, self.name)[-len(evidence) :]
            evidence = [g * c for g, c in zip(gradients, evidence, strict=True)]
        layers = [e.clamp(min=0).mean(1) for e in evidence]
        if not last:
            identity = torch.eye(layers[0].shape[-1]).to(layers[0])
            layers = [identity + layer for layer in layers]
        tokens = self.read(run, chain(layers)).unflatten(-1, run.grid)
        return tokens

    def _finish(self, run: AttentionPass, class_index: Tensor, images: Tensor) -> Tensor:
        if self.variant != "full":
            return super()._finish(run, class_index, images)
        assert isinstance(run.watch, RelevanceTape)
        assert run.watch.image is not None
        return self.resized(self._relevance(run, class_index, run.watch.image)[-1].sum(1), run, images)
