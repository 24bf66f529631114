"""Grad-CAM on the last attention: the baseline of Chefer, Gur & Wolf (CVPR 2021, section 4)."""

from __future__ import annotations

from torch import Tensor

from explainer.baselines.kernels.token_maps import AttentionPass, TokenBaseline


class AttentionGradCam(TokenBaseline):
    """``(mean_heads(w_h A_h))+`` of the last layer, heads in the place of channels: ``w_h`` is the mean over
    patches of the gradient.

    ``A_h`` and the gradient are read in one row, see
    :class:`~explainer.baselines.kernels.token_maps.TokenBaseline`.
    """

    name = "attention_grad_cam"

    def _tokens(self, run: AttentionPass, class_index: Tensor) -> Tensor:
        gradient = self.read(run, run.gradients(class_index, self.name)[-1])
        attention = self.read(run, run.attentions[-1].detach())
        weighted = gradient.mean(-1, keepdim=True) * attention
        tokens: Tensor = weighted.mean(1).clamp(min=0).unflatten(-1, run.grid)
        return tokens
