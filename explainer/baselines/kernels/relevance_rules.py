"""Backward rules of the relevance methods: how one layer hands the relevance of its outputs to its inputs.

Every rule is an instance of one formula. With contributions ``z_ij`` of input i to output j and ``z_j = sum_i z_ij + b_j``,

    R_i = sum_j z_ij / (z_j + eps sign(z_j)) R_j

and the rules differ in which contributions they count. A contribution is written as a sum of terms ``x_k[i] w_k[i,j]``: the
plain rule has the one term ``x w``, positive contributions are ``x+ w+ + x- w-``. :func:`redistribute` evaluates the formula
for any list of terms, with one forward and one backward pass of the layer's own linear map per term.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

Bias = Literal["rule", "keep", "zero"]
Residual = Literal["ratio", "positive", "absolute"]
MaxPool = Literal["winner", "stabilized", "proportional"]
FirstLayer = Literal["same", "z_box", "w_square"]
Rule = Callable[["Layer", Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """One weighted linear map of the classifier as it ran, with a following batch norm folded in where asked.

    Attributes:
        path: module path, for messages and for choosing rules.
        kind: ``conv``, ``linear`` or ``norm`` (a batch norm that no convolution precedes).
        linear: ``(input, weight) -> output`` without bias.
        source: the input as it stands in the autograd graph; ``x`` is its value.
        weight, bias: bias is shaped to broadcast against the output, 0 without one.
        first: no weighted layer stands between this one and the image.
        out: the output in the graph.
    """

    path: str
    kind: str
    linear: Callable[[Tensor, Tensor], Tensor] = field(repr=False)
    source: Tensor = field(repr=False)
    weight: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)
    first: bool
    out: Tensor | None = field(default=None, repr=False)

    @property
    def x(self) -> Tensor:
        """The input's value."""
        return self.source.detach()

    def negated(self) -> Layer:
        """The same layer with the opposite weights and bias: the evidence against its outputs."""
        return replace(self, weight=-self.weight, bias=-self.bias)


@dataclass(frozen=True)
class Rules:
    """What a method does at each kind of layer.

    Attributes:
        weighted: picks the rule of a weighted layer.
        residual: how a sum of feature maps is shared: ``ratio`` a/(a+b); ``positive`` a+/(a+ + b+); ``absolute`` |a|/(|a|+|b|).
        max_pool: ``winner`` the maximum takes all (its gradient); ``stabilized`` the same times z/(z + eps), as captum does;
            ``proportional`` by share of the window's sum.
        fold_norm: a batch norm that directly follows a convolution or linear layer becomes part of it.
        norm: a batch norm or constant shift that is not folded: ``affine`` shares relevance between ``g x`` and its shift, which
            absorbs its part; ``pass`` hands relevance on unchanged.
        epsilon: stabiliser of pooling layers, sums and unfolded norms.
        feature_norms: layer, group and RMS norms have a rule: with ``affine`` the epsilon rule of their linear map (Ali et al. 2022), with
            ``pass`` the identity rule (Achtibat et al. 2024). False: they are refused.
    """

    weighted: Callable[[Layer], Rule]
    residual: Residual = "ratio"
    max_pool: MaxPool = "winner"
    fold_norm: bool = True
    norm: Literal["affine", "pass"] = "affine"
    epsilon: float = 1e-9
    feature_norms: bool = False


def stabilize(z: Tensor, epsilon: float) -> Tensor:
    """``z + eps sign(z)`` with sign(0) = 1, so that it is never 0."""
    return z + torch.where(z < 0, -epsilon, epsilon)


def redistribute(
    linear: Callable[[Tensor, Tensor], Tensor],
    terms: Sequence[tuple[Tensor, Tensor]],
    bias: Tensor | float,
    relevance: Tensor,
    epsilon: float,
) -> Tensor:
    """Share the outputs' relevance among the inputs in proportion to the contributions ``sum_k x_k w_k`` (see the module).

    Args:
        linear: the layer's map ``(x, w) -> z`` without bias.
        terms: pairs ``(x_k, w_k)``; each ``x_k`` has the input's shape.
        bias: its part in the denominator; it absorbs relevance.
        relevance: relevance of the outputs.
        epsilon: stabiliser.

    Returns:
        Relevance of the inputs, ``sum_k x_k * grad_k``.
    """
    with torch.enable_grad():
        inputs = [x.detach().clone().requires_grad_() for x, _ in terms]
        parts = [linear(x, w) for x, (_, w) in zip(inputs, terms, strict=True)]
        z = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        shares = relevance / stabilize(z.detach() + bias, epsilon)
        grads = torch.autograd.grad(z, inputs, shares)
    with torch.no_grad():
        result = inputs[0] * grads[0]
        for x, grad in zip(inputs[1:], grads[1:], strict=True):
            result = result + x * grad
        return result.detach()


def _bias(layer: Layer, bias: Bias, ruled: Tensor) -> Tensor:
    """What stands in the denominator for the bias: treated by the rule like a weight, kept as it is, or nothing."""
    return {"rule": ruled, "keep": layer.bias, "zero": torch.zeros_like(layer.bias)}[bias]


def epsilon_rule(layer: Layer, relevance: Tensor, *, epsilon: float = 1e-9, bias: Bias = "keep") -> Tensor:
    """LRP-epsilon (Bach et al. 2015, eq. 58): every contribution counts with its sign."""
    return redistribute(layer.linear, [(layer.x, layer.weight)], _bias(layer, bias, layer.bias), relevance, epsilon)


def gamma_rule(layer: Layer, relevance: Tensor, *, gamma: float = 0.25, epsilon: float = 1e-9, bias: Bias = "keep") -> Tensor:
    """LRP-gamma (Montavon et al. 2019, section 10.2.3): positive weights count 1 + gamma times (with ``bias="rule"`` the bias too)."""
    b = _bias(layer, bias, layer.bias + gamma * layer.bias.clamp(min=0))
    return redistribute(layer.linear, [(layer.x, layer.weight + gamma * layer.weight.clamp(min=0))], b, relevance, epsilon)


def plus_weights_rule(
    layer: Layer, relevance: Tensor, *, epsilon: float = 1e-9, bias: Bias = "keep", features: Literal["any", "positive"] = "any"
) -> Tensor:
    """z+ as Montavon et al. (2017, eq. 15) write it, for inputs that are not negative: ``z_ij = x_i w_ij+``, inputs not clamped.

    A negative input counts against outputs that it raises, and where such terms cancel nothing is left to divide by. With
    ``features="positive"`` only the pixels are treated so: negative features (SiLU, GELU, a bottleneck without activation) go by
    :func:`plus_rule`, which is the same for features that are not negative.
    """
    if features == "positive" and not layer.first and bool((layer.x < 0).any()):
        return plus_rule(layer, relevance, epsilon=epsilon, bias=bias)
    b = _bias(layer, bias, layer.bias.clamp(min=0))
    return redistribute(layer.linear, [(layer.x, layer.weight.clamp(min=0))], b, relevance, epsilon)


def contributions(layer: Layer, sign: Literal["positive", "negative"]) -> list[tuple[Tensor, Tensor]]:
    """Terms of the contributions ``(x_i w_ij)+`` or ``(x_i w_ij)-``, whatever the signs of the inputs."""
    up, down = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
    if sign == "negative":
        up, down = down, up
    return [(layer.x.clamp(min=0), up), (layer.x.clamp(max=0), down)]


def plus_rule(layer: Layer, relevance: Tensor, *, epsilon: float = 1e-9, bias: Bias = "rule") -> Tensor:
    """z+ for inputs of either sign (LRP-alpha1-beta0): ``z_ij = (x_i w_ij)+``. The same as above after a ReLU."""
    b = _bias(layer, bias, layer.bias.clamp(min=0))
    return redistribute(layer.linear, contributions(layer, "positive"), b, relevance, epsilon)


def alpha_beta_rule(layer: Layer, relevance: Tensor, *, alpha: float = 2.0, epsilon: float = 1e-9, bias: Bias = "rule") -> Tensor:
    """LRP-alpha-beta (Bach et al. 2015, eq. 60) with beta = alpha - 1: ``R_i = sum_j (alpha z_ij+/z_j+ - beta z_ij-/z_j-) R_j``.

    The bias counts with its own sign: b+ in z_j+, b- in z_j-. Relevance is conserved at units that have contributions of both signs.
    """
    up, down = (_bias(layer, bias, b) for b in (layer.bias.clamp(min=0), layer.bias.clamp(max=0)))
    positive = redistribute(layer.linear, contributions(layer, "positive"), up, relevance, epsilon)
    if alpha == 1:
        return positive
    negative = redistribute(layer.linear, contributions(layer, "negative"), down, relevance, epsilon)
    return alpha * positive - (alpha - 1) * negative


def box_rule(layer: Layer, relevance: Tensor, *, low: Tensor, high: Tensor, epsilon: float = 1e-9) -> Tensor:
    """z^B for pixels in [low, high] (Montavon et al. 2017, eq. 19): ``z_ij = x_i w_ij - l_i w_ij+ - h_i w_ij-``. No bias.

    ``low`` and ``high`` hold one bound per channel, ``[C]``.
    """
    up, down = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
    terms = [(layer.x, layer.weight), (_bounds(low, layer.x, min), -up), (_bounds(high, layer.x, max), -down)]
    return redistribute(layer.linear, terms, 0.0, relevance, epsilon)


def _bounds(bound: Tensor, x: Tensor, extreme: Callable[[list[float]], float]) -> Tensor:
    """Channel bounds for an input of images, of flattened images, or (the loosest bound) of anything else made of pixels."""
    if x.ndim == 4 and x.shape[1] == len(bound):
        return bound.view(1, -1, 1, 1).expand_as(x)
    if x.ndim == 2 and x.shape[1] % len(bound) == 0:
        return bound.repeat_interleave(x.shape[1] // len(bound)).expand_as(x)
    return torch.full_like(x, extreme(bound.tolist()))


def square_rule(layer: Layer, relevance: Tensor, *, epsilon: float = 1e-9) -> Tensor:
    """w^2 for unbounded inputs (Montavon et al. 2017, eq. 12): ``z_ij = w_ij^2``, whatever the input is."""
    return redistribute(layer.linear, [(torch.ones_like(layer.x), layer.weight.square())], 0.0, relevance, epsilon)


def share_sum(parts: Sequence[Tensor], relevance: Tensor, how: Residual, epsilon: float) -> list[Tensor]:
    """Relevance of each summand of ``sum(parts)`` (a residual addition), broadcast shapes summed back."""
    if how == "positive":
        parts = [p.clamp(min=0) for p in parts]
    elif how == "absolute":
        parts = [p.abs() for p in parts]
    shares = relevance / stabilize(torch.stack(torch.broadcast_tensors(*parts)).sum(0), epsilon)
    return [(p * shares).sum_to_size(p.shape) for p in parts]
