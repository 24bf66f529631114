"""Generic attention explainability (Chefer, Gur & Wolf, ICCV 2021), for self-attention."""

from __future__ import annotations

import torch
from torch import Tensor

from explainer.baselines.kernels.token_maps import AttentionPass, TokenBaseline


class GenericAttention(TokenBaseline):
    """``R <- R + mean_heads((G_l * A_l)+) R`` from the first layer to the last, beginning with ``R = 1`` (eq.
    5 and 6).

    ``A_l`` is the attention after the softmax and ``G_l`` the gradient of the class's logit with respect to
    it. Self-attention is not normalised. Options:
    :class:`~explainer.baselines.kernels.token_maps.TokenBaseline`.
    """

    name = "generic_attention"

    def _tokens(self, run: AttentionPass, class_index: Tensor) -> Tensor:
        relevance = torch.eye(run.attentions[0].shape[-1]).to(run.attentions[0]).expand_as(run.attentions[0][:, 0])
        gradients = run.gradients(class_index, self.name)
        for attention, gradient in list(zip(run.attentions, gradients, strict=True))[self.start_layer :]:
            relevance = relevance + (gradient * attention.detach()).clamp(min=0).mean(1) @ relevance
        tokens: Tensor = self.read(run, relevance).unflatten(-1, run.grid)
        return tokens
