"""The arithmetic of Attribution Guided Factorization: pure functions on one layer's tensors.

Gur, Ali and Wolf, "Visualization of Supervised and Self-Supervised Neural Networks via Attribution Guided Factorization", AAAI 2021.
Letters as in the paper: ``x`` the layer's input, ``phi`` the attribution of its output (then of its input), ``G`` the gradient of the
class probability, ``C`` absolute influence, ``A`` input-agnostic influence, ``M`` gradient map, ``F`` factorization. Every reduction
is per image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from explainer.baselines.kernels.graph_calls import Call

EPS = 1e-9


@dataclass(frozen=True)
class Options:
    """What the paper and its published code do differently, and the ablations of Table 5 (see :class:`~explainer.baselines.agf.AGF`)."""

    gain: float = 10.0
    ridge: float = 1.0
    background: Literal["negative", "nonpositive"] = "negative"
    mask_gradient: bool = True
    shift: Literal["masked", "everywhere"] = "masked"
    first_conv: Literal["zb", "full"] = "zb"
    flat: bool = True
    abs_guard: bool = False
    no_a: bool = False
    no_fx: bool = False
    no_fdx: bool = False
    no_m: bool = False
    no_reg: bool = False
    gradcam: bool = False


def sdiv(a: Tensor, b: Tensor) -> Tensor:
    """``a / (b + 1e-9)``, 0 where ``b`` is 0. Signed: a negative ``b`` is moved towards 0."""
    d = b + EPS
    return (a / d.masked_fill_(d == 0, EPS)).mul_(b != 0)


def _sample(a: Tensor) -> tuple[int, ...]:
    return tuple(range(1, a.ndim))


def normalize_max(a: Tensor, guard: bool = False) -> Tensor:
    """Divide by the signed maximum of each image (a negative maximum flips the sign; ``guard``: it leaves the image as it is)."""
    top = a.amax(dim=_sample(a), keepdim=True)
    return torch.where(top > 0, sdiv(a, top), a) if guard else sdiv(a, top)


def share(phi: Tensor, z: Tensor) -> Tensor:
    """The share ``S`` of Definition 1 that each output hands back: ``phi / z`` where ``phi`` and ``z`` are not 0."""
    return sdiv(phi, z)  # 0 where phi is, whatever z is


def class_distribution(logits: Tensor, target: Tensor) -> Tensor:
    """``yhat`` of eq. 8, ``[B,K]``, which depends on the target class; its gradient runs through ``sigma``, ``y_t`` and every ``y_c``.

    ``sigma = max_c |y_c - y_t|``, ``z_c = y_t exp(-((y_c - y_t) / sigma)^2 / 2)``, ``yhat = softmax(z)``. Where all logits are equal
    ``sigma`` is taken as 1, which leaves the gradient finite (the caller sets the attribution to 0 there).
    """
    chosen = logits.gather(1, target[:, None])
    gap = logits - chosen
    sigma = gap.abs().amax(dim=1, keepdim=True)
    z = chosen * torch.exp(-0.5 * (gap / torch.where(sigma == 0, 1.0, sigma)) ** 2)
    return z.softmax(dim=1)


def shift(c: Tensor, r: Tensor, options: Options) -> Tensor:
    """Definition 2 and eq. 4: ``C + r`` less the mean of ``r`` where ``C`` is not 0, so that the sum stays that of ``C``.

    ``shift="masked"`` (code) adds and subtracts only where ``C`` is not 0; ``"everywhere"`` (paper, as printed) at all positions, which
    keeps the sum only where ``C`` has no zeros. An image with ``C = 0`` is returned as it is.
    """
    live = (c != 0).to(c.dtype)
    count = live.sum(dim=_sample(c), keepdim=True)
    if options.shift == "masked":
        r = r * live
    mean = r.sum(dim=_sample(c), keepdim=True) / count.clamp(min=1)
    moved = c + r - (mean * live if options.shift == "masked" else mean)
    return torch.where(count > 0, moved, c)


def factorize(y: Tensor, phi: Tensor, options: Options) -> Tensor:
    """Eq. 7: how much more each pixel of ``y`` resembles the support than the background, ``[B,1,H,W]``, before the relu.

    ``H = sigmoid(gain * y / max y)``; ``Rf`` and ``Rb`` its mean over the pixels with ``phi`` above and below 0; ``W`` the positive part of
    the least-squares weights ``(R'R + ridge)^-1 R'H``; the result is ``W_f - W_b``. ``ridge = 0`` uses the pseudo-inverse.

    Args:
        y: ``[B,C,H,W]``.
        phi: partition map ``[B,1,H,W]``.
    """
    if options.ridge < 1e-3 and y.device.type != "mps":  # a 2x2 determinant of nearly parallel columns cancels in float32
        dtype, y, phi = y.dtype, y.double(), phi.double()
    else:
        dtype = y.dtype
    h = torch.sigmoid(options.gain * normalize_max(y, options.abs_guard)).flatten(2)
    phi = phi.flatten(2)
    back = phi < 0 if options.background == "negative" else phi <= 0
    sides = torch.cat([back, phi > 0], dim=1).to(h.dtype)
    r = sdiv(h @ sides.transpose(1, 2), sides.sum(dim=2)[:, None, :])
    gram = r.transpose(1, 2) @ r
    projected = r.transpose(1, 2) @ h
    weights = (_inverse(gram, options.ridge) @ projected).relu()
    return (weights[:, 1:] - weights[:, :1]).view(y.shape[0], 1, *y.shape[2:]).to(dtype)


def _inverse(gram: Tensor, ridge: float) -> Tensor:
    """Inverse of the 2x2 normal matrix plus ``ridge``, ``[B,2,2]``."""
    if ridge == 0:
        sound = gram.isfinite().all(dim=(1, 2), keepdim=True)  # eigenvalues of one image's NaN would fail the whole batch
        inverse: Tensor = torch.linalg.pinv(torch.where(sound, gram, 0.0), hermitian=True)
        return torch.where(sound, inverse, torch.nan)
    a, d, e = gram[:, 0, 0] + ridge, gram[:, 1, 1] + ridge, gram[:, 0, 1]
    adjugate = torch.stack([d, -e, -e, a], dim=1).view(-1, 2, 2)
    return adjugate / (a * d - e * e)[:, None, None]


def gradient_map(x: Tensor, g: Tensor) -> Tensor:
    """Eq. 12 before normalisation: ``relu(mean_c x G)``, ``[B,1,H,W]``."""
    return (x * g).mean(dim=1, keepdim=True).relu()


@dataclass(frozen=True)
class Convolution:
    """A convolution without bias as a linear map of its input, for any weight of the same shape."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    extra: tuple[int, ...] = ()
    mode: str = "constant"

    @classmethod
    def of(cls, call: Call) -> tuple[Tensor, Convolution]:
        """Weight and map of a ``conv`` call (module or ``F.conv2d``)."""
        if call.module is not None:
            m: torch.nn.Conv2d = call.module  # type: ignore[assignment]
            weight, stride, padding, dilation, groups = m.weight, m.stride, m.padding, m.dilation, m.groups
            mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
        else:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            given = dict(zip(names, call.arguments[0], strict=False)) | call.arguments[1]
            weight, mode = given["weight"], "constant"
            stride, padding, dilation, groups = (given.get(k, d) for k, d in zip(names[3:], (1, 0, 1, 1), strict=True))
        dilation = _pair(dilation)
        sides = _sides(padding, weight.shape[2:], dilation)
        symmetric = sides[0] == sides[1] and sides[2] == sides[3] and mode == "constant"
        inside, extra = ((sides[2], sides[0]), ()) if symmetric else ((0, 0), sides)
        return weight.detach(), cls(_pair(stride), inside, dilation, int(groups), extra, mode)

    def __call__(self, x: Tensor, w: Tensor) -> Tensor:
        """``[B,C,H,W]`` -> the convolution's output."""
        return self._convolve(self._pad(x), w, self.groups)

    def from_ones(self, x: Tensor, w: Tensor) -> Tensor:
        """The output for ones shaped like ``x``, ``[1,O,H',W']``: one channel suffices, with the weights summed over channels."""
        ones = torch.ones_like(x[:1, :1])
        return self._convolve(self._pad(ones), w.sum(dim=1, keepdim=True), 1)

    def transpose(self, s: Tensor, w: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
        """The adjoint: output-shaped ``s`` -> input-shaped ``size`` (its batch axis is that of ``s``)."""
        if not self.extra:
            return self._adjoint(s, w, (s.shape[0], *size[1:]))
        with torch.enable_grad():
            leaf = torch.zeros((s.shape[0], *size[1:]), dtype=s.dtype, device=s.device, requires_grad=True)
            padded = self._pad(leaf)
        return torch.autograd.grad(padded, leaf, self._adjoint(s, w, tuple(padded.shape)))[0]

    def _adjoint(self, s: Tensor, w: Tensor, size: tuple[int, ...]) -> Tensor:
        adjoint: Tensor = conv2d_input(size, w, s, self.stride, self.padding, self.dilation, self.groups)
        return adjoint

    def _convolve(self, x: Tensor, w: Tensor, groups: int) -> Tensor:
        return F.conv2d(x, w, None, self.stride, self.padding, self.dilation, groups)

    def _pad(self, x: Tensor) -> Tensor:
        return F.pad(x, self.extra, mode=self.mode) if self.extra else x


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _sides(padding: str | int | tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, int]) -> tuple[int, int, int, int]:
    """Padding as ``(left, right, top, bottom)``; ``"same"`` may be one larger at the right and bottom."""
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2)
    rows, columns = _pair(padding)  # type: ignore[arg-type]
    return (columns, columns, rows, rows)


def z_bounds(x: Tensor, phi: Tensor, w: Tensor, conv: Convolution) -> Tensor:
    """The rule for the layer that sees the image: bounds ``lo`` and ``hi`` are the image's least and largest value.

    ``Z = w x - w+ lo - w- hi``, ``S = phi / Z``, ``phi_in = x w'S - lo w+'S - hi w-'S`` (Montavon et al. 2017, z^B).
    """
    lo, hi = x.amin(dim=(1, 2, 3), keepdim=True), x.amax(dim=(1, 2, 3), keepdim=True)
    up, down = w.clamp(min=0), w.clamp(max=0)
    z = conv(x, w) - lo * conv.from_ones(x, up) - hi * conv.from_ones(x, down)
    s = sdiv(phi, z)
    return x * conv.transpose(s, w, x.shape) - lo * conv.transpose(s, up, x.shape) - hi * conv.transpose(s, down, x.shape)
