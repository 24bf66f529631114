"""Excitation backprop and its contrastive form: Zhang et al. (2018), Top-down neural attention by excitation backprop, IJCV 126(10).

Marginal winning probability, the z+ rule with a one-hot start and without biases (eq. 10):
``P_i = x_i sum_j w_ij+ P_j / sum_i' x_i' w_i'j+``. In TorchRay's form, which is ours: inputs are
not clamped (normalised pixels may be negative), batch norm passes the signal on, max pooling and ReLU act as their gradients,
average pooling follows the rule, residual sums are shared in proportion.

The paper assumes that features are not negative (its A1). Where they are (SiLU, GELU, a bottleneck without activation), positive
contributions ``(x_i w_ij)+`` take the place of ``x_i w_ij+``; behind a ReLU the two are the same.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from explainer.baselines.kernels.hooks import find_layer
from explainer.baselines.kernels.relevance import Trace
from explainer.baselines.kernels.relevance_attributor import RelevanceBaseline
from explainer.baselines.kernels.relevance_rules import Rules, plus_weights_rule
from explainer.errors import ConfigError

_RULE = partial(plus_weights_rule, epsilon=1e-20, bias="zero", features="positive")


class ExcitationBackprop(RelevanceBaseline):
    """Excitation backprop, read at a layer and summed over its channels.

    Args:
        explanandum: the classifier.
        layer: module path; its signal is summed over channels and resized (bilinear). None reads the input.
    """

    name = "excitation_backprop"
    signed = True
    revision = 1  # negative features give positive contributions

    def _rules(self, images: Tensor) -> Rules:
        return Rules(lambda _: _RULE, residual="ratio", max_pool="winner", fold_norm=False, norm="pass", epsilon=1e-20)


class ContrastiveExcitationBackprop(ExcitationBackprop):
    """Contrastive excitation backprop (section 3.4): the signal minus that of the negated output layer, clamped at 0.

    Args:
        explanandum: the classifier.
        layer: module path; see :class:`ExcitationBackprop`.
        contrast_layer: where the two signals are subtracted; None: at the input of the last weighted layer. It must lie between
            ``layer`` and that layer. Because the rules are linear in the signal, the place does not change the map.
    """

    name = "contrastive_excitation_backprop"
    signed = False
    passes = "1 forward + 1 modified backward (the output layer twice)"

    def __init__(self, explanandum: Any, layer: str | None = None, contrast_layer: str | None = None) -> None:
        super().__init__(explanandum, layer)
        if contrast_layer is not None:
            find_layer(explanandum.classifier, contrast_layer)
        self.contrast_layer = contrast_layer

    def _watch(self, at: str) -> dict[str, nn.Module]:
        extra = {} if self.contrast_layer is None else {self.contrast_layer: find_layer(self.explanandum.classifier, self.contrast_layer)}
        return super()._watch(at) | extra

    def _relevance(self, record: Trace, class_index: Tensor, at: str) -> Tensor:
        if not record.layers:
            raise ConfigError(f"{self.name} needs a classifier with at least one convolutional or linear layer.")
        last = record.layers[-1]
        assert last.out is not None
        above = record.pull(self._start(record.logits.detach(), class_index), last.out)
        signals = [_RULE(last, above), _RULE(last.negated(), above)]
        place = last.source
        if self.contrast_layer is not None:
            place = record.point(self.contrast_layer)
            signals = [record.pull(s, place, last.source) for s in signals]
        difference = signals[0] - signals[1]
        return record.pull(difference, record.point(at), place)

    def _map(self, relevance: Tensor, images: Tensor) -> Tensor:
        return super()._map(relevance.sum(dim=1, keepdim=True).clamp(min=0), images)
