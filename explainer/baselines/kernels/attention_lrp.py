"""AttnLRP and CP-LRP: relevance through a transformer as a modified gradient.

Every rule of AttnLRP (Achtibat et al., ICML 2024) with eps = 0 is ``relevance = input * gradient`` for a
gradient in which some operations are differentiated otherwise. So one backward pass of autograd suffices,
with these changes:

- LayerNorm, GroupNorm, RMSNorm, L2 norm: 1/std (1/rms, 1/norm) is a constant; the mean's subtraction is
  differentiated (identity rule).
- GELU, SiLU, ReLU, ...: slope ``y / (x + 1e-10)`` (identity rule).
- A product of two features (the matmuls of attention, gates): half the gradient for each factor (uniform rule).
- Softmax: plain, which is ``x_i (R_i - s_i sum R)``.
- Linear, convolution, sum, mean: plain, which is epsilon-LRP with eps = 0; biases absorb relevance.
- Linear and convolution with gamma: :func:`gamma_map`.

CP-LRP (Ali et al., ICML 2022) takes the attention matrix as a constant: no relevance reaches queries and
keys, and the values get all of it. The first operation without a rule is
kept in :attr:`AttentionLrp.refused`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves, tree_map

from explainer.attribution.attention import OpenAttention
from explainer.baselines.kernels.operations import ROUTING
from explainer.baselines.kernels.relevance_norms import NORMS
from explainer.baselines.kernels.relevance_rules import stabilize
from explainer.errors import UnsupportedLayerError

ALTERNATIVES = "integrated_gradients, grad_cam, rise, extremal_perturbation"
# Differentiated as they are: linear in the features, or a choice among them.
_PLAIN = ROUTING | {
    "add",
    "radd",
    "sub",
    "rsub",
    "subtract",
    "neg",
    "mean",
    "sum",
    "softmax",
    "dropout",
    "batch_norm",
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "interpolate",
    "T",
    "mT",
    "masked_fill",
    "repeat_interleave",
    "unfold",
    "fold",
}
_IDENTITY = {
    "relu",
    "relu6",
    "leaky_relu",
    "elu",
    "gelu",
    "silu",
    "mish",
    "tanh",
    "sigmoid",
    "hardswish",
    "hardsigmoid",
    "hardtanh",
    "softplus",
}
_PRODUCTS = {"matmul", "rmatmul", "bmm", "mul", "rmul", "multiply", "einsum"}
_DIVISIONS = {"div", "truediv", "true_divide", "divide"}
_IN_PLACE = {"iadd": torch.add, "isub": torch.sub, "imul": torch.mul, "itruediv": torch.div}


class _Scaled(torch.autograd.Function):
    """The same value; the gradient times a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return gradient * ctx.factor, None


class _Identity(torch.autograd.Function):
    """A value ``y`` computed elsewhere from ``x``; slope ``y / (x + 1e-10)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, y = ctx.saved_tensors
        return gradient * y / (x + 1e-10), None


class _Gamma(torch.autograd.Function):
    """A linear map whose gradient follows the gamma rule, see :func:`gamma_map`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: float, apply: Callable[..., Tensor]) -> Tensor:
        y = apply(x, weight, bias)
        ctx.save_for_backward(x, weight, bias, y)
        ctx.gamma, ctx.linear = gamma, apply
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight, bias, y = ctx.saved_tensors
        up, down = (weight + ctx.gamma * w for w in (weight.clamp(min=0), weight.clamp(max=0)))
        bias_up, bias_down = (None, None) if bias is None else (bias + ctx.gamma * b for b in (bias.clamp(min=0), bias.clamp(max=0)))
        with torch.enable_grad():
            above, below = (part.detach().requires_grad_() for part in (x.clamp(min=0), x.clamp(max=0)))
            positive = ctx.linear(above, up, bias_up) + ctx.linear(below, down, None)
            negative = ctx.linear(above, down, bias_down) + ctx.linear(below, up, None)
        used = ((positive.detach(), y > 0), (negative.detach(), y < 0))
        shares = [torch.where(wanted, y * gradient / stabilize(z, 1e-6), 0) for z, wanted in used]
        slopes = torch.autograd.grad([positive, negative], [above, below], shares)
        # From relevance back to a gradient, as the reference divides.
        return x * torch.where(x > 0, *slopes) / stabilize(x, 1e-10), None, None, None, None


def gamma_map(x: Tensor, weight: Tensor, bias: Tensor | None, gamma: float, apply: Callable[..., Tensor]) -> Tensor:
    """``y = apply(x, weight, bias)``, whose gradient makes ``x * gradient`` the relevance of the gamma rule.

    With ``w+ = w + gamma max(w,0)`` and ``w- = w + gamma min(w,0)`` (biases alike, counted once): outputs ``y
    > 0`` use ``z = max(x,0) w+ + b+ + min(x,0) w-``, outputs ``y < 0`` use ``z = max(x,0) w- + b- + min(x,0)
    w+``; ``R_x = x * w_used' (R / z)`` with ``R = y * gradient`` and 1e-6 added to ``|z|``. The gradient at
    ``x`` is ``R_x / x`` with 1e-10 added to ``|x|``. ``y`` itself is unchanged, its bias included.
    """
    out: Tensor = _Gamma.apply(x, weight, bias, gamma, apply)
    return out


class AttentionLrp(OpenAttention):
    """A forward pass whose gradient carries relevance, see the module.

    Args:
        classifier, method: the watched classifier, and the name in messages; see :class:`~explainer.attribution.attention.OpenAttention`.
        constant_attention: the attention matrix is a constant (CP-LRP).
        gamma: how much positive weights count more, for convolutions and for linear layers, or None for the plain rule.
        gamma_in_attention: whether the projections of ``nn.MultiheadAttention`` get gamma as other linear
            layers do.
    """

    def __init__(
        self,
        classifier: nn.Module,
        method: str,
        constant_attention: bool,
        gamma: tuple[float, float] | None,
        gamma_in_attention: bool,
    ) -> None:
        super().__init__(classifier, method)
        self.constant_attention, self.gamma, self.gamma_in_attention = constant_attention, gamma, gamma_in_attention
        self.attentions = 0
        self.refused: UnsupportedLayerError | None = None

    def operate(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One operation with its rule."""
        features = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        if not features:
            return func(*args, **kwargs)
        if name in _IN_PLACE:
            name, func = name[1:], _IN_PLACE[name]
        if name in NORMS:
            return NORMS[name](*args, **kwargs)
        if name in _IDENTITY and not kwargs.get("inplace", False):
            with torch.no_grad():
                value = func(*args, **kwargs)
            return _Identity.apply(features[0], value)
        if name in _PRODUCTS:
            return self._product(func, args, features)
        if name in ("linear", "conv2d") and self.gamma is not None:
            return self._gamma(name, func, args, kwargs)
        if name == "softmax":
            self.attentions += 1
        out = func(*args, **kwargs)
        if name in _PLAIN or (name in _DIVISIONS and not (isinstance(args[1], Tensor) and args[1].requires_grad)):
            return out.detach() if name == "softmax" and self.constant_attention else out
        if self.refused is None and any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(out)):
            self.refused = self.unsupported(f"{name!r}, for which it has no rule,", f"Use a method without layer rules: {ALTERNATIVES}.")
        return out

    def _product(self, func: Any, args: tuple[Any, ...], features: list[Tensor]) -> Tensor:
        if len(features) > 1:
            args = tree_map(lambda a: _Scaled.apply(a, 0.5) if isinstance(a, Tensor) and a.requires_grad else a, args)
        product: Tensor = func(*args)
        return product

    def _gamma(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        bound = dict(zip(names, args, strict=False)) | kwargs
        x, weight, bias = bound.pop("input"), bound.pop("weight"), bound.pop("bias", None)
        assert self.gamma is not None
        if self.in_multi_head and not self.gamma_in_attention:
            plain: Tensor = func(x, weight, bias, **bound)
            return plain
        return gamma_map(x, weight, bias, self.gamma[name == "linear"], lambda v, w, b: func(v, w, b, **bound))
