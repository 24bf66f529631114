"""Relative attributing propagation: Nam, Gur, Choi, Wolf and Lee (2020), Relative attributing propagation, AAAI 34(3).

1. At the output the contributions of the class's logit, ``z_i = x_i w_it``, are normalised by absolute influence:
   ``R_i = |z_i| sum(z) / sum|z|``.
2. Below, a unit's relevance goes to its inputs by influence of either sign, relative to each other,
   ``R_i = sum_j R_j (z_ij+ / z_j+  +  |z_ij-| / (z_j+ + |z_j-|))``,
   and the surplus this creates is taken back in equal parts from every input that received some (uniform shifting), so that weak
   ones turn negative and the sum is conserved.
3. At the pixels the z^B rule.

Biases take no part. Batch norms are folded into the convolution before them; residual sums are shared by absolute influence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from explainer.baselines.kernels.relevance import Trace
from explainer.baselines.kernels.relevance_attributor import RelevanceBaseline, check_choice
from explainer.baselines.kernels.relevance_rules import FirstLayer, Layer, Rules, contributions, redistribute
from explainer.errors import ConfigError

_EPSILON = 1e-9


def influence_shares(layer: Layer, relevance: Tensor) -> Tensor:
    """Step 2 before the shift: relevance of the inputs, larger in sum than what arrived."""
    positive, negative = contributions(layer, "positive"), contributions(layer, "negative")
    with torch.no_grad():
        z_positive = sum(layer.linear(x, w) for x, w in positive)
        z_negative = sum(layer.linear(x, w) for x, w in negative)
    # |z-| / (z+ + |z-|) of the unit goes to its inhibitors in proportion to their share of z-.
    inhibited = relevance * z_negative / (z_negative - z_positive - _EPSILON)
    return redistribute(layer.linear, positive, 0.0, relevance, _EPSILON) + redistribute(layer.linear, negative, 0.0, inhibited, _EPSILON)


def shift_uniformly(relevance: Tensor, total: Tensor) -> Tensor:
    """Subtract the same amount from every non-zero entry of each image, so that the entries sum to ``total`` ``[B]``.

    An image whose relevance is 0 everywhere stays 0.
    """
    flat = relevance.flatten(1)
    active = flat != 0
    surplus = (flat.sum(dim=1) - total) / active.sum(dim=1).clamp(min=1)
    return (flat - active * surplus[:, None]).view_as(relevance)


def rap_rule(layer: Layer, relevance: Tensor) -> Tensor:
    """Step 2: influence shares, shifted so that each image's relevance is conserved."""
    return shift_uniformly(influence_shares(layer, relevance), relevance.flatten(1).sum(dim=1))


def absolute_influence(layer: Layer, start: Tensor) -> Tensor:
    """Step 1: ``|z_i| sum(z) / sum|z|`` with ``z_i = x_i sum_j w_ij start_j``; an image without contributions gets 0."""
    with torch.enable_grad():
        x = layer.x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(layer.linear(x, layer.weight), x, start)
    z = (layer.x * gradient).flatten(1)
    scale = z.sum(dim=1) / z.abs().sum(dim=1).clamp(min=torch.finfo(z.dtype).tiny)
    return (z.abs() * scale[:, None]).view_as(layer.x)


class Rap(RelevanceBaseline):
    """RAP.

    Args:
        explanandum: the classifier.
        layer: module path where relevance is read; None reads the input.
        first_layer: ``z_box`` (the paper's), ``w_square`` or ``same``.
    """

    name = "rap"
    signed = True
    passes = "1 forward + 1 modified backward (6 linear maps a layer)"

    def __init__(self, explanandum: Any, layer: str | None = None, first_layer: FirstLayer = "z_box") -> None:
        super().__init__(explanandum, layer)
        check_choice("first_layer", first_layer, ("same", "z_box", "w_square"))
        self.first_layer: FirstLayer = first_layer

    def _rules(self, images: Tensor) -> Rules:
        return Rules(self._by_position(self.first_layer, rap_rule, images, _EPSILON), residual="absolute", norm="pass", epsilon=_EPSILON)

    def _relevance(self, record: Trace, class_index: Tensor, at: str) -> Tensor:
        if not record.layers:
            raise ConfigError("rap needs a classifier with at least one convolutional or linear layer.")
        last = record.layers[-1]
        assert last.out is not None
        above = record.pull(self._start(record.logits.detach(), class_index), last.out)
        return record.pull(absolute_influence(last, above), record.point(at), last.source)
