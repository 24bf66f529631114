"""Attention rollout (Abnar & Zuidema, ACL 2020), with head fusion and discarding as in common use for vision
transformers.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from explainer.baselines.kernels.token_maps import AttentionPass, Row, TokenBaseline, chain
from explainer.errors import ConfigError

Fusion = Literal["mean", "max", "min"]


class AttentionRollout(TokenBaseline):
    """``R = M_L ... M_1`` with ``M_l = (F_l + 1) / 2``, rows divided by their sums; ``F_l`` is the attention
    fused over heads.

    The paper is ``mean`` with nothing discarded. The same map for every class.

    Args:
        explanandum: the classifier.
        head_fusion: ``mean``, ``max`` or ``min`` over heads.
        discard_ratio: share of the ``N x N`` entries of each fused matrix, the smallest, that are set to 0;
            the class token's attention to itself is kept. In [0,1).
        row, start_layer: which token is read, and the first block that counts; see
            :class:`~explainer.baselines.kernels.token_maps.TokenBaseline`.
    """

    name = "attention_rollout"
    needs_gradients = False
    class_specific = False
    passes = "1 forward"

    def __init__(
        self, explanandum: Any, head_fusion: Fusion = "mean", discard_ratio: float = 0.0, row: Row = "auto", start_layer: int = 0
    ) -> None:
        super().__init__(explanandum, row, start_layer)
        if head_fusion not in get_args(Fusion):
            raise ConfigError(f"{self.name}: head_fusion must be one of {', '.join(get_args(Fusion))}, received {head_fusion!r}.")
        if not 0 <= discard_ratio < 1:
            raise ConfigError(f"{self.name}: discard_ratio must lie in [0,1), received {discard_ratio}.")
        self.head_fusion: Fusion = head_fusion
        self.discard_ratio = discard_ratio

    def _fused(self, attention: Tensor) -> Tensor:
        """``F_l``: ``[B,heads,N,N]`` -> ``[B,N,N]``."""
        if self.head_fusion == "mean":
            fused = attention.mean(1)
        else:
            fused = attention.amax(1) if self.head_fusion == "max" else attention.amin(1)
        flat = fused.flatten(1)
        smallest = flat.topk(int(flat.shape[1] * self.discard_ratio), dim=1, largest=False).indices
        discarded = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, smallest, True)
        discarded[:, 0] = False
        return flat.masked_fill(discarded, 0).view_as(fused)

    def _tokens(self, run: AttentionPass, class_index: Tensor) -> Tensor:
        layers = [self._fused(a.detach()) for a in run.attentions]
        mixed = [(fused + torch.eye(fused.shape[-1]).to(fused)) / 2 for fused in layers]
        rows = [m / m.sum(-1, keepdim=True) for m in mixed]
        tokens: Tensor = self.read(run, chain(rows, self.start_layer)).unflatten(-1, run.grid)
        return tokens
