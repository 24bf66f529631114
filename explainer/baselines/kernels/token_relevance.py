"""Relevance through a transformer by the rules of Chefer, Gur & Wolf (CVPR 2021), down to the attention
matrices or to the pixels.

The forward pass is recorded operation by operation and walked backward. Relevance ``R`` starts as 1 at the
class's logit. With ``D(a, b) = a / (b + 1e-9)``, 0 where ``b = 0``, ``x+ = max(x,0)`` and ``x- = min(x,0)``:

- linear: ``Z = x+ w+' + x- w-'``; ``R_x = x+ (D(R,Z) w+) + x- (D(R,Z) w-)``: positive contributions,
  the bias is ignored. A mean over tokens is the linear layer with weights 1/N.
- skip, ``z = a + b``: ``r_a = a D(R,z)``, ``r_b`` alike; ``s_a``, ``s_b`` their sums over the
  image and ``S = sum R``; ``r_a <- r_a |s_a| / (|s_a| + |s_b|) S / s_a``, ``r_b`` alike.
- a tensor with several readers: ``R = x (sum of D(R_i, x))``.
- product of two features, ``O = A V``: ``r_A = A (D(R,O) V') / 2`` and ``r_V = V (A' D(R,O)) / 2``; both
  parts sum to the same, so the halves are the paper's normalisation.
- GELU, norms, softmax, dropout, scaling by constants, constant biases of attention scores: unchanged.
- what moves values (reshape, transpose): to where they came from; what selects tokens ``x`` of a sequence:
  ``x D(R, x)`` goes there.
- the layer that reads pixels (z^B, Montavon et al. 2017): ``Z = x w' - l w+' - h w-' + 1e-9`` with ``l``,
  ``h`` the image's least and greatest value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from explainer.baselines.kernels.operations import POINTWISE, ROUTING
from explainer.baselines.kernels.token_maps import AttentionWatch

_PASS = POINTWISE | {"layer_norm", "rms_norm", "softmax"}
_ADDITIONS = {"add", "radd", "iadd"}
_SCALINGS = {"mul", "rmul", "multiply", "div", "truediv", "true_divide", "divide"}
_SELECTIONS = {"getitem", "select", "index_select", "narrow"}
_ALTERNATIVES = (
    "Use generic_attention or attention_rollout where attention is over all tokens of an image, else one of: "
    "integrated_gradients, grad_cam, rise, extremal_perturbation."
)


def share(a: Tensor, b: Tensor) -> Tensor:
    """``D(a, b) = a / (b + 1e-9)``, 0 where ``b`` is 0."""
    shifted = b + 1e-9
    return torch.where(b == 0, 0, a / torch.where(shifted == 0, 1e-9, shifted))


@dataclass(frozen=True)
class Step:
    """One operation of the forward pass: its name, the features it read, what it returned, and its rule.

    ``rule`` takes the relevance of each output (None where nothing reads it) and returns that of each input.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    rule: Callable[[list[Tensor | None]], list[Tensor]]


class RelevanceTape(AttentionWatch):
    """Records the forward pass; :meth:`walk` sends relevance back.

    The graph starts at what the classifier receives (:attr:`image`), or at the first attention where that is
    out of reach.
    """

    def __init__(self, classifier: Any, method: str) -> None:
        super().__init__(classifier, method)
        self.steps: list[Step] = []
        self.image: Tensor | None = None
        self.pixels: set[int] = set()

    def begin(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook of the classifier: its input becomes the graph's first leaf."""
        self.image = args[0].detach().clone().requires_grad_()
        self.pixels = {id(self.image)}
        return (self.image, *args[1:])

    def run(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one operation and writes it down with its rule."""
        features = tuple(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad)
        if name == "iadd":
            func = torch.add
        out = func(*args, **kwargs)
        outputs = tuple(t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad)
        if not features or not outputs or all(any(o is f for f in features) for o in outputs):
            return out
        rule = self._rule(name, args, kwargs, features, outputs) or self._refusal(name)
        self.steps.append(Step(features, outputs, rule))
        if name in ROUTING and all(id(f) in self.pixels for f in features):
            self.pixels |= {id(o) for o in outputs}
        return out

    def _rule(self, name: str, args: Any, kwargs: Any, features: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> Any:
        if name in ("linear", "conv2d"):
            return self._weighted(name, args, kwargs)
        if name in ("matmul", "bmm") and len(features) == 2:
            return lambda r: _product(features[0].detach(), features[1].detach(), outputs[0].detach(), r[0])
        if name in _ADDITIONS and (len(features) == 2 or outputs[0].ndim == 3):
            parts = [a.detach() if isinstance(a, Tensor) else torch.as_tensor(a).to(outputs[0].detach()) for a in args[:2]]
            moving = [isinstance(a, Tensor) and a.requires_grad for a in args[:2]]
            return lambda r: [s for s, m in zip(_skip(parts[0], parts[1], outputs[0].detach(), r[0]), moving, strict=True) if m]
        if len(features) == 1 and (name in _PASS or name in _SCALINGS or name in _ADDITIONS) and not kwargs.get("inplace", False):
            return lambda r: [r[0].sum_to_size(features[0].shape)]
        if name in ("mean", "sum"):
            return lambda r: [_average(features[0].detach(), lambda x: getattr(x, name)(*args[1:], **kwargs), r[0])]
        if name in _SELECTIONS and features[0].ndim == 3:
            selected = outputs[0].detach()
            return lambda r: _routed(outputs, features, [selected * share(r[0], selected)])
        if name in ROUTING or name in ("T", "mT"):
            return lambda r: _routed(outputs, features, r)
        return None

    def _refusal(self, name: str) -> Callable[[list[Tensor | None]], list[Tensor]]:
        """For an operation without rule: an error if relevance reaches it. Before the first attention may stand anything."""
        error = self.unsupported(f"{name!r}, for which it has no rule,", _ALTERNATIVES)

        def refuse(_: list[Tensor | None]) -> list[Tensor]:
            raise error

        return refuse

    def _weighted(self, name: str, args: Any, kwargs: Any) -> Any:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        bound = dict(zip(names, args, strict=False)) | kwargs
        x, weight = bound.pop("input"), bound.pop("weight").detach()
        bound.pop("bias", None)
        function = getattr(torch.nn.functional, name)
        rule = _box if id(x) in self.pixels else _positive
        return lambda r: [rule(x.detach(), weight, lambda v, w: function(v, w, **bound), r[0])]

    def walk(self, start: Tensor, logits: Tensor, until: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Sends ``start`` ``[B,K]`` back from the logits; yields each attention matrix with its relevance,
        last layer first, and in the end ``until`` with its own, where the walk stops.
        """
        arrived: dict[int, list[Tensor]] = {id(logits): [start]}
        matrices = {id(a) for _, a in self.attentions}

        def relevance(t: Tensor) -> Tensor | None:
            received = arrived.get(id(t))
            if received is None or len(received) == 1:
                return received[0] if received else None
            x = t.detach()
            return x * torch.stack([share(r, x) for r in received]).sum(0)

        with torch.no_grad():
            for step in reversed(self.steps):
                values = [relevance(o) for o in step.outputs]
                if all(v is None for v in values):
                    continue
                for out, value in zip(step.outputs, values, strict=True):
                    if value is not None and (id(out) in matrices or out is until):
                        yield out, value
                    if out is until:
                        return
                for tensor, value in zip(step.inputs, step.rule(values), strict=True):
                    arrived.setdefault(id(tensor), []).append(value)
            found = relevance(until)
            if found is not None:
                yield until, found


def _positive(x: Tensor, weight: Tensor, apply: Callable[[Tensor, Tensor], Tensor], relevance: Tensor) -> Tensor:
    parts = [(x.clamp(min=0), weight.clamp(min=0)), (x.clamp(max=0), weight.clamp(max=0))]
    with torch.enable_grad():
        inputs = [p.detach().requires_grad_() for p, _ in parts]
        z = apply(inputs[0], parts[0][1]) + apply(inputs[1], parts[1][1])
        slopes = torch.autograd.grad(z, inputs, share(relevance, z.detach()))
    return parts[0][0] * slopes[0] + parts[1][0] * slopes[1]


def _box(x: Tensor, weight: Tensor, apply: Callable[[Tensor, Tensor], Tensor], relevance: Tensor) -> Tensor:
    axes = tuple(range(1, x.ndim))
    low, high = (bound(x, axes, keepdim=True).expand_as(x) for bound in (torch.amin, torch.amax))
    parts = [(x, weight), (low, -weight.clamp(min=0)), (high, -weight.clamp(max=0))]
    with torch.enable_grad():
        inputs = [p.detach().clone().requires_grad_() for p, _ in parts]
        z = torch.stack([apply(i, w) for i, (_, w) in zip(inputs, parts, strict=True)]).sum(0) + 1e-9
        slopes = torch.autograd.grad(z, inputs, relevance / z.detach())
    return torch.stack([p * s for (p, _), s in zip(parts, slopes, strict=True)]).sum(0)


def _average(x: Tensor, apply: Callable[[Tensor], Tensor], relevance: Tensor) -> Tensor:
    with torch.enable_grad():
        positive = x.clamp(min=0).requires_grad_()
        z = apply(positive)
        (slope,) = torch.autograd.grad(z, positive, share(relevance, z.detach()))
    return positive.detach() * slope


def _product(a: Tensor, b: Tensor, out: Tensor, relevance: Tensor) -> list[Tensor]:
    shares = share(relevance, out)
    return [a * (shares @ b.transpose(-2, -1)) / 2, b * (a.transpose(-2, -1) @ shares) / 2]


def _skip(a: Tensor, b: Tensor, out: Tensor, relevance: Tensor) -> list[Tensor]:
    shares = share(relevance, out)
    axes = tuple(range(1, out.ndim))
    parts = [a * shares, b * shares]
    sums = [p.sum(axes, keepdim=True) for p in parts]
    total, magnitude = relevance.sum(axes, keepdim=True), sums[0].abs() + sums[1].abs()
    scaled = [p * share(share(s.abs(), magnitude) * total, s) for p, s in zip(parts, sums, strict=True)]
    return [s.sum_to_size(p.shape) for s, p in zip(scaled, (a, b), strict=True)]


def _routed(outputs: tuple[Tensor, ...], features: tuple[Tensor, ...], relevance: list[Tensor | None]) -> list[Tensor]:
    read = [(o, r) for o, r in zip(outputs, relevance, strict=True) if r is not None]
    with torch.enable_grad():
        found = torch.autograd.grad([o for o, _ in read], features, [r for _, r in read], retain_graph=True, allow_unused=True)
    return [torch.zeros_like(f) if g is None else g for f, g in zip(features, found, strict=True)]
