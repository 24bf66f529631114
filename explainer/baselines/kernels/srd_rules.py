"""Sharing rules of Sharing Ratio Decomposition (Han, Kim, Kwak, ICLR 2024): what one layer does to a cotangent and to a piece.

At the operating point every affine layer is a data-dependent *linear* map: the bias is shared among the pixels of a receptive field by
their norms (eq. 11), so ``u_i -> W u_i + b n_i / D_j`` with ``n_i = ||u_i||`` and ``D_j = sum of n in the receptive field``.
``pull`` is the transpose of that map (used by the backward sweep), ``push`` the map itself applied to what found no owner (leak).
Everything is written with native operations, so a sweep can be differentiated.

Shapes: ``u`` value at the layer's input ``[B,C,H,W]``, ``g`` cotangent at its output, ``[B,1,H,W]`` for norms and shares.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from explainer.errors import UnsupportedLayerError

ZERO_SQUARE = 1e-20  # ||v||^2 at or below this: the vector has no direction to share along, its relevance leaks
ZERO_NORM = 1e-10  # the same bound for norms and their sums
_BLOCK = 2**19  # numbers that are looked at together: 2 MB in float32
aten = torch.ops.aten


def inverse(values: Tensor, bound: float) -> Tensor:
    """``1/values`` where values > bound, else 0, with finite derivatives in both branches."""
    live = values > bound
    return torch.where(live, 1 / torch.where(live, values, torch.ones_like(values)), torch.zeros_like(values))


def inverse_square_norm(values: Tensor) -> Tensor:
    """``1/||v_j||^2`` over channels, ``[B,1,H,W]``; 0 for zero vectors (section 8 of the specification)."""
    return inverse(inner(values, values), ZERO_SQUARE)


def norms(values: Tensor) -> Tensor:
    """``||v_j||`` over channels, ``[B,1,H,W]``. The norm's own operation takes twice as long, but has a derivative at 0."""
    if values.requires_grad:
        lengths: Tensor = torch.linalg.vector_norm(values, dim=1, keepdim=True)
        return lengths
    return inner(values, values).sqrt()


def _in_parts(*maps: Tensor) -> bool:
    """Whether maps are gone through a part at a time: on the CPU a large temporary costs more to get than to fill."""
    a = maps[0]
    plain = not torch.is_grad_enabled() and a.device.type == "cpu" and a.numel() > 2 * _BLOCK
    return plain and all(m.shape == a.shape and m.dtype == a.dtype for m in maps)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Channel dot product, ``[B,1,H,W]``."""
    return inners(a, b)[0]


def inners(a: Tensor, *others: Tensor) -> list[Tensor]:
    """:func:`inner` of ``a`` with each of the others, for which large maps ``a`` are read once."""
    if not _in_parts(a, *others):
        return [(a * b).sum(1, keepdim=True) for b in others]
    step = max(1, _BLOCK // (a.numel() // a.shape[1]))
    room, totals = torch.empty_like(a[:, :step]), [torch.zeros_like(a[:, :1]) for _ in others]
    for one, *parts in zip(*(m.split(step, 1) for m in (a, *others)), strict=True):
        for total, part in zip(totals, parts, strict=True):
            total += torch.mul(one, part, out=room[:, : one.shape[1]]).sum(1, keepdim=True)
    return totals


def restart(v: Tensor, relevance: Tensor, room: Tensor | None = None) -> Tensor:
    """``v R / ||v||^2`` (eq. 6), 0 for zero vectors.

    Args:
        v: ``[B,C,h,w]``.
        relevance: R ``[B,h,w]``.
        room: written over if it fits: large maps that are asked of the system anew cost more than they take to fill.
    """
    scale = relevance.unsqueeze(1) * inverse_square_norm(v)
    if torch.is_grad_enabled() or room is None or room.shape != v.shape or not room.dtype == v.dtype == scale.dtype:
        return v * scale
    return torch.mul(v, scale, out=room)


def channel_dot(vector: Tensor, values: Tensor) -> Tensor:
    """``<vector, values_j>`` for one vector ``[C]``, ``[B,1,H,W]``, without a temporary of the size of ``values``."""
    batch, channels, height, width = values.shape
    return torch.matmul(vector.view(1, 1, channels), values.reshape(batch, channels, height * width)).view(batch, 1, height, width)


class Rule(abc.ABC):
    """A layer between sources. Multi-input layers (Add, Cat) see all their inputs."""

    @abc.abstractmethod
    def pull(self, g: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Cotangent at the output -> one cotangent per input."""

    @abc.abstractmethod
    def push(self, pieces: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> Tensor | None:
        """What of the inputs has no owner (None: nothing) -> what of the output has no owner."""


@dataclass
class Opaque(Rule):
    """An operation without a rule. Only a sweep that has to cross it fails, and is refused by name before it begins."""

    reason: str

    def pull(self, g: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Refused."""
        raise UnsupportedLayerError(self.reason)

    def push(self, pieces: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> Tensor | None:
        """Refused."""
        raise UnsupportedLayerError(self.reason)


class _Identity(Rule):
    """What comes out went in."""

    def pull(self, g: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The identity."""
        return [g]

    def push(self, pieces: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> Tensor | None:
        """The identity."""
        return pieces[0]


class Pass(_Identity):
    """Dropout in eval mode, copies."""


class Source(_Identity):
    """The input, and every pointwise activation: whatever the activation does, relevance passes it unchanged. A sweep ends here."""


class Add(Rule):
    """Residual sum: every addend keeps its own share."""

    def pull(self, g: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The same cotangent for every addend."""
        return [g] * len(inputs)

    def push(self, pieces: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> Tensor | None:
        """The sum."""
        present = [p for p in pieces if p is not None]
        return sum(present[1:], present[0]) if present else None


class Cat(Rule):
    """Concatenation over channels."""

    def pull(self, g: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Each input gets its own channels."""
        return list(g.split([u.shape[1] for u in inputs], dim=1))

    def push(self, pieces: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> Tensor | None:
        """The concatenation, zero where an input lost nothing."""
        if all(p is None for p in pieces):
            return None
        return torch.cat([torch.zeros_like(u) if p is None else p for p, u in zip(pieces, inputs, strict=True)], 1)


@dataclass
class Gate(Rule):
    """Product with a gate, one number per channel or pixel (squeeze-and-excitation). At the operating point the gate is a constant, so the
    product is the linear map ``u -> gate * u``; the gate's own inputs share nothing.
    """

    gate: Tensor = field(repr=False)

    def pull(self, g: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        """``gate * g``."""
        return [g * self.gate.to(g.dtype)]

    def push(self, pieces: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> Tensor | None:
        """``gate * w``."""
        return None if pieces[0] is None else pieces[0] * self.gate.to(pieces[0].dtype)


@dataclass
class Pad(Rule):
    """Zero padding: ``pad`` in the order of ``F.pad``."""

    pad: tuple[int, ...]

    def pull(self, g: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Crop."""
        return [F.pad(g, [-p for p in self.pad])]

    def push(self, pieces: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> Tensor | None:
        """Pad."""
        return None if pieces[0] is None else F.pad(pieces[0], self.pad)


@dataclass
class Conv(Rule):
    """Convolution (eq. 11). ``share`` caches the inverse norms, which all classes of an image have in common."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    share: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def _ones(self, like: Tensor) -> Tensor:
        return like.new_ones(1, 1, *self.weight.shape[-2:])

    @property
    def _pools(self) -> bool:
        """Whether a sum over the receptive field is a pooling, which is faster than a convolution of one channel."""
        return self.dilation == (1, 1) and all(2 * p <= k for p, k in zip(self.padding, self.weight.shape[-2:], strict=True))

    def _sum_field(self, values: Tensor) -> Tensor:
        """Sum of a one-channel map over each output pixel's receptive field."""
        if self._pools:
            return F.avg_pool2d(values, self.weight.shape[-2:], self.stride, self.padding, divisor_override=1)
        return F.conv2d(values, self._ones(values), None, self.stride, self.padding, self.dilation)

    def _spread_field(self, values: Tensor, like: Tensor) -> Tensor:
        """The transpose of :meth:`_sum_field`; ``like`` is a one-channel map at the layer's input."""
        if self._pools:
            spread: Tensor = aten.avg_pool2d_backward(values, like, list(self.weight.shape[-2:]), self.stride, self.padding, False, True, 1)
            return spread
        return self._transpose(values, like, self._ones(values), 1)

    def _transpose(self, g: Tensor, u: Tensor, weight: Tensor, groups: int) -> Tensor:
        args = (self.stride, self.padding, self.dilation, False, (0, 0), groups, (True, False, False))
        transposed: Tensor = aten.convolution_backward(g, u, weight, None, *args)[0]
        return transposed

    def shares(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """``(1/n_i, 1/D_j)``, zero where there is no norm to share by."""
        return self._share_by(norms(u)) if self.share is None else self.share

    def _share_by(self, norm: Tensor) -> tuple[Tensor, Tensor]:
        self.share = inverse(norm, ZERO_NORM), inverse(self._sum_field(norm), ZERO_NORM)
        return self.share

    def transposed(self, g: Tensor, u: Tensor, scale: Tensor | None = None) -> Tensor:
        """``convT_W(g)``, which nothing else holds.

        Args:
            g: cotangent at the output.
            u: value at the input.
            scale: factor of each output channel, from a folded BatchNorm.
        """
        weight = self.weight.to(g.dtype)
        if scale is not None and weight.numel() < g.numel():  # whichever is smaller is scaled
            weight = weight * scale.to(g.dtype).view(-1, 1, 1, 1)
        elif scale is not None:
            g = g * scale.to(g.dtype).view(1, -1, 1, 1)
        return self._transpose(g, u, weight, self.groups)

    def shared_bias(self, beta: Tensor, u: Tensor) -> Tensor:
        """``t = convT_1(beta/D)/n`` ``[B,1,H,W]``: the bias adds ``u t`` to the cotangent at the input.

        Args:
            beta: dot product of the (folded) bias with the cotangent at the output, ``[B,1,H,W]``.
            u: value at the input.
        """
        inverse_norm, inverse_sum = self.shares(u)
        return self._spread_field(beta * inverse_sum, inverse_norm) * inverse_norm

    def relevance(self, back: Tensor, beta: Tensor | None, u: Tensor) -> Tensor:
        """``<u, back + u t>`` ``[B,1,H,W]``: the relevance of the vectors at the input. Norms not known yet are found in the same go."""
        if beta is None:
            return inner(u, back)
        if self.share is None and not u.requires_grad:
            found, squares = inners(u, back, u)
            self._share_by(squares.sqrt())
        else:
            found = inner(u, back)
        return found + self.shared_bias(beta, u) * inverse(self.shares(u)[0], 0).square()

    def pull(self, g: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        """``convT_W(g) + u t``."""
        beta, u = self.bias_share(g), inputs[0]
        return [join(self.transposed(g, u), None if beta is None else self.shared_bias(beta, u), u)]

    def bias_share(self, g: Tensor) -> Tensor | None:
        """``beta`` of the layer's own bias."""
        return None if self.bias is None else channel_dot(self.bias.to(g.dtype), g)

    def push_parts(self, piece: Tensor | None, u: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Without the bias: the ownerless part of ``W u``, and the ownerless fraction of the bias at each output pixel."""
        inverse_norm, inverse_sum = self.shares(u)
        missing = (inverse_sum == 0).to(u.dtype)
        if piece is None:
            return None, missing if bool(missing.any()) else None
        weighted = F.conv2d(piece, self.weight.to(u.dtype), None, self.stride, self.padding, self.dilation, self.groups)
        return weighted, self._sum_field(inner(piece, u) * inverse_norm) * inverse_sum + missing

    def push(self, pieces: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> Tensor | None:
        """``W w + b * fraction``."""
        weighted, fraction = self.push_parts(pieces[0], inputs[0])
        return combine(weighted, self.bias, fraction)


def join(back: Tensor, along: Tensor | None, u: Tensor) -> Tensor:
    """``back + u along``; written into ``back`` where no graph is kept."""
    if along is None:
        return back
    return torch.addcmul(back, u, along, out=None if torch.is_grad_enabled() else back)


def combine(weighted: Tensor | None, bias: Tensor | None, fraction: Tensor | None) -> Tensor | None:
    """``weighted + bias * fraction`` where None stands for zero."""
    if bias is None or fraction is None:
        return weighted
    shared = bias.to(fraction.dtype).view(1, -1, 1, 1) * fraction
    return shared if weighted is None else weighted + shared


@dataclass
class Norm(Rule):
    """BatchNorm in eval mode, ``scale * u + shift`` (a 1x1 layer), where it cannot be folded into a convolution."""

    scale: Tensor
    shift: Tensor

    def scaled(self, values: Tensor) -> Tensor:
        """``scale * values`` per channel."""
        return values * self.scale.to(values.dtype).view(1, -1, 1, 1)

    def pull(self, g: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        """``s g + u <t,g> / ||u||^2``."""
        u = inputs[0]
        return [torch.addcmul(self.scaled(g), u, channel_dot(self.shift.to(g.dtype), g) * inverse_square_norm(u))]

    def push(self, pieces: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> Tensor | None:
        """``s w + t <w,u>/||u||^2``, and all of t where u is zero."""
        u, piece = inputs[0], pieces[0]
        inverse_square = inverse_square_norm(u)
        fraction = (inverse_square == 0).to(u.dtype)
        if piece is None:
            return combine(None, self.shift, fraction if bool(fraction.any()) else None)
        return combine(self.scaled(piece), self.shift, fraction + inner(piece, u) * inverse_square)


@dataclass
class MaxPool(Rule):
    """Max pooling with the indices of the forward pass (eq. 12)."""

    settings: tuple[Any, ...]
    indices: Tensor

    def pull(self, g: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Scatter to the winners."""
        return [aten.max_pool2d_with_indices_backward(g, inputs[0], *self.settings, self.indices)]

    def push(self, pieces: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> Tensor | None:
        """Gather from the winners."""
        if pieces[0] is None:
            return None
        return pieces[0].flatten(2).gather(2, self.indices.flatten(2)).view(self.indices.shape)


@dataclass
class AvgPool(Rule):
    """Average pooling of any kind: ``forward`` pools a tensor, ``backward(g, u)`` is its transpose."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]

    def pull(self, g: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Spread evenly."""
        return [self.backward(g, inputs[0])]

    def push(self, pieces: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> Tensor | None:
        """Pool."""
        return None if pieces[0] is None else self.forward(pieces[0])
