"""Softmax-gradient LRP: Iwana, Kuroki and Uchida (2019), Explaining convolutional neural networks using softmax gradient LRP, ICCVW.

Relevance starts with the gradient of the class's softmax probability with respect to the logits (eq. 9):
``R_t = y_t (1 - y_t)``, ``R_n = -y_n y_t`` for the other classes, and follows the z+ rule, z^B at the pixels. The softmax is the
method, also for a multi-label classifier. A saturated softmax (y_t = 1 in floating point) leaves a map of zeros.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from explainer.baselines.kernels.relevance_attributor import RelevanceBaseline, check_choice, one_hot
from explainer.baselines.kernels.relevance_rules import FirstLayer, Rules, plus_rule

_RULE = partial(plus_rule, epsilon=1e-9, bias="zero")


class Sglrp(RelevanceBaseline):
    """SGLRP.

    Args:
        explanandum: the classifier.
        layer: module path where relevance is read; None reads the input.
        first_layer: ``z_box`` (the paper's), ``w_square`` or ``same``.
    """

    name = "sglrp"
    signed = True

    def __init__(self, explanandum: Any, layer: str | None = None, first_layer: FirstLayer = "z_box") -> None:
        super().__init__(explanandum, layer)
        check_choice("first_layer", first_layer, ("same", "z_box", "w_square"))
        self.first_layer: FirstLayer = first_layer

    def _rules(self, images: Tensor) -> Rules:
        return Rules(self._by_position(self.first_layer, _RULE, images, 1e-9), residual="positive", norm="pass")

    def _start(self, logits: Tensor, class_index: Tensor) -> Tensor:
        y = logits.softmax(dim=1)
        y_t = y.gather(1, class_index[:, None])
        return one_hot(class_index, y_t.squeeze(1), logits) - y * y_t
