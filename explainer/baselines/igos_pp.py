"""iGOS++ (Khorram, Lawson & Li, CHIL 2021) and I-GOS (Qi, Khorram & Li, AAAI 2020): masks optimised along integrated gradients.

A mask value of 1 keeps the pixel. Deleting with ``m`` shows ``fill + m (x - fill)``; inserting shows the opposite,
``x + m (fill - x)``: where ``m`` is low the image is revealed. iGOS++ has a mask for each, and asks their product to do both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from explainer.baselines.kernels.base import Baseline
from explainer.errors import ConfigError, ShapeError
from explainer.fills import FillKind, make_fill

Optimizer = Literal["line_search", "nesterov"]
Score = Literal["probability", "logit"]

_ARMIJO = 1e-4  # share of the promised decrease that a step must deliver
_DECAY = 0.2  # factor between two tries of the line search
_SMALLEST_STEP = 1e-5
_MOMENTUM = 3.0  # Nesterov's weight is i / (i + 3)


def total_variation(mask: Tensor, weights: Sequence[Tensor | float] = (1.0, 1.0)) -> Tensor:
    """Mean squared vertical difference plus mean squared horizontal difference: ``[B]``, 0 for a constant mask.

    Args:
        mask: ``[B,1,H,W]``.
        weights: weights of the vertical ``[B,1,H-1,W]`` and horizontal ``[B,1,H,W-1]`` differences, see :func:`edge_weights`.
    """
    vertical, horizontal = ((w * mask.diff(dim=d).square()).flatten(1).mean(1) for d, w in zip((-2, -1), weights, strict=True))
    return vertical + horizontal


def edge_weights(normalized: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """How freely a mask may change between neighbours: 1 inside a flat region of the image, near 0 across an edge.

    The two directions differ, as in the public code: vertically ``exp(-(mean over channels of d)^2 / sigma)``, horizontally the
    mean over channels of ``exp(-d^2 / sigma)``.

    Args:
        normalized: ``[B,C,H,W]``, images as the classifier sees them.
        sigma: difference at which a weight has fallen to 1/e, in squared normalised units.

    Returns:
        ``[B,1,H-1,W]`` and ``[B,1,H,W-1]``.
    """
    vertical = torch.exp(-normalized.diff(dim=-2).mean(1, keepdim=True).square() / sigma)
    horizontal = torch.exp(-normalized.diff(dim=-1).square() / sigma).mean(1, keepdim=True)
    return vertical, horizontal


class NoiseTape:
    """One sequence of noise for all images, which each image reads at its own place: a batch then equals its images one by one, although
    their line searches need different numbers of draws.

    Args:
        generator: where the noise comes from; a generator of the images' device saves the copy.
        shape: shape of one draw.
        scale: standard deviation, broadcastable to ``shape``; its dtype and device are used.
        keep: how many draws are remembered; older ones are drawn again.
    """

    def __init__(self, generator: torch.Generator, shape: tuple[int, ...], scale: Tensor, keep: int) -> None:
        self.generator, self.shape, self.scale, self.keep = generator, shape, scale, keep
        self._states = [generator.get_state()]
        self._cache: dict[int, Tensor] = {}

    def __getitem__(self, place: int) -> Tensor:
        """The draw number ``place``."""
        while place not in self._cache:
            number = min(place, len(self._states) - 1)
            self.generator.set_state(self._states[number])
            noise = torch.randn(self.shape, generator=self.generator, dtype=self.scale.dtype, device=self.generator.device)
            if number == len(self._states) - 1:
                self._states.append(self.generator.get_state())
            self._cache[number] = noise.to(self.scale.device).mul_(self.scale)
            for old in sorted(self._cache)[: -self.keep]:
                if old != place:
                    del self._cache[old]
        return self._cache[place]

    def close(self) -> None:
        """Leave the generator behind the last draw made."""
        self.generator.set_state(self._states[-1])


class _Problem:
    """What one call optimises: images, fills and classes, with a place on the noise tape for every image."""

    def __init__(self, method: _IntegratedMask, images: Tensor, class_index: Tensor, generator: torch.Generator) -> None:
        explanandum = method.explanandum
        mean = getattr(explanandum, "mean", None)
        if isinstance(method.fill, Tensor):
            if method.fill.shape[-3:] != images.shape[-3:]:
                raise ShapeError(f"{method.name}: fill {tuple(method.fill.shape)} must match the images {tuple(images.shape)}.")
            fill = method.fill.to(images)
        else:
            fill = make_fill(images, method.fill, mean, generator, method.blur_sigma)
        self.method, self.images, self.classes = method, images, class_index
        self.fills = fill.expand_as(images)
        with torch.no_grad():
            normalized = explanandum.normalize(images)
            # The noise's standard deviation counts in normalised units; images are in [0,1].
            probe = images.new_tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, images.shape[1], 1, 1)
            low, high = explanandum.normalize(probe)
        self.weights = edge_weights(normalized, method.tv_sigma) if method.bilateral else None
        self.places = [0] * len(images)
        shape = (method.points, *images.shape[1:])
        scale = (method.noise / (high - low))[None]
        self.tape = NoiseTape(generator, shape, scale, keep=len(method.terms)) if method.noise else None
        strengths = torch.linspace(1 / method.points, 1, method.points, dtype=images.dtype, device=images.device)
        self.strengths = strengths.view(1, -1, 1, 1, 1)

    def upsample(self, masks: Tensor) -> Tensor:
        """``[B,T,1,h,w]`` -> ``[B,T,1,H,W]``."""
        size = self.images.shape[-2:]
        upsampled: Tensor = F.interpolate(masks.flatten(0, 1), size, mode="bilinear", align_corners=True).unflatten(0, masks.shape[:2])
        return upsampled

    def regularizer(self, masks: Tensor, upsampled: Tensor, active: Tensor) -> Tensor:
        """``l1 mean|1 - M| + l2 TV(M)`` of the product M of an image's masks: ``[b]``."""
        product = masks[:, 0] * masks[:, 1] if masks.shape[1] == 2 else masks[:, 0]
        if self.weights is None:
            tv = total_variation(product)
        else:
            tv = (total_variation(product) + total_variation(self.upsample(product[:, None])[:, 0], [w[active] for w in self.weights])) / 2
        return self.method.l1 * (1 - product).abs().flatten(1).mean(1) + self.method.l2 * tv

    def scores(self, terms: Tensor, active: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Sum over the terms of the class score, averaged over mask strengths: deletions count plus, insertions minus.

        Args:
            terms: ``[b,T,1,H,W]``, the upsampled mask of each term.
            active: ``[b]``, the images' numbers in the batch.
            gradient: also return the gradient to ``terms``.

        Returns:
            ``[b]``, and ``[b,T,1,H,W]`` or None.
        """
        method, count = self.method, terms.shape[1]
        # The public code's order of draws: the product's terms come first when it takes gradients and last in the line search.
        shift = count // 2 if gradient else 0
        noise_of = [[self.places[i] + (t + shift) % count for t in range(count)] for i in active.tolist()]
        for i in active.tolist():
            self.places[i] += count
        flat = terms.detach().flatten(0, 1)
        losses, gradients = [], []
        for part in torch.arange(len(flat)).split(max(1, method.batch_size // method.points)):
            rows, kinds = active[(part // count).to(active.device)], [method.terms[t][0] for t in (part % count).tolist()]
            sign = flat.new_tensor([1.0 if kind == "delete" else -1.0 for kind in kinds])
            flip = (sign < 0).view(-1, 1, 1, 1)
            removed, kept = self.fills[rows], self.images[rows]
            start = torch.where(flip, kept, removed).unsqueeze(1)
            change = (torch.where(flip, removed, kept) - start[:, 0]).unsqueeze(1)
            with torch.set_grad_enabled(gradient):
                mask = flat[part].requires_grad_(gradient)
                shown = torch.addcmul(start, mask.unsqueeze(1) * self.strengths, change)  # [n,points,C,H,W]
                if self.tape is not None:
                    shown = shown + torch.stack([self.tape[noise_of[n // count][n % count]] for n in part.tolist()])
                logits = self.method.explanandum(shown.flatten(0, 1))
                value = logits if method.score == "logit" else method.explanandum.probabilities(logits)
                picked = value.view(len(part), method.points, -1).gather(2, self.classes[rows].view(-1, 1, 1).expand(-1, method.points, 1))
                loss = sign * picked.squeeze(2).mean(1)
                if gradient:
                    gradients.append(torch.autograd.grad(loss.sum(), mask)[0])
            losses.append(loss.detach())
        total = torch.cat(losses).view(len(active), count).sum(1)
        return total, torch.cat(gradients).view_as(terms) if gradient else None

    def loss(self, masks: Tensor, active: Tensor) -> Tensor:
        """The objective ``[b]`` of masks ``[b,M,1,h,w]``, without gradient."""
        with torch.no_grad():
            up = self.upsample(masks)
            return self.scores(self.method.combine(up), active, False)[0] + self.regularizer(masks, up, active)

    def gradient(self, masks: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """Objective ``[b]`` and descent gradient ``[b,M,1,h,w]``: the score terms are averaged per mask, the regulariser is added."""
        with torch.enable_grad():
            leaf = masks.detach().clone().requires_grad_()
            up = self.upsample(leaf)
            terms = self.method.combine(up)
            score, slope = self.scores(terms, active, True)
            penalty = self.regularizer(leaf, up, active)
            share = self.method.gradient_share
            assert slope is not None
            (total,) = torch.autograd.grad([terms, penalty], leaf, [slope * share, torch.ones_like(penalty)])
        return score + penalty.detach(), total


Start = Callable[[Tensor, Tensor], Tensor]


class _IntegratedMask(Baseline):
    """The loop that I-GOS and iGOS++ share; they differ in ``terms``.

    Args:
        explanandum: the classifier.
        size: side of the masks that are optimised.
        iterations: outer steps.
        points: mask strengths ``k/points`` over which the score and its gradient are averaged (the integrated gradient).
        l1: weight of the mask's area.
        l2: weight of its total variation.
        noise: standard deviation of the noise on every image shown, in normalised units; 0 switches it off.
        optimizer: ``line_search`` (backtracking, one step length per image) or ``nesterov``.
        step: first (largest) step tried, or Nesterov's fixed step; None: the published one.
        tv_sigma: tolerance of the bilateral total variation to colour, in squared normalised units.
        fill: what deletion shows, by name or as a tensor ``[B,3,H,W]`` in [0,1].
        blur_sigma: pixels, for ``fill="blur"``; None: 9 % of the shorter side.
        score: ``probability`` (sigmoid or softmax, by the classifier's task) or ``logit``.
        init: start map ``[B,H,W]`` in [0,1], 1 = evidence, or a function (images, class index) -> such a map (an attributor, say);
            None: nothing removed.
        tolerance: an image whose masks moved less than this in one step leaves the batch; 0 never, as published.
        budget_s: no new iteration after so many seconds; None: no limit.
        batch_size: most images per classifier pass, rounded down to a multiple of ``points`` (and at least ``points``).

    Attributes:
        history: one dict per iteration of the last call: ``loss`` ``[B]`` before the step, ``step`` ``[B]`` (NaN for images that had
            left) and ``active``, the number of images still optimised.
    """

    terms: ClassVar[tuple[tuple[str, tuple[int, ...]], ...]]
    n_masks: ClassVar[int]
    gradient_share: ClassVar[float]
    bilateral: ClassVar[bool]
    published_step: ClassVar[float]
    deterministic = False
    revision = 1  # noise as a fill is one draw for all images

    def __init__(
        self,
        explanandum: Any,
        size: int = 28,
        iterations: int = 15,
        points: int = 20,
        l1: float = 1.0,
        l2: float = 20.0,
        noise: float = 0.2,
        optimizer: Optimizer = "line_search",
        step: float | None = None,
        tv_sigma: float = 0.01,
        fill: FillKind | Tensor = "blur",
        blur_sigma: float | None = None,
        score: Score = "probability",
        init: Tensor | Start | None = None,
        tolerance: float = 0.0,
        budget_s: float | None = None,
        batch_size: int = 20,
    ) -> None:
        super().__init__(explanandum)
        if min(size, iterations, points, batch_size) < 1:
            raise ConfigError(
                f"{self.name}: size, iterations, points and batch_size must be at least 1, "
                f"received {size}, {iterations}, {points}, {batch_size}."
            )
        for option, value, known in (("optimizer", optimizer, get_args(Optimizer)), ("score", score, get_args(Score))):
            if value not in known:
                raise ConfigError(f"{self.name}: {option} must be one of {', '.join(known)}, received {value!r}.")
        self.size, self.iterations, self.points, self.l1, self.l2, self.noise = size, iterations, points, l1, l2, noise
        default = self.published_step if optimizer == "line_search" else 20.0
        self.optimizer, self.step, self.tv_sigma = optimizer, default if step is None else step, tv_sigma
        self.fill, self.blur_sigma, self.score, self.init = fill, blur_sigma, score, init
        self.tolerance, self.budget_s, self.batch_size = tolerance, budget_s, batch_size
        self.history: list[dict[str, Any]] = []

    def combine(self, upsampled: Tensor) -> Tensor:
        """The mask of each score term, ``[b,M,1,H,W]`` -> ``[b,T,1,H,W]``."""
        return torch.stack([math.prod(upsampled[:, i] for i in which) for _, which in self.terms], dim=1)  # type: ignore[misc]

    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        problem = _Problem(self, images, class_index, generator)
        state = self._start(images, class_index)
        previous = torch.zeros_like(state)  # Nesterov's last point before extrapolation
        active = torch.arange(len(images), device=images.device)
        self.history = []
        begin = time.monotonic()
        for iteration in range(self.iterations):
            if len(active) == 0 or (self.budget_s is not None and time.monotonic() - begin > self.budget_s):
                break
            current = state[active]
            loss, slope = problem.gradient(current, active)
            if self.optimizer == "line_search":
                steps = self._line_search(problem, current, slope, active)
                new = current - steps.view(-1, 1, 1, 1, 1) * slope
            else:
                steps = torch.full_like(loss, self.step)
                landed = current - self.step * slope
                new = landed + iteration / (iteration + _MOMENTUM) * (landed - previous[active])
                previous[active] = landed
            new = new.clamp(0, 1)
            row = {"loss": torch.full_like(images[:, 0, 0, 0], torch.nan), "step": torch.full_like(images[:, 0, 0, 0], torch.nan)}
            row["loss"][active], row["step"][active] = loss, steps
            self.history.append({**row, "active": len(active)})
            state[active] = new
            active = active[(new - current).abs().flatten(1).amax(1) >= self.tolerance]
        if problem.tape is not None:
            problem.tape.close()
        evidence = 1 - state.prod(dim=1, keepdim=True)
        return problem.upsample(evidence)[:, 0, 0].clamp(0, 1)  # interpolation may round past 1

    def _start(self, images: Tensor, class_index: Tensor) -> Tensor:
        """Masks ``[B,M,1,size,size]`` whose product is one minus the start map."""
        shape = (len(images), self.n_masks, 1, self.size, self.size)
        if self.init is None:
            return images.new_ones(shape)
        given = self.init if isinstance(self.init, Tensor) else self.init(images, class_index)
        start = given.detach().to(images)
        start = start.unsqueeze(1) if start.ndim == 3 else start
        if start.ndim != 4 or start.shape[1] != 1 or len(start) not in (1, len(images)):
            raise ShapeError(f"{self.name}: init must be [B,H,W] or [B,1,h,w] with B={len(images)}, received {tuple(given.shape)}.")
        start = F.interpolate(start, (self.size, self.size), mode="bilinear", align_corners=True).clamp(0, 1)
        return (1 - start).pow(1 / self.n_masks).unsqueeze(1).expand(shape).clone()

    def _line_search(self, problem: _Problem, masks: Tensor, slope: Tensor, active: Tensor) -> Tensor:
        """Step lengths ``[b]``: the largest of ``step * 0.2^k`` that lowers the objective enough (Armijo), or the first below 1e-5."""
        base = problem.loss(masks, active)
        promised = _ARMIJO * slope.square().flatten(1).sum(1)
        steps = torch.full_like(base, self.step)
        searching = torch.arange(len(masks), device=masks.device)
        while len(searching):
            length = steps[searching]
            tried = (masks[searching] - length.view(-1, 1, 1, 1, 1) * slope[searching]).clamp(0, 1)
            loss = problem.loss(tried, active[searching])
            fails = loss > base[searching] - length * promised[searching]
            searching = searching[fails & (length >= _SMALLEST_STEP)]
            steps[searching] *= _DECAY
        return steps


class IGOSPlusPlus(_IntegratedMask):
    """A deletion and an insertion mask, alone and as their product; the map is one minus the product (section 3 of the paper)."""

    name = "igos_pp"
    passes = "iterations x (points x 4 (forward + backward) + line search)"
    terms = (("delete", (0,)), ("insert", (1,)), ("delete", (0, 1)), ("insert", (0, 1)))
    n_masks = 2
    gradient_share = 0.5
    bilateral = True
    published_step = 1000.0


class IGOS(_IntegratedMask):
    """I-GOS: one mask, deletion only, with the plain total variation."""

    name = "igos"
    passes = "iterations x (points x (forward + backward) + line search)"
    terms = (("delete", (0,)),)
    n_masks = 1
    gradient_share = 1.0
    bilateral = False
    published_step = 8.0
