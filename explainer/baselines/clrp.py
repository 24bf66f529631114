"""Contrastive LRP: Gu, Yang and Tresp (2018), Understanding individual decisions of CNNs via contrastive backpropagation, ACCV.

``R_CLRP = max(0, R - R_dual)``: the class's relevance under the z+ rule (z^B at the pixels) minus that of a dual concept which starts
with as much relevance, so that what all classes share cancels.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from explainer.baselines.kernels.relevance import Trace
from explainer.baselines.kernels.relevance_attributor import RelevanceBaseline, check_choice, one_hot
from explainer.baselines.kernels.relevance_rules import FirstLayer, Rules, plus_rule
from explainer.errors import ConfigError

_RULE = partial(plus_rule, epsilon=1e-9, bias="zero")


class Clrp(RelevanceBaseline):
    """CLRP; the maximum is taken on the channel sum.

    Args:
        explanandum: the classifier.
        dual: ``others`` (CLRP1): the class's score, spread evenly over the other classes; with one class there is no other and the dual
            is 0. ``negated`` (CLRP2): the same class with the weights of the last weighted layer negated. ``other_logits`` (equation 3 of
            Gur et al. 2021): the other classes' own scores over their number, scaled at the map to the class's total relevance; the
            difference is signed and not clamped. Where that total is next to nothing (1e-9 of the relevance), the score is spread evenly.
        layer: module path where relevance is read; None reads the input.
        first_layer: ``z_box`` (the paper's), ``w_square`` or ``same``.
    """

    name = "clrp"

    def __init__(
        self,
        explanandum: Any,
        dual: Literal["others", "negated", "other_logits"] = "others",
        layer: str | None = None,
        first_layer: FirstLayer = "z_box",
    ) -> None:
        super().__init__(explanandum, layer)
        check_choice("dual", dual, ("others", "negated", "other_logits"))
        check_choice("first_layer", first_layer, ("same", "z_box", "w_square"))
        self.dual = dual
        self.signed = dual == "other_logits"  # type: ignore[misc]
        self.first_layer: FirstLayer = first_layer

    def _rules(self, images: Tensor) -> Rules:
        return Rules(self._by_position(self.first_layer, _RULE, images, 1e-9), residual="positive", norm="pass")

    def _start(self, logits: Tensor, class_index: Tensor) -> Tensor:
        return one_hot(class_index, logits.gather(1, class_index[:, None]).squeeze(1), logits)

    def _relevance(self, record: Trace, class_index: Tensor, at: str) -> Tensor:
        start = self._start(record.logits.detach(), class_index)
        if self.dual == "other_logits":
            return self._against_other_logits(record, start, class_index, at)
        if self.dual == "others":
            if self.num_classes > 1:
                target = one_hot(class_index, torch.ones_like(class_index), start)
                start = start - (1 - target) * start.sum(dim=1, keepdim=True) / (self.num_classes - 1)
            return record.pull(start, record.point(at))
        if not record.layers:
            raise ConfigError("clrp with dual='negated' needs a classifier with at least one convolutional or linear layer.")
        last = record.layers[-1]
        assert last.out is not None
        above = record.pull(start, last.out)
        return record.pull(_RULE(last, above) - _RULE(last.negated(), above), record.point(at), last.source)

    def _against_other_logits(self, record: Trace, start: Tensor, class_index: Tensor, at: str) -> Tensor:
        """``R_target - R_rest * (sum R_target / sum R_rest)``, the sums over the map."""
        target = record.pull(start, record.point(at))
        if self.num_classes == 1:
            return target
        others = 1 - one_hot(class_index, torch.ones_like(class_index), start)
        own = record.pull(others * record.logits.detach() / (self.num_classes - 1), record.point(at))
        even = record.pull(others * start.sum(dim=1, keepdim=True) / (self.num_classes - 1), record.point(at))
        axes = tuple(range(1, target.ndim))
        empty = own.sum(axes, keepdim=True).abs() <= 1e-9 * own.abs().sum(axes, keepdim=True)
        rest = torch.where(empty, even, own)
        total = rest.sum(axes, keepdim=True)
        nothing = total == 0
        return target - rest * torch.where(nothing, 0.0, target.sum(axes, keepdim=True) / torch.where(nothing, 1.0, total))

    def _map(self, relevance: Tensor, images: Tensor) -> Tensor:
        if self.signed:
            return super()._map(relevance, images)
        return super()._map(relevance.sum(dim=1, keepdim=True).clamp(min=0), images)
