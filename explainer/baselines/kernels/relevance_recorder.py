"""Watches the operations of a forward pass and attaches to each the backward rule of a relevance method (``relevance.py`` runs it)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from explainer.baselines.kernels.operations import (
    POINTWISE,
    PRODUCTS,
    QUOTIENTS,
    ROUTING,
    plain_name,
    signal_and_gate,
)
from explainer.baselines.kernels.relevance_norms import NORMS, share_norm
from explainer.baselines.kernels.relevance_rules import Layer, Rules, redistribute, share_sum
from explainer.errors import UnsupportedLayerError

# Names of torch functions and methods after removing the in-place mark: F.relu_, Tensor.__iadd__ -> relu, add.
_CONVOLUTIONS = {f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)}
_CONVOLUTION_ARGS = {
    False: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    True: ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
}
_POOLING = {
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "mean",
    "sum",
    "interpolate",
    "upsample",
}
_SUMS = {"add": 1, "radd": 1, "sub": -1, "subtract": -1, "rsub": -1}
_ATTENTION = {"softmax", "scaled_dot_product_attention", "multi_head_attention_forward"}
_PRODUCTS = {"matmul", "bmm", "einsum"}
ALTERNATIVES = "input_x_gradient, integrated_gradients, grad_cam, rise, extremal_perturbation"


class _Redistribution(torch.autograd.Function):
    """Forward: a value computed elsewhere. Backward: ``share`` turns the output's relevance into the inputs'."""

    @staticmethod
    def forward(ctx: Any, share: Callable[[Tensor], tuple[Tensor, ...]], value: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.share = share
        return value[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, relevance: Tensor) -> tuple[Any, ...]:
        return (None, None, *ctx.share(relevance))


@dataclass(frozen=True)
class _Origin:
    """Where a tensor came from: ``pixel`` if no weighted layer preceded it, and the layer it is the direct output of."""

    pixel: bool
    layer: Layer | None = None


class Recorder(TorchFunctionMode):
    """Runs every operation on features with its rule attached."""

    def __init__(self, rules: Rules, method: str) -> None:
        super().__init__()
        self.rules = rules
        self.method = method
        self.place: list[tuple[str, nn.Module]] = []
        self.layers: list[Layer] = []
        self.origins: Any = WeakTensorKeyDictionary()
        self.overwritten: Any = WeakTensorKeyDictionary()
        self.count = 0
        self.error: UnsupportedLayerError | None = None

    def begin(self, images: Tensor) -> Tensor:
        """A fresh leaf that stands for the classifier's input."""
        leaf = images.detach().clone().requires_grad_()
        self.origins[leaf] = _Origin(pixel=True)
        return leaf

    def current(self, value: Any) -> Any:
        """The tensor that an in-place operation has put in the place of ``value``."""
        while isinstance(value, Tensor) and value in self.overwritten:
            value = self.overwritten[value]
        return value

    def unsupported(self, operation: str, why: str = "no rule is known for it") -> UnsupportedLayerError:
        """The error that says where an operation without a rule stands, and which methods do without rules."""
        path, module = self.place[-1] if self.place else ("", None)
        where = f"layer {path!r} ({type(module).__name__})" if path else f"the forward of {type(module).__name__}"
        rules = "attn_lrp or cp_lrp, which have rules for attention, or " if operation.strip("_") in _ATTENTION else ""
        if operation.strip("_") in _PRODUCTS:  # of linear attention too, in which no softmax follows
            rules = "attn_lrp or cp_lrp, if this is attention with a softmax, or "
        rules = "lrp, which has a rule for it, or " if operation in NORMS and not self.rules.feature_norms else rules
        self.error = UnsupportedLayerError(
            f"{self.method} cannot pass through {operation!r} in {where}, operation {self.count} of the forward pass: {why}. "
            f"Use {rules}a method without layer rules ({ALTERNATIVES}) or replace the layer."
        )
        return self.error

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raw = getattr(func, "__name__", str(func))
        if raw in ("__get__", "__set__"):
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(self.current, (tuple(args), kwargs or {}))
        features = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        if not features:
            return func(*args, **kwargs)
        name, inplace = plain_name(raw)
        inplace = inplace or bool(kwargs.get("inplace", False))
        if any(t not in self.origins for t in features):
            raise self.unsupported(raw, "it reads a tensor made by a custom autograd function or compiled code, which cannot be watched")
        self.count += 1
        out = self._dispatch(name, func, args, kwargs, features)
        if out is NotImplemented:
            if inplace or raw == "__setitem__" or "out" in kwargs:
                raise self.unsupported(raw)
            with torch.no_grad():
                plain = func(*args, **kwargs)
            values = [t for t in tree_leaves(plain) if isinstance(t, Tensor) and t.is_floating_point()]
            if values and raw not in ("detach", "zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones"):
                raise self.unsupported(raw)
            return plain
        if inplace:
            self.overwritten[features[0]] = out
        return out

    def _dispatch(self, name: str, func: Any, args: Any, kwargs: Any, features: list[Tensor]) -> Any:
        if name in _CONVOLUTIONS:
            return self._convolution(name, func, args, kwargs)
        if name == "linear":
            return self._linear(*args, **kwargs)
        if name in ("matmul", "mm") and args[0].requires_grad and not args[1].requires_grad and args[1].ndim == 2:
            return self._linear(args[0], args[1].t())
        if name == "batch_norm":
            return self._batch_norm(*args, **kwargs)
        if name in NORMS and self.rules.feature_norms:
            return self._feature_norm(name, func, args, kwargs, features)
        if name in PRODUCTS | QUOTIENTS:
            return self._scaling(name, func, args, features)
        if name in POINTWISE:
            return self._pointwise(func, args, kwargs, features)
        if name in _SUMS and kwargs.get("alpha", 1) == 1:
            return self._sum(name, func, args, features)
        if name in _POOLING:
            return self._pooling(func, args, kwargs)
        if "max_pool" in name and self.rules.max_pool == "stabilized":
            return self._pooling(func, args, kwargs)
        if "max_pool" in name and self.rules.max_pool == "proportional":
            return self._proportional_max_pool(func, args, kwargs)
        if name in ROUTING:
            return self._routing(func, args, kwargs, features)
        return NotImplemented

    def _value(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """What the operation returns, off the graph and without touching its inputs (it may be an in-place one)."""
        with torch.no_grad():
            value: Tensor = func(*tree_map(_copy, args), **tree_map(_copy, kwargs))
            return value

    def _mark(self, out: Any, features: list[Tensor], layer: Layer | None = None) -> Any:
        pixel = layer is None and all(self.origins[t].pixel for t in features)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                self.origins[tensor] = _Origin(pixel, layer)
        return out

    def _attach(self, value: Tensor, share: Callable[[Tensor], tuple[Tensor, ...]], *inputs: Tensor) -> Tensor:
        out: Tensor = self._mark(_Redistribution.apply(share, [value], *inputs), list(inputs))
        return out

    def _routing(self, func: Any, args: Any, kwargs: Any, features: list[Tensor]) -> Any:
        with torch.enable_grad():
            clones = {id(t): t.clone() for t in features[:1]}
            moved = tree_map(lambda a: clones.get(id(a), a), (args, kwargs))
            return self._mark(func(*moved[0], **moved[1]), features)

    def _pointwise(self, func: Any, args: Any, kwargs: Any, features: list[Tensor]) -> Tensor:
        x = features[0]
        if len(features) > 1:
            raise self.unsupported(func.__name__, "it multiplies or limits features by features")
        return self._attach(self._value(func, args, kwargs), lambda r: (r.sum_to_size(x.shape),), x)

    def _scaling(self, name: str, func: Any, args: Any, features: list[Tensor]) -> Tensor:
        gated = signal_and_gate(name, features)
        if gated is not None:
            return self._attach(self._value(func, args, {}), lambda r: (r,), gated[0])
        x = features[0]
        if len(features) > 1 or (name in QUOTIENTS and args[0] is not x):
            raise self.unsupported(func.__name__, "it multiplies or divides by features")
        value = self._value(func, args, {})
        factor = torch.as_tensor(args[1] if args[0] is x else args[0], dtype=value.dtype, device=value.device)
        before = self._foldable(x, factor, value) if self.rules.fold_norm else None
        if before is None:
            return self._attach(value, lambda r: (r.sum_to_size(x.shape),), x)
        if name not in PRODUCTS:
            factor = factor.reciprocal()
        return self._attach_layer(_scaled(before, factor.expand(value.shape[1]) if factor.numel() == 1 else factor.flatten()), value)

    def _foldable(self, x: Tensor, constant: Tensor, value: Tensor) -> Layer | None:
        """The weighted layer that ``x`` is the output of, if ``constant`` has one number per output channel (or one in all)."""
        layer = self.origins[x].layer
        if layer is None or layer.kind not in ("conv", "linear") or value.shape != x.shape:
            return None
        if layer.kind == "linear" and x.ndim != 2:
            return None
        channel = (1,) * (value.ndim - constant.ndim) + tuple(constant.shape)
        return layer if constant.numel() == 1 or (constant.numel() == value.shape[1] == channel[1]) else None

    def _sum(self, name: str, func: Any, args: Any, features: list[Tensor]) -> Tensor:
        left, right = args[:2]
        if name == "rsub":
            left, right = right, left
        value = self._value(func, args, {})
        parts = [torch.as_tensor(p, dtype=value.dtype, device=value.device).detach() for p in (left, right)]
        parts[1] = _SUMS[name] * parts[1]
        if len(features) == 1 and (left is features[0] or _SUMS[name] == 1):
            return self._shift(features[0], parts[1] if left is features[0] else parts[0], value)
        rules = self.rules

        def share(relevance: Tensor) -> tuple[Tensor, ...]:
            shares = share_sum(parts, relevance, rules.residual, rules.epsilon)
            return tuple(s for s, p in zip(shares, (left, right), strict=True) if isinstance(p, Tensor) and p.requires_grad)

        return self._attach(value, share, *features)

    def _shift(self, x: Tensor, constant: Tensor, value: Tensor) -> Tensor:
        """``x + constant``: more bias of the layer that made ``x``, else a summand that absorbs its share."""
        before = self._foldable(x, constant, value)
        if before is not None:
            tail = (1,) * (value.ndim - 2)
            bias = before.bias + (constant if constant.numel() == 1 else constant.reshape(-1, *tail))
            return self._attach_layer(replace(before, bias=bias), value)
        if self.rules.norm == "pass":
            return self._attach(value, lambda r: (r.sum_to_size(x.shape),), x)
        rules = self.rules
        return self._attach(value, lambda r: (share_sum([x.detach(), constant], r, rules.residual, rules.epsilon)[0],), x)

    def _pooling(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        kwargs = dict(kwargs)
        x = args[0] if args else kwargs.pop("input")
        rest, epsilon = args[1:], self.rules.epsilon

        def share(relevance: Tensor) -> tuple[Tensor]:
            value = x.detach()
            return (redistribute(lambda v, _: func(v, *rest, **kwargs), [(value, value)], 0.0, relevance, epsilon),)

        return self._attach(self._value(func, (x, *rest), kwargs), share, x)

    def _proportional_max_pool(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        bound = dict(zip(names, args, strict=False)) | kwargs
        if func.__name__ != "max_pool2d" or bound.get("dilation", 1) not in (1, (1, 1), [1, 1]):
            raise self.unsupported(func.__name__, "max_pool='proportional' knows two-dimensional max pooling of dilation 1")
        x, epsilon = bound["input"], self.rules.epsilon
        geometry = (bound["kernel_size"], bound.get("stride"), bound.get("padding", 0), bound.get("ceil_mode", False))

        def share(relevance: Tensor) -> tuple[Tensor]:
            value = x.detach()
            return (redistribute(lambda v, _: nn.functional.avg_pool2d(v, *geometry), [(value, value)], 0.0, relevance, epsilon),)

        return self._attach(self._value(func, args, kwargs), share, x)

    def _convolution(self, name: str, func: Any, args: Any, kwargs: Any) -> Tensor:
        transposed = "transpose" in name
        bound = dict(zip(_CONVOLUTION_ARGS[transposed], args, strict=False)) | kwargs
        x, weight, bias = bound.pop("input"), bound.pop("weight"), bound.pop("bias", None)
        if not isinstance(x, Tensor) or weight.requires_grad:
            raise self.unsupported(name, "its weights depend on the image")
        shaped = None if bias is None else bias.reshape(-1, *(1,) * (weight.ndim - 2))
        return self._weighted(x, weight, shaped, lambda v, w: func(v, w, None, **bound), "conv_transpose" if transposed else "conv")

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.requires_grad:
            raise self.unsupported("linear", "its weights depend on the image")
        return self._weighted(input, weight, bias, nn.functional.linear, "linear")

    def _weighted(self, x: Tensor, weight: Tensor, bias: Tensor | None, linear: Callable[[Tensor, Tensor], Tensor], kind: str) -> Tensor:
        shift = weight.new_zeros(()) if bias is None else bias.detach()
        with torch.no_grad():
            value = linear(x, weight) + shift
        path = self.place[-1][0] if self.place else ""
        layer = Layer(path, kind, linear, x, weight.detach(), shift, self.origins[x].pixel)
        return self._attach_layer(layer, value)

    def _attach_layer(self, layer: Layer, value: Tensor) -> Tensor:
        rule = self.rules.weighted(layer)
        # The closure must not see the copy that holds ``out``: the cycle through the autograd graph would never be freed.
        out: Tensor = _Redistribution.apply(lambda r: (rule(layer, r),), [value], layer.source)
        done = replace(layer, out=out)
        self.layers.append(done)
        # Only the layer without its output is remembered with the tensor, for the same reason.
        self._mark(out, [layer.source], layer)
        return out

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Any,
        running_var: Any,
        weight: Any = None,
        bias: Any = None,
        training: bool = False,
        *rest: Any,
        eps: float | None = None,
        **_: Any,
    ) -> Tensor:
        if training or running_mean is None or running_var is None:
            raise self.unsupported("batch_norm", "it uses the statistics of the batch; switch the classifier to eval mode")
        eps = eps if eps is not None else (rest[1] if len(rest) > 1 else 1e-5)
        scale = (running_var + eps).rsqrt() * (1.0 if weight is None else weight)
        shift = (0.0 if bias is None else bias) - running_mean * scale
        tail = (1,) * (input.ndim - 2)
        scale, shift = scale.detach(), shift.detach().reshape(-1, *tail)
        with torch.no_grad():
            value = input * scale.reshape(-1, *tail) + shift
        before = self.origins[input].layer
        if self.rules.fold_norm and before is not None and before.kind in ("conv", "linear"):
            folded = _scaled(before, scale)
            return self._attach_layer(replace(folded, bias=folded.bias + shift), value)
        if self.rules.norm == "pass":
            return self._attach(value, lambda r: (r,), input)
        affine, epsilon = scale.reshape(-1, *tail), self.rules.epsilon
        return self._attach(value, lambda r: (share_sum([input.detach() * affine, shift.expand_as(input)], r, "ratio", epsilon)[0],), input)

    def _feature_norm(self, name: str, func: Any, args: Any, kwargs: Any, features: list[Tensor]) -> Tensor:
        if len(features) > 1:
            raise self.unsupported(name, "its weights depend on the image")
        value, epsilon = self._value(func, args, kwargs), self.rules.epsilon
        if self.rules.norm == "pass":
            return self._attach(value, lambda r: (r,), features[0])
        args, kwargs = tree_map(lambda a: a.detach() if isinstance(a, Tensor) else a, (args, kwargs))
        return self._attach(value, lambda r: (share_norm(name, args, kwargs, r, epsilon),), features[0])


def _scaled(layer: Layer, factor: Tensor) -> Layer:
    """The layer with its outputs multiplied by one number per channel, ``[C]``."""
    weight = layer.weight * factor.reshape(-1, *(1,) * (layer.weight.ndim - 1))
    return replace(layer, weight=weight, bias=layer.bias * factor.reshape(-1, *(1,) * (layer.weight.ndim - 2)))


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) and value.requires_grad else value
