"""The backward sweep of AGF over a traced forward pass: one rule per kind of operation (Algorithm 1, lines 5 to 20).

Layers beyond the paper follow its Definition 1: ReLU, pooling and averages hand each output's attribution to their inputs in
proportion to the inputs' contributions; other elementwise activations, BatchNorm, dropout and products with a gate
(squeeze-and-excitation, the gate taken as a constant) pass it through; a sum divides it in proportion to its terms; a tensor read by
several operations receives ``x * sum_k(phi_k / x)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from explainer.baselines.kernels.agf_rules import (
    Convolution,
    Options,
    class_distribution,
    factorize,
    gradient_map,
    normalize_max,
    sdiv,
    share,
    shift,
    z_bounds,
)
from explainer.baselines.kernels.graph_calls import Call, Run, unsupported

SUPPORTED = (
    "Conv2d, Linear, BatchNorm, elementwise activations, max, average and adaptive pooling, dropout, flatten, "
    "padding, addition, concatenation and gates of one number per channel (squeeze-and-excitation)"
)
_THROUGH = ("activation", "gate", "batch_norm", "affine", "identity")
Record = dict[str, dict[str, Tensor]]
_LINEAR_BLOCK = 2**20  # weights of a linear layer that are looked at together: 4 MB, which caches hold


@dataclass
class Sweep:
    """One class per image, swept back over ``run``.

    Args:
        run: the forward pass; it is read, never changed (``run.cache`` keeps what does not depend on the class).
        options: settings of the method; see :class:`~explainer.baselines.kernels.agf_rules.Options`.
        method: name used in messages.
        record: if given, filled with the intermediate quantities of each layer, by place.
        map_shape: ``(C,H,W)`` of a network input that is a flattened map, for the first-linear-layer rule.
    """

    run: Run
    options: Options
    method: str = "agf"
    record: Record | None = None
    map_shape: tuple[int, ...] | None = None

    def from_class(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Start at the last layer with the class of each image (section "initial attribution").

        Args:
            target: ``[B]``.

        Returns:
            Attribution and gradient of the network's input.
        """
        first = self._last_layer()
        logits = self.run.output
        with torch.enable_grad():
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            yhat = class_distribution(wide, target)
            chance = yhat.gather(1, target[:, None]).sum()
        self._backpropagate(chance, first.index, (first,))
        x = _wide(first.inputs[0])
        spread = (wide != wide.gather(1, target[:, None])).any(dim=1).view(-1, *([1] * (x.ndim - 1)))
        phi = torch.where(spread, x * self.gradients[(first.index, "in")], 0.0)
        self._note(first, yhat=yhat, Phi=phi)
        return self._sweep({first.sources[0]: [phi]}, first.index), self.gradients[(0, "out")]

    def from_output(self, phi: Tensor, gradient: Tensor) -> Tensor:
        """Start at the network's output with a given attribution and gradient, both shaped like it; returns the input's attribution."""
        self._backpropagate((self.run.output * gradient).sum(), self.run.last + 1, ())
        return self._sweep({self.run.last: [phi]}, self.run.last + 1)

    def _last_layer(self) -> Call:
        call = self.run.calls[self.run.last]
        while call.kind not in ("linear", "conv"):
            if len(call.sources) != 1:
                raise unsupported(call, self.method, SUPPORTED, "no single last linear or convolutional layer leads to the logits")
            call = self.run.calls[call.sources[0]]
        return call

    def _backpropagate(self, scalar: Tensor, stop: int, extra: tuple[Call, ...]) -> None:
        """Gradients at the inputs and outputs of the layers whose rule reads them, from one backward pass."""
        self.roles = roles(self.run, self.options, self.map_shape)
        wanted: dict[tuple[int, str], Tensor] = {(0, "out"): self.run.input}
        for call in self.run.calls[:stop]:
            if self.roles.get(call.index) in ("full", "map"):
                wanted[(call.index, "in")] = call.inputs[0]
            if self.roles.get(call.index) == "full":
                wanted[(call.index, "out")] = call.output
        for call in extra:
            wanted[(call.index, "in")] = call.inputs[0]
        found = torch.autograd.grad(scalar, list(wanted.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
        self.gradients = {key: g.to(torch.promote_types(g.dtype, torch.float32)) for key, g in zip(wanted, found, strict=True)}

    def _sweep(self, pending: dict[int, list[Tensor]], stop: int) -> Tensor:
        with torch.no_grad():
            for call in reversed(self.run.calls[:stop]):
                parts = pending.pop(call.index, None)
                if parts is None:
                    continue
                phi = parts[0] if len(parts) == 1 else _merge(_wide(call.output), parts)
                if call.kind == "input":
                    return phi
                for source, part in zip(call.sources, self._back(call, phi), strict=True):
                    pending.setdefault(source, []).append(part)
        return torch.zeros_like(_wide(self.run.input))

    def _back(self, call: Call, phi: Tensor) -> tuple[Tensor, ...]:
        """Attribution of each input of one call."""
        kind = call.kind
        if kind == "conv":
            return (self._conv(call, phi),)
        if kind == "linear":
            return (self._linear(call, phi),)
        if kind in ("relu", "max_pool", "average"):
            return (self._definition_one(call, phi),)
        if kind in _THROUGH:
            return (phi * (call.output != 0) if kind in ("activation", "gate") else phi,)
        if kind == "pad":
            return (torch.autograd.grad(call.output, call.inputs[0], phi.to(call.output.dtype), retain_graph=True)[0].to(phi.dtype),)
        if kind == "reshape":
            return (phi.reshape(call.inputs[0].shape),)
        if kind == "add" and len(call.inputs) == 2:
            s = share(phi, _wide(call.output))
            return tuple((_wide(x) * s).sum_to_size(x.shape) for x in call.inputs)
        if kind == "add":  # a constant was added
            return (phi,)
        if kind == "cat":
            return torch.split(phi, [x.shape[1] for x in call.inputs], dim=1)
        raise unsupported(call, self.method, SUPPORTED)

    def _definition_one(self, call: Call, phi: Tensor) -> Tensor:
        s = share(phi, _wide(call.output)).to(call.output.dtype)
        return _wide(call.inputs[0]) * torch.autograd.grad(call.output, call.inputs[0], s, retain_graph=True)[0]

    def _linear(self, call: Call, phi: Tensor) -> Tensor:
        if call.inputs[0].ndim != 2:
            raise unsupported(call, self.method, SUPPORTED, f"its input has shape {tuple(call.inputs[0].shape)}, expected (B,features)")
        x = _wide(call.inputs[0])
        given: Any = call.module.weight if call.module is not None else call.arguments[0][1]
        c = _influence_of_linear(x, given.detach(), phi)
        if self.roles[call.index] != "map":
            self._note(call, C=c, Phi=c)
            return c
        shape = self._map_shape_of(call)
        m = gradient_map(x.view(-1, *shape), self.gradients[(call.index, "in")].view(-1, *shape))
        m = m.expand(-1, *shape).reshape(c.shape)
        m = normalize_max(m * (c != 0) if self.options.shift == "masked" else m, self.options.abs_guard)
        out = shift(c, m, self.options)
        self._note(call, C=c, M=m, Phi=out)
        return out

    def _map_shape_of(self, call: Call) -> tuple[int, ...]:
        shape = map_shape(self.run, call, self.map_shape)
        assert shape is not None  # the role "map" was given for it
        return shape

    def _conv(self, call: Call, phi: Tensor) -> Tensor:
        weight, conv = Convolution.of(call)
        x = _wide(call.inputs[0])
        weight = weight.to(x.dtype)
        role = self.roles[call.index]
        if role == "first":
            out = z_bounds(x, phi, weight, conv)
            self._note(call, Phi=out)
            return out
        strength = weight.abs()
        c = x.abs() * conv.transpose(share(phi, self._influence(call, conv, x, strength)), strength, x.shape)
        if role == "flat":
            self._note(call, C=c, Phi=c)
            return c
        return self._full(call, phi, c, conv, weight, strength)

    def _influence(self, call: Call, conv: Convolution, x: Tensor, strength: Tensor) -> Tensor:
        """``|w| * |x|``, the same for every class."""
        key = (call.index, "influence")
        if key not in self.run.cache:
            self.run.cache[key] = conv(x.abs(), strength)
        influence: Tensor = self.run.cache[key]
        return influence

    def _full(self, call: Call, phi: Tensor, c: Tensor, conv: Convolution, weight: Tensor, strength: Tensor) -> Tensor:
        """Eqs. 9 to 14: influences, gradient map and both factorizations into one residual."""
        o, x, zero = self.options, _wide(call.inputs[0]), c.new_zeros(())
        g = self.gradients[(call.index, "in")]
        masked = g if o.no_fdx and not o.gradcam else self._masked_gradient(call, phi, g, conv, weight)
        split = c.mean(dim=1, keepdim=True)
        a = zero if o.no_a else conv.transpose(share(phi, conv.from_ones(x, strength)), strength, x.shape)
        m = zero if o.no_m else normalize_max(gradient_map(x, g), o.abs_guard)
        f_x = zero if o.no_fx else factorize(x, split, o).relu()
        f_dx = zero if o.no_fdx else factorize(masked, split, o).relu()
        gated = gradient_map(x, masked.mean(dim=(2, 3), keepdim=True)) if o.gradcam else f_x + m
        r = a + f_dx + (gated if o.no_reg else sdiv(gated, 1 + torch.exp(-c)))
        if o.shift == "masked":
            r = r * (c != 0)
        out = shift(c, r, o)
        self._note(call, C=c, A=a, F_x=f_x, F_dx=f_dx, M=m, r=r, Phi=out)
        return out

    def _masked_gradient(self, call: Call, phi: Tensor, g: Tensor, conv: Convolution, weight: Tensor) -> Tensor:
        """Gradient of the layer's input from those outputs alone that carry attribution."""
        if not self.options.mask_gradient:
            return g
        outer = self.gradients[(call.index, "out")]
        masked = outer * (phi != 0)
        if torch.equal(masked, outer):  # behind a ReLU both are 0 at the same places: the pass is saved
            return g
        return conv.transpose(masked, weight, g.shape)

    def _note(self, call: Call, **quantities: Tensor) -> None:
        if self.record is not None:
            self.record[call.place] = {key: value.detach() for key, value in quantities.items()}


def _influence_of_linear(x: Tensor, weight: Tensor, phi: Tensor) -> Tensor:
    """Eq. 9 of a linear layer, ``|x| * (S |w|)`` with ``S`` the share of the outputs' attribution, ``[B,in]``.

    Some outputs at a time: ``|w|`` of VGG's first linear layer alone is 400 MB, and making it takes longer than all that is done with it.
    """
    rows = max(1, _LINEAR_BLOCK // weight.shape[1])
    strength, magnitude = x.new_empty(min(rows, len(weight)), weight.shape[1]), x.abs()
    total = torch.zeros_like(x)
    for part, given in zip(weight.split(rows), phi.split(rows, dim=1), strict=True):
        w = torch.abs(part, out=strength[: len(part)])
        total += share(given, F.linear(magnitude, w)) @ w
    return magnitude * total


def _wide(x: Tensor) -> Tensor:
    """Detached and at least float32: the residual is of order 1 whatever the scale of the attribution, so half precision loses it."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _merge(x: Tensor, parts: list[Tensor]) -> Tensor:
    return x * sum((sdiv(p, x) for p in parts), torch.zeros_like(x))


def roles(run: Run, options: Options, shape: tuple[int, ...] | None = None) -> dict[int, str]:
    """The rule of each convolution (``first``, ``flat``, ``full``) and linear layer (``map``, ``plain``), by call.

    ``first``: no layer with weights comes before it. ``flat``: within a residual block, the convolutions that feed the sum and the 1x1
    convolutions (the published code's choice for Bottleneck and BasicBlock). ``map``: its input is a flattened map.
    """
    flat = _residual_flat(run) if options.flat else set()
    weighted: dict[int, bool] = {}
    result: dict[int, str] = {}
    for call in run.calls:
        before = any(weighted[s] for s in call.sources)
        weighted[call.index] = before or call.kind in ("conv", "linear")
        if call.kind == "conv":
            first = not before and options.first_conv == "zb"
            result[call.index] = "first" if first else "flat" if call.index in flat else "full"
        elif call.kind == "linear":
            result[call.index] = "plain" if map_shape(run, call, shape) is None else "map"
    return result


def map_shape(run: Run, call: Call, given: tuple[int, ...] | None = None) -> tuple[int, ...] | None:
    """``(C,H,W)`` of the map that was flattened into the input of a linear call, None if it is none."""
    source = run.behind(call.sources[0])
    if source.kind == "input":
        return given
    flattened = source.kind == "reshape" and source.output.ndim == 2 and source.inputs[0].ndim == 4
    return tuple(source.inputs[0].shape[1:]) if flattened else None


def _residual_flat(run: Run) -> set[int]:
    found: set[int] = set()
    for join in run.calls:
        if join.kind != "add" or len(join.sources) != 2:
            continue
        for source in join.sources:
            call, nearest = run.calls[source], True
            while len(call.sources) == 1 and len(call.targets) == 1:
                if call.kind == "conv":
                    if nearest or Convolution.of(call)[0].shape[2:] == (1, 1):
                        found.add(call.index)
                    nearest = False
                call = run.calls[call.sources[0]]
    return found
