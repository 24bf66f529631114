"""The smooth masks of extremal perturbations (Fong, Patrick and Vedaldi, ICCV 2019, section 3.2).

    m(u) = smax over nodes v of k(u - v) p(v),     smax(a) = sum_i a_i exp(T a_i) / sum_i exp(T a_i),  T = 20

with parameters p on a coarse grid whose nodes lie ``step`` pixels apart. Around each pixel only the window of ``2 * radius + 1``
nodes a side counts, nodes outside the grid being 0. The mask is made with a margin around the image, because mass may be placed there.

The kernel's unit of distance differs between the public code and the paper. The code divides pixels by sigma (21 px, three nodes). The
paper applies its kernel before upsampling, so its unit is one node (7 px). In the code's unit the paper's kernel would let one node
cover 18 % of an image of 224 px, and no mask of 5 % could exist.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from explainer.errors import ConfigError, ShapeError

KernelProfile = Literal["code", "paper"]
Pooling = Literal["softmax", "sum", "sigmoid"]
AreaReduction = Literal["mean", "sum"]

_PAPER_RADIUS = 6  # nodes: exp(-25/4) = .002 there; a cut at 4 nodes would leave a step of .1
_HALVINGS = 30  # of the interval in which the ranks' threshold lies
_CPU_BLOCK = 1 << 19  # elements worked on at a time: fits a second-level cache
_GPU_BLOCK = 1 << 26


def kernel_profile(z: Tensor, profile: KernelProfile = "code") -> Tensor:
    """Weight of a node at distance ``z``.

    Args:
        z: distances >= 0; unit: sigma for ``code``, the distance of two nodes for ``paper``.
        profile: ``code`` exp(-2 max(0, z-.5)^2); ``paper`` exp(-max(0, z-1)^2 / 4) (section 3.2, printed without the minus sign, with
            which alone the kernel is "flat, then decaying").
    """
    if profile == "code":
        return torch.exp(-2 * (z - 0.5).clamp_min(0) ** 2)
    if profile == "paper":
        return torch.exp(-((z - 1).clamp_min(0) ** 2) / 4)
    raise ConfigError(f"profile must be 'code' or 'paper', received {profile!r}.")


class _Pool(torch.autograd.Function):
    """Pool weighted nodes over each pixel's window, block by block, so that the [N, K, pixels] products are never kept.

    Layout: K window positions, G pixels of a cell, M cells. nodes ``[N,K,M]``, weight ``[K,G,M]``, result ``[N,G,M]``. All pixels
    of a cell see the same nodes, so nodes broadcast over G and the innermost axis stays contiguous.
    """

    @staticmethod
    def forward(ctx: Any, nodes: Tensor, weight: Tensor, coldness: float, softmax: bool) -> Tensor:
        n, count, _ = nodes.shape
        total = nodes.new_zeros(n, *weight.shape[1:])
        mass = torch.zeros_like(total)
        for part in _blocks(count, total.numel(), nodes.is_cuda):
            a = nodes[:, part].unsqueeze(2) * weight[part]
            if softmax:
                # a lies in [0,1], so exp(20 a) < 5e8 needs no shift by the maximum.
                e = (a * coldness).exp_()
                mass += e.sum(1)
                total += e.mul_(a).sum(1)
            else:
                total += a.sum(1)
        out = total / mass if softmax else total
        ctx.save_for_backward(nodes, weight, *((out, mass) if softmax else ()))
        ctx.coldness = coldness
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        nodes, weight, *rest = ctx.saved_tensors
        grad = grads[0].contiguous()
        result = torch.empty_like(nodes)
        if rest:
            out, mass = rest
            # d smax / d a_k = exp(T a_k) / mass * (1 + T (a_k - smax))
            scaled = grad / mass
            constant = scaled * (1 - ctx.coldness * out)
            scaled = scaled * ctx.coldness
        for part in _blocks(nodes.shape[1], grad.numel(), nodes.is_cuda):
            if rest:
                a = nodes[:, part].unsqueeze(2) * weight[part]
                e = (a * ctx.coldness).exp_().mul_(weight[part])
                local = a.mul_(scaled.unsqueeze(1)).add_(constant.unsqueeze(1)).mul_(e)
            else:
                local = grad.unsqueeze(1) * weight[part]
            result[:, part] = local.sum(2)
        return result, None, None, None


def _blocks(count: int, elements: int, is_cuda: bool) -> list[slice]:
    size = max(1, (_GPU_BLOCK if is_cuda else _CPU_BLOCK) // max(1, elements))
    return [slice(k, min(k + size, count)) for k in range(0, count, size)]


class SmoothMask:
    """From grid parameters to smooth masks of one image size.

    Args:
        height, width: image size in pixels.
        step: distance of the nodes in pixels, >= 1.
        sigma: width of the margin in pixels, and the kernel's scale of the ``code`` profile (the ``paper`` profile's is ``step``).
        profile: how a node's weight falls with its distance, ``code`` or ``paper``; see :func:`kernel_profile`.
        pooling: ``softmax`` (the paper's smax), ``sum``, or ``sigmoid`` (of ``coldness * sum - 3``).
        coldness: inverse temperature T of smax.
        clamp_gradient: ``pass`` or ``block``: whether gradient flows where rounding puts the mask exactly on 0 or 1. A convex
            combination of values in [0,1] needs no clamp, and ``pass`` is what torch did up to 2.14 and what the public code was
            written for; ``block`` is that code run under torch 2.15, whose clamp has gradient 0 at its bounds.

    Attributes:
        grid: ``(h, w)``, nodes per axis.
        padded: ``(height, width)`` of the mask with its margin.
        margin: pixels of it above and left of the image.

    Raises:
        ConfigError: ``step`` or ``sigma`` is out of range, or together they leave the mask smaller than the image and its margin.
    """

    def __init__(
        self,
        height: int,
        width: int,
        step: int = 7,
        sigma: int = 21,
        *,
        profile: KernelProfile = "code",
        pooling: Pooling = "softmax",
        coldness: float = 20.0,
        clamp_gradient: Literal["pass", "block"] = "pass",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if step < 1 or sigma < 1:
            raise ConfigError(f"step and sigma must be at least 1 pixel, received step={step}, sigma={sigma}.")
        if pooling not in ("softmax", "sum", "sigmoid"):
            raise ConfigError(f"pooling must be 'softmax', 'sum' or 'sigmoid', received {pooling!r}.")
        if clamp_gradient not in ("pass", "block"):
            raise ConfigError(f"clamp_gradient must be 'pass' or 'block', received {clamp_gradient!r}.")
        self.height, self.width, self.margin, self.dtype = height, width, sigma, dtype
        self.step, self.pooling, self.coldness, self.clamp_gradient = step, pooling, coldness, clamp_gradient
        self.grid = (math.ceil(height / step), math.ceil(width / step))
        reach = 1 + math.ceil(sigma / step)
        self.radius = reach if profile == "code" else _PAPER_RADIUS
        self.padding = self.radius - reach + 1 + math.ceil(2 * sigma / step)
        cells = [n + 2 * (self.padding - self.radius) for n in self.grid]
        self.padded = (step * (cells[0] - 1) + 1, step * (cells[1] - 1) + 1)
        if self.padded[0] < sigma + height or self.padded[1] < sigma + width:
            raise ConfigError(
                f"sigma={sigma} with step={step} leaves a mask of {self.padded} pixels for an image of {(height, width)} and a margin of "
                f"{sigma}: make sigma a multiple of step (the published masks use sigma = 3 step)."
            )
        weights, slots = zip(*(self._axis(c, p) for c, p in zip(cells, self.padded, strict=True)), strict=True)
        distance = (weights[0][:, None, :, None, :, None] ** 2 + weights[1][None, :, None, :, None, :] ** 2).sqrt()
        unit = sigma if profile == "code" else step
        self._weight = kernel_profile(distance / unit, profile).reshape(distance.shape[0] * distance.shape[1], -1, cells[0] * cells[1])
        self._weight = self._weight.to(dtype=dtype, device=device).contiguous()
        (cell_y, within_y), (cell_x, within_x) = slots
        per_cell = distance.shape[3]
        group = within_y[:, None] * per_cell + within_x
        self._slot = (group * (cells[0] * cells[1]) + cell_y[:, None] * cells[1] + cell_x).flatten().to(device)

    def _axis(self, cells: int, pixels: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Signed distances ``[window, pixels of a cell, cells]`` along one axis, and each pixel's (cell, place in it)."""
        u = torch.arange(pixels)
        start = torch.arange(cells) * self.step  # every cell has step pixels, the last one only its first
        position = start[None, :] + torch.arange(self.step)[:, None]
        node = torch.arange(cells)[None, :] + torch.arange(2 * self.radius + 1)[:, None] - self.padding
        return (position[None] - (self.margin + self.step * node[:, None, :])).double(), (u // self.step, u % self.step)

    def padded_masks(self, parameters: Tensor) -> Tensor:
        """Masks with their margin.

        Args:
            parameters: ``[N,h,w]`` in [0,1], on the grid.

        Returns:
            ``[N,*padded]`` in [0,1] (``sum`` pooling is not bounded).
        """
        if parameters.ndim != 3 or tuple(parameters.shape[1:]) != self.grid:
            raise ShapeError(f"parameters must be [N,h,w] with h,w = {self.grid}, received {tuple(parameters.shape)}.")
        side = 2 * self.radius + 1
        nodes = F.unfold(parameters.unsqueeze(1), side, padding=self.padding)
        pooled = _Pool.apply(nodes, self._weight, self.coldness, self.pooling == "softmax")
        full: Tensor = pooled.flatten(1).index_select(1, self._slot).view(-1, *self.padded)
        if self.pooling == "sigmoid":
            full = torch.sigmoid(self.coldness * full - 3)
        return full.clamp(0, 1) if self.clamp_gradient == "block" and self.pooling != "sum" else full

    def crop(self, padded: Tensor) -> Tensor:
        """The part ``[...,H,W]`` that lies over the image."""
        return padded[..., self.margin : self.margin + self.height, self.margin : self.margin + self.width]

    def __call__(self, parameters: Tensor) -> Tensor:
        """Masks ``[N,H,W]`` of parameters ``[N,h,w]``."""
        return self.crop(self.padded_masks(parameters))

    def footprint(self) -> Tensor:
        """Part of each node's kernel that lies over the image, ``[h,w]`` in (0,1]."""
        nodes = torch.zeros(1, *self.grid, dtype=self.dtype, device=self._weight.device).requires_grad_()
        with torch.enable_grad():
            full = self.padded_masks(nodes)
            (inside,) = torch.autograd.grad(self.crop(full).sum(), nodes, retain_graph=True)
            (whole,) = torch.autograd.grad(full.sum(), nodes)
        return (inside / whole)[0]

    def parameters_from(self, masks: Tensor) -> Tensor:
        """Parameters ``[N,h,w]`` whose masks resemble full-size masks ``[N,H,W]``: their mean around each node.

        The kernel widens what a node covers by about sigma/2, so the result is a start for optimisation, not an inverse.
        """
        size = 2 * (self.step // 2) + 1
        local = F.avg_pool2d(masks.unsqueeze(1), size, stride=1, padding=size // 2, count_include_pad=False).squeeze(1)
        return local[..., :: self.step, :: self.step].clamp(0, 1).contiguous()


def parameters_of_area(
    family: SmoothMask, score: Tensor, areas: Sequence[float], *, on_margin: bool = True, gain: float = 1.0, border: float = 4.0
) -> Tensor:
    """Parameters that are large where a score is large and whose masks have the areas asked for.

    ``clamp(0.5 + gain (score - threshold))`` of the standardised score, the threshold found by bisection. A node at the border, part of
    whose kernel falls on the margin where it shows nothing, is put back by ``border`` times that part.

    Args:
        family: the masks.
        score: ``[N,h,w]`` on its grid.
        areas: N mean values that the masks should have.
        on_margin: whether the areas are those of the mask with its margin, or of the part over the image.

    Returns:
        ``[N,h,w]`` in [0,1].
    """
    score = (score - score.mean((1, 2), keepdim=True)) / score.flatten(1).std(1).clamp_min(torch.finfo(score.dtype).tiny)[:, None, None]
    score = score - border * (1 - family.footprint())
    wanted = torch.tensor(areas, dtype=score.dtype, device=score.device)
    low = score.amin((1, 2)) - 1 / gain
    high = score.amax((1, 2)) + 1 / gain

    def at(threshold: Tensor) -> Tensor:
        return (0.5 + gain * (score - threshold[:, None, None])).clamp(0, 1)

    for _ in range(10):  # a thousandth of the range of thresholds
        middle = (low + high) / 2
        full = family.padded_masks(at(middle))
        too_large = (full if on_margin else family.crop(full)).mean((1, 2)) > wanted
        low, high = torch.where(too_large, middle, low), torch.where(too_large, high, middle)
    return at((low + high) / 2)


def checked_areas(areas: Sequence[float], channels: bool) -> tuple[float, ...]:
    """The areas as numbers: fractions in (0,1), or with ``channels`` also whole numbers of channels.

    Raises:
        ConfigError: there is none, or one is neither.
    """
    values = tuple(float(a) for a in ([areas] if isinstance(areas, (int, float)) else areas))
    rule = "fractions in (0,1), or whole numbers of channels" if channels else "fractions of the image in (0,1)"
    valid = [0 < a < 1 or (channels and a >= 1 and a == int(a)) for a in values]
    if not values or not all(valid):
        raise ConfigError(f"areas must be {rule}, at least one, received {list(values)}.")
    return values


def excluded(count: int, areas: Sequence[float], device: torch.device | str | None = None) -> Tensor:
    """How many of ``count`` mask values the area constraint wants at 0, for each area a: ``floor(count * (1 - a))``, ``[N]`` long."""
    return torch.tensor([int(count * (1 - a)) for a in areas], device=device)


def area_penalty(masks: Tensor, zeros: Tensor, reduction: AreaReduction = "mean", width: float = 0.0) -> Tensor:
    """R_a = (sort(m) - r_a)^2 reduced over pixels, r_a being zeros and then ones (section 3.1).

    Args:
        masks: ``[N,...]`` in [0,1].
        zeros: ``[N]`` long, the number of zeros in each r_a, see :func:`excluded`.
        reduction: ``sum`` (the text's squared norm) or ``mean`` (the public code's, to which the published weight of 300 belongs: as a sum
            the same pull is 300 / Z for Z pixels, .006 for an image of 224).
        width: values so close to each other share the step of r_a, see :func:`shared_ranks`; 0: the published step, which goes where the
            sort puts equal values.

    Returns:
        ``[N]``; 0 for a binary mask of the wanted area.
    """
    flat = masks.flatten(1)
    if width:
        squares = (flat - shared_ranks(flat.detach(), flat.shape[1] - zeros, width)).square()
    else:
        ordered = flat.sort(dim=1).values
        squares = (ordered - (torch.arange(ordered.shape[1], device=masks.device) >= zeros[:, None]).to(masks.dtype)).square()
    return squares.mean(1) if reduction == "mean" else squares.sum(1)


def shared_ranks(values: Tensor, ones: Tensor, width: float) -> Tensor:
    """1 for the largest values of each row, 0 for the others, and between for values that are ``width`` or less apart around the step.

    ``clamp(value / width - threshold, 0, 1)`` with the threshold that makes the sum right: the point of the capped simplex that is nearest
    to ``value / width``. Equal values get equal ranks, and rounding moves a rank by no more than itself / ``width``.

    Args:
        values: ``[N,Z]``.
        ones: ``[N]``, what each row sums to, from 0 to Z.
        width: > 0.
    """
    scaled = values / width
    low, high = scaled.amin(1) - 1, scaled.amax(1)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        too_many = (scaled - middle[:, None]).clamp_(0, 1).sum(1) > ones
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    return (scaled - ((low + high) / 2)[:, None]).clamp_(0, 1)
