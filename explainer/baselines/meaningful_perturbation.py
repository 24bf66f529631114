"""Meaningful perturbation (Fong and Vedaldi, Interpretable Explanations of Black Boxes by Meaningful Perturbation, ICCV 2017).

Deletion (eq. 5), with M the mask m upsampled and smoothed, and tau a random shift of the image by a few pixels:

    min_m  l1 ||1 - m||_1 + l2 sum_u ||grad m(u)||_beta^beta + E_tau[ f_c( Phi(x shifted by tau; M) ) ]

Preservation replaces the first term by l1 ||m||_1 and the last by its negative. m = 1 keeps a pixel, 0 perturbs it.

Perturbations (section 4.1): a constant colour or noise is mixed in, ``M x + (1 - M) fill``. Blur is a Gaussian whose width varies with the
pixel, ``sigma(u) = sigma0 (1 - M(u))`` (printed as ``sigma0 m(u)``, which would blur what m = 1 keeps, against eq. 3); the public code
mixes in one blurred image instead. At M = 0 and M = 1 the two agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from explainer.attribution import check_class_index, check_images
from explainer.baselines.kernels.base import Baseline
from explainer.baselines.kernels.hooks import untouched
from explainer.baselines.kernels.mask_search import Ascent, History, Limits, maximize
from explainer.baselines.kernels.perturbation import Perturbation, pyramid, shift, upsampling_matrix
from explainer.errors import ConfigError, ShapeError

Game = Literal["delete", "preserve"]
Kind = Literal["blur", "constant", "noise"]
Blend = Literal["width", "mix"]
Start = Tensor | float | Callable[[Tensor, Tensor], Tensor] | Literal["disc"]

_NOISE = 0.2  # standard deviation of the noise around the image's mean colour
_WIDTHS = 11  # blur levels between which the width is interpolated: sigma 0, 1, .., 10 at 224 pixels
_RADII = 16  # discs tried for the start, evenly spaced up to the one that covers the corners


def variation(mask: Tensor, beta: float = 3.0) -> Tensor:
    """``sum_u |m(u) - m(right of u)|^beta + |m(u) - m(below u)|^beta`` of masks ``[N,h,w]`` -> ``[N]``."""
    across = (mask[:, :, 1:] - mask[:, :, :-1]).abs().pow(beta).flatten(1).sum(1)
    down = (mask[:, 1:] - mask[:, :-1]).abs().pow(beta).flatten(1).sum(1)
    return across + down


def centred_discs(height: int, width: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[count,height,width]``: 1 inside centred discs of radius 1/count .. 1 times the distance of the corner pixels."""
    y = torch.arange(height, dtype=dtype, device=device) - (height - 1) / 2
    x = torch.arange(width, dtype=dtype, device=device) - (width - 1) / 2
    distance = (y[:, None] ** 2 + x**2).sqrt()
    radius = distance.max() * torch.arange(1, count + 1, dtype=dtype, device=device) / count
    return (distance <= radius[:, None, None] + 1e-6).to(dtype)


@dataclass(frozen=True)
class MeaningfulMasks:
    """Result of one search.

    Attributes:
        maps: ``[B,H,W]`` in [0,1], larger is more evidence: 1 - M of deletion, M of preservation.
        scores: ``[B]``, the class's probability (or the ``top`` classes' sum) behind the final mask, without jitter; ``original``: of the
            untouched image.
        parameters: ``[B,h,w]``, the final map on the grid (evidence, as ``maps``): a later search can start from it.
        iterations: ``[B]``.
        history: ``objective``, ``score`` and ``area`` (mean of the evidence on the grid) per iteration, ``[T,B]``.
    """

    maps: Tensor
    scores: Tensor
    original: Tensor
    parameters: Tensor
    iterations: Tensor
    history: History


class MeaningfulPerturbation(Baseline):
    """The smallest smooth region whose removal destroys, or whose presence keeps, a class's probability.

    Lengths published for 224-pixel images follow the shorter side of other ones.

    Args:
        explanandum: the classifier.
        game: ``delete`` or ``preserve``.
        perturbation: ``blur``, ``constant`` (the image's mean colour) or ``noise`` (Gaussian around it, independent per pixel and channel;
            the same draw for all images, so that a map does not depend on the batch).
        blend: how a mask value blurs: ``mix`` (public code; default, because its masks find planted evidence where ``width`` leaves
            fringes) or ``width`` (paper; what ``mode: paper`` of an evaluation takes), see the module.
        iterations: Adam steps.
        rate: step size of Adam.
        l1: weight of the mask's size, summed over the grid.
        l2: weight of its variation.
        beta: exponent of the variation.
        grid: mask cells along the shorter side (8 pixels each at 224).
        mask_sigma: smoothing of the upsampled mask in pixels. None: 5 at 224.
        blur_sigma: standard deviation of the blur, in pixels. None: 10 at 224.
        jitter: the image is shifted by 0..jitter-1 pixels down and right at each step; 1 or 0: never.
        init: ``disc`` (the smallest centred disc that has 99 % of the effect of perturbing everything), or evidence (1 where the class
            is) as grid maps ``[B,h,w]``, full-size maps ``[B,H,W]``, one number, or a callable (images, class_index) -> ``[B,H,W]``.
        max_iterations, budget_s, tolerance, patience, rows_per_pass: see :class:`~explainer.baselines.kernels.mask_search.Limits`.
        top: 0: the probability of the class that is asked for. n: the sum of the n highest probabilities of the untouched image,
            whatever the class; the paper's tables of localisation and pointing take 5 (with ``l1`` 1e-3 and ``beta`` 2).

    Attributes:
        history: values of the last search, step by step.
    """

    name = "meaningful_perturbation"
    passes = "iterations x (forward + backward), less for converged masks"
    deterministic = False
    paper_options: ClassVar[dict[str, Any]] = {"blend": "width"}
    revision = 1  # blur of varying width, Gaussian noise

    def __init__(
        self,
        explanandum: Any,
        *,
        game: Game = "delete",
        perturbation: Kind = "blur",
        iterations: int = 300,
        rate: float = 0.1,
        l1: float = 1e-4,
        l2: float = 1e-2,
        beta: float = 3.0,
        grid: int = 28,
        mask_sigma: float | None = None,
        blur_sigma: float | None = None,
        jitter: int = 4,
        init: Start = "disc",
        max_iterations: int | None = None,
        budget_s: float | None = None,
        tolerance: float | None = None,
        patience: int = 10,
        rows_per_pass: int | None = None,
        blend: Blend = "mix",
        top: int = 0,
    ) -> None:
        super().__init__(explanandum)
        if not 0 <= top <= self.num_classes:
            raise ConfigError(f"top must lie in 0..{self.num_classes} (the number of classes), received {top}.")
        for option, value, known in (("game", game, Game), ("perturbation", perturbation, Kind), ("blend", blend, Blend)):
            if value not in get_args(known):
                raise ConfigError(f"{option} must be one of {', '.join(get_args(known))}, received {value!r}.")
        if iterations < 1 or grid < 1 or jitter < 0:
            raise ConfigError(f"iterations and grid must be at least 1 and jitter 0, received {iterations}, {grid}, {jitter}.")
        if isinstance(init, str) and init != "disc":
            raise ConfigError(f"init must be 'disc', a number, a tensor or a callable, received {init!r}.")
        self.game, self.perturbation, self.iterations, self.rate = game, perturbation, iterations, rate
        self.l1, self.l2, self.beta, self.grid = l1, l2, beta, grid
        self.mask_sigma, self.blur_sigma, self.jitter, self.init = mask_sigma, blur_sigma, jitter, init
        self.blend, self.top = blend, top
        self.limits = Limits(max_iterations, budget_s, tolerance, patience, rows_per_pass)
        self.history = History()

    def masks(
        self, images: Tensor, class_index: Tensor | int | list[int], *, init: Start | None = None, generator: torch.Generator | None = None
    ) -> MeaningfulMasks:
        """Search all images in one batch.

        Args:
            images: ``[B,3,H,W]`` in [0,1].
            class_index: class per image, ``[B]`` or one int for all.
            init: overrides the constructor's.
            generator: random generator of the shifts and the noise; None: seed 0.
        """
        check_images(images)
        index = check_class_index(class_index, images, self.num_classes)
        with untouched(self.explanandum):
            return self._search(images, index, init, generator or torch.Generator().manual_seed(0))

    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        return self._search(images, class_index, None, generator).maps

    def _search(self, images: Tensor, class_index: Tensor, init: Start | None, generator: torch.Generator) -> MeaningfulMasks:
        height, width = images.shape[-2:]
        scale = min(height, width) / 224
        cells = self.cells(images)
        blur = 10 * scale if self.blur_sigma is None else self.blur_sigma
        smoothing = 5 * scale if self.mask_sigma is None else self.mask_sigma
        width_varies = self.perturbation == "blur" and self.blend == "width"
        if self.perturbation == "noise":
            noise = torch.randn((1, *images.shape[1:]), generator=generator, dtype=images.dtype).to(images.device)
            fill = images.mean((2, 3), keepdim=True) + _NOISE * noise
        else:
            levels = pyramid(images, self.perturbation, _WIDTHS if width_varies else 2, max_blur=blur, renormalize=True)
            fill = levels[:, 0]
        rows = upsampling_matrix(cells[0], height, smoothing, images.dtype).to(images.device)
        columns = upsampling_matrix(cells[1], width, smoothing, images.dtype).to(images.device).T.contiguous()
        offsets = torch.randint(0, max(1, self.jitter), (self.iterations, 2), generator=generator).tolist()
        deletes = self.game == "delete"

        def upsample(mask: Tensor) -> Tensor:
            return rows @ mask @ columns

        def blended(mask: Tensor, which: Tensor, offset: list[int]) -> Tensor:
            if width_varies:
                moved = shift(levels, *offset) if any(offset) else levels
                return Perturbation(moved).apply(upsample(mask).clamp(0, 1), which)
            shown, behind = (shift(t[which], *offset) if any(offset) else t[which] for t in (images, fill))
            return torch.addcmul(behind, upsample(mask).unsqueeze(1), shown - behind)

        with torch.no_grad():
            whole = self.explanandum.probabilities(self.explanandum(images))
            chosen = whole.topk(self.top, dim=1).indices if self.top else class_index[:, None]
            original = whole.gather(1, chosen).sum(1)

        def score(mask: Tensor, which: Tensor, offset: list[int]) -> Tensor:
            logits = self.explanandum(blended(mask, which, offset))
            found: Tensor = self.explanandum.probabilities(logits).gather(1, chosen[which]).sum(1)
            return found

        def objective(mask: Tensor, which: Tensor, t: int) -> tuple[Tensor, dict[str, Tensor]]:
            probability = score(mask, which, offsets[t])
            evidence = 1 - mask if deletes else mask
            cost = self.l1 * evidence.flatten(1).sum(1) + self.l2 * variation(mask, self.beta)
            gain = -cost - probability if deletes else probability - cost
            return gain, {"objective": gain, "score": probability, "area": evidence.flatten(1).mean(1)}

        with torch.no_grad():
            start = self._start(images, class_index, init, cells, lambda mask, which: score(mask, which, [0, 0]))
        found = maximize(start, objective, Ascent("adam", lambda _: self.rate), self.iterations, self.limits)
        self.history = found.history
        with torch.no_grad():
            every = torch.arange(len(images), device=images.device)
            final = score(found.parameters, every, [0, 0])
            kept = upsample(found.parameters)
        maps, parameters = (1 - kept, 1 - found.parameters) if deletes else (kept, found.parameters)
        return MeaningfulMasks(maps.clamp(0, 1), final, original, parameters, found.iterations, found.history)

    def cells(self, images: Tensor) -> tuple[int, int]:
        """Grid size ``(h, w)`` for these images."""
        height, width = images.shape[-2:]
        short = min(height, width)
        number = min(self.grid, short)
        return max(1, round(number * height / short)), max(1, round(number * width / short))

    def _start(
        self, images: Tensor, class_index: Tensor, init: Start | None, cells: tuple[int, int], score: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Start masks ``[B,h,w]`` (1 keeps)."""
        given = self.init if init is None else init
        if isinstance(given, str):
            return self._disc(images, cells, score)
        if callable(given) and not isinstance(given, Tensor):
            given = given(images, class_index)
        if not isinstance(given, Tensor):
            evidence = images.new_full((len(images), *cells), float(given))
        else:
            evidence = given.detach().to(images)
            evidence = evidence[None] if evidence.ndim == 2 else evidence
            evidence = evidence.squeeze(1) if evidence.ndim == 4 and evidence.shape[1] == 1 else evidence
            sizes = {cells, (images.shape[-2], images.shape[-1])}
            if evidence.ndim != 3 or evidence.shape[0] not in (1, len(images)) or tuple(evidence.shape[1:]) not in sizes:
                raise ShapeError(
                    f"init must be [B,h,w] with B={len(images)} and h,w = {cells} (grid) or {tuple(images.shape[-2:])} (maps), "
                    f"received {tuple(given.shape)}."
                )
            evidence = F.adaptive_avg_pool2d(evidence, cells).expand(len(images), *cells)
        return 1 - evidence if self.game == "delete" else evidence

    def _disc(self, images: Tensor, cells: tuple[int, int], score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The smallest centred disc with 99 % of the effect of treating the whole image (section 4.3); the whole image if none has it."""
        count = len(images)
        discs = centred_discs(*cells, _RADII, images.dtype, images.device)
        treated = 1 - discs if self.game == "delete" else discs
        bounds = torch.stack([torch.zeros_like(discs[0]), torch.ones_like(discs[0])])
        tried = torch.cat([treated, bounds])
        masks = tried.repeat(count, 1, 1)
        which = torch.arange(count, device=images.device).repeat_interleave(len(tried))
        size = self.limits.rows_per_pass or max(count, 32)
        values = torch.cat([score(m, w) for m, w in zip(masks.split(size), which.split(size), strict=True)]).view(count, -1)
        hidden, shown = values[:, -2:-1], values[:, -1:]
        reached = values[:, :_RADII]
        if self.game == "delete":
            enough = reached <= shown - 0.99 * (shown - hidden)
        else:
            enough = reached >= hidden + 0.99 * (shown - hidden)
        first = torch.where(enough.any(1), enough.to(torch.uint8).argmax(1), _RADII - 1)
        return treated[first]
