"""Extremal perturbations (Fong, Patrick and Vedaldi, Understanding Deep Networks via Extremal Perturbations and Smooth Masks, ICCV 2019).

For each area a, over smooth masks m (see :mod:`explainer.baselines.kernels.smooth_mask`):

    m_a = argmax_m  Phi(m (x) x) - lambda R_a(m)                                                    (eq. 2 and 3)

All areas, images and classes are searched in one batch.

**The start decides.** As published, every mask starts at all ones. All its values tie, and the order in which a sort breaks ties says
which pixels the area term removes first. That term's slope, 2 lambda / Z at each of Z pixels, exceeds the reward's wherever the evidence
in an area a is worth less than 2 lambda a logits (30 for 5 %, 120 for 20 %), so the mask ends where the sort put it. A planted disc of
5, 10 or 20 % worth one logit is missed altogether (intersection over union at most 0.01 under both published schedules). Without
``init`` the search therefore starts a little lower where the reward's gradient does not point, and the area is that of the image's part
of the mask: the same discs are found with 0.78 or more, by every schedule in every game.
``init="ones"`` is the published setting, number for number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from explainer.attribution import check_class_index, check_images
from explainer.baselines.kernels.base import Baseline
from explainer.baselines.kernels.extremal_channels import ChannelMasks, channel_masks
from explainer.baselines.kernels.extremal_game import Game, Reward, Schedule, ScheduleName, class_reward, game_reward, make_schedule
from explainer.baselines.kernels.extremal_masks import ExtremalMasks, smallest_sufficient
from explainer.baselines.kernels.hooks import find_layer, untouched
from explainer.baselines.kernels.mask_search import Found, History, Limits, maximize
from explainer.baselines.kernels.perturbation import Perturbation, PerturbationKind, imsmooth, pyramid
from explainer.baselines.kernels.smooth_mask import (
    AreaReduction,
    KernelProfile,
    SmoothMask,
    area_penalty,
    checked_areas,
    excluded,
    parameters_of_area,
)
from explainer.errors import ConfigError, ShapeError

_STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)  # uniform masks at which the informed start reads the reward's gradient
_SMOOTH = 1.5  # its smoothing, in grid cells
_INFORMED = 0.1  # how far below 1 it starts where that gradient does not point

Start = Tensor | float | Callable[[Tensor, Tensor], Tensor] | Literal["informed", "ones"] | None


class ExtremalPerturbation(Baseline):
    """Masks of fixed area that keep, or destroy, a class score the most.

    Called as an attributor it returns one map an image, made as ``output`` says; :meth:`masks` returns the masks of all areas.

    Args:
        explanandum: the classifier.
        areas: fractions of the image in (0,1) (with ``layer``: fractions of the channels, or numbers of channels >= 1).
        game: ``preserve`` (keep the evidence), ``delete`` (remove it) or ``hybrid`` (both at once, two passes a step).
        reward: ``simple`` (the logit) or ``contrastive`` (the logit minus the best other one).
        perturbation: ``blur`` or ``fade`` (the paper's), ``constant`` (mean colour), ``noise``.
        iterations: length of the schedule; with ``schedule=None`` the published schedule cut or stretched to it.
        init: start of the search. ``informed`` (what None means): all ones, less 0.1 outside the area to which the reward's gradient
            points. ``ones``: the published start (see the module). Or parameters ``[B,h,w]``, ``[B,A,h,w]`` or ``[h,w]``, full-size masks
            of the same ranks, one number, or a callable (images, class_index) -> masks ``[B,H,W]``.
        jitter: flip the image and its mask horizontally on even iterations.
        schedule: ``paper``, ``code`` or ``fast`` (see :func:`~explainer.baselines.kernels.extremal_game.make_schedule`). None: ``fast``, or
            ``code`` where ``iterations`` is given.
        profile: kernel ``code`` or ``paper``; None: the schedule's.
        step, sigma: grid step and kernel scale in pixels. None: 7 and 3 steps; ``fast`` takes 1/32 of the shorter side as its step.
        levels: strengths in the perturbation pyramid.
        max_blur: strongest blur in pixels. None: 20; ``fast`` takes 20/224 of the shorter side.
        origin: colour that ``fade`` tends to and that surrounds a blurred image: ``black``, ``mean`` (the classifier's mean colour, as
            when perturbing normalised images) or a number.
        renormalize: blur divided by the part of its window inside the image; None: the schedule's.
        area_on: the area is imposed on the mask with its ``margin`` or on the ``image`` alone. None: ``image``; with ``init`` the
            schedule's (``code``: ``margin``, which lets a mask of 5 % cover 6.7 % of the image).
        area_reduction: the area term as a ``mean`` over pixels (the public code's, to which the published weights belong) or as the paper's
            ``sum``, with which the same weight counts Z times as much for Z pixels.
        output: the map that the attributor returns: ``smallest``: m_a*, the mask of the smallest area that keeps ``tau`` times the image's
            logit (eq. 5), the largest area's where none does; ``sum`` of the masks of all areas, for the pointing game; one of ``areas``:
            its mask; or ``all`` masks, ``[B,A,H,W]`` (of several classes ``[B,K,A,H,W]``), from Python.
        tau: share of the image's logit that suffices for ``output="smallest"``.
        clamp_gradient: whether gradient flows where the mask is exactly 0 or 1; see
            :class:`~explainer.baselines.kernels.smooth_mask.SmoothMask`.
        smooth: Gaussian smoothing of the output, sigma as a fraction of the shorter side (0.09 for the pointing game); 0: none. With
            ``output="smallest"`` the masks are smoothed before they are tested.
        layer: mask the channels of this module's output instead of the image's pixels (section 5).
        max_iterations, budget_s, tolerance, patience, rows_per_pass: when the search stops, and how many rows share a pass; see
            :class:`~explainer.baselines.kernels.mask_search.Limits`; ``tolerance=None`` takes the schedule's, 0 drops no mask early.

    Attributes:
        history: values of the last search, step by step; rows are ordered image by image, and within an image area by area.
    """

    name = "extremal_perturbation"
    passes = "iterations x areas x (forward + backward), less for converged masks"
    classes_share_work = True
    revision = 4  # one mask, m_a*, where no output is asked for; 3: the paper's kernel and ties that share the area's step in `fast`

    def __init__(
        self,
        explanandum: Any,
        areas: Sequence[float] = (0.025, 0.05, 0.1, 0.2),
        *,
        game: Game = "preserve",
        reward: Reward = "simple",
        perturbation: PerturbationKind = "blur",
        iterations: int | None = None,
        init: Start = None,
        jitter: bool = True,
        schedule: ScheduleName | None = None,
        profile: KernelProfile | None = None,
        step: int | None = None,
        sigma: int | None = None,
        levels: int = 8,
        max_blur: float | None = None,
        origin: Literal["black", "mean"] | float = "black",
        renormalize: bool | None = None,
        area_on: Literal["margin", "image"] | None = None,
        area_reduction: AreaReduction = "mean",
        output: Literal["smallest", "sum", "all"] | float = "smallest",
        tau: float = 1.0,
        clamp_gradient: Literal["pass", "block"] = "pass",
        smooth: float = 0.0,
        layer: str | None = None,
        max_iterations: int | None = None,
        budget_s: float | None = None,
        tolerance: float | None = None,
        patience: int = 10,
        rows_per_pass: int | None = None,
    ) -> None:
        super().__init__(explanandum)
        for option, value, known in (
            ("game", game, Game),
            ("reward", reward, Reward),
            ("perturbation", perturbation, PerturbationKind),
            ("area_reduction", area_reduction, AreaReduction),
        ):
            if value not in get_args(known):
                raise ConfigError(f"{option} must be one of {', '.join(get_args(known))}, received {value!r}.")
        if reward == "contrastive" and self.num_classes < 2:
            raise ConfigError("reward='contrastive' compares a class with the others and there is one class: use reward='simple'.")
        if area_on not in (None, "margin", "image"):
            raise ConfigError(f"area_on must be 'margin' or 'image', received {area_on!r}.")
        if isinstance(origin, str) and origin not in ("black", "mean"):
            raise ConfigError(f"origin must be 'black', 'mean' or a number, received {origin!r}.")
        if isinstance(init, str) and init not in ("informed", "ones"):
            raise ConfigError(f"init must be 'informed', 'ones', a number, a tensor or a callable, received {init!r}.")
        if smooth < 0:
            raise ConfigError(f"smooth must not be negative, received {smooth}.")
        self.areas = checked_areas(areas, channels=layer is not None)
        if output not in ("smallest", "sum", "all", *self.areas):
            raise ConfigError(f"output must be 'smallest', 'sum', 'all' or one of the areas {list(self.areas)}, received {output!r}.")
        if output == "all":
            self.map_axes = (len(self.areas),)
        if layer is not None:
            find_layer(explanandum.classifier, layer)
        self.output, self.tau, self.area_reduction = output, tau, area_reduction
        self.game, self.reward, self.perturbation, self.init, self.jitter = game, reward, perturbation, init, jitter
        self.schedule_name: ScheduleName = schedule or ("fast" if iterations is None else "code")
        self.iterations = iterations
        chosen = make_schedule(self.schedule_name, iterations)
        informed = init is None or (isinstance(init, str) and init == "informed")
        self.schedule: Schedule = replace(
            chosen,
            profile=profile or chosen.profile,
            area_on=area_on or ("image" if informed else chosen.area_on),
            renormalize=chosen.renormalize if renormalize is None else renormalize,
            tolerance=chosen.tolerance if tolerance is None else tolerance,
        )
        self.step, self.sigma, self.levels, self.max_blur = step, sigma, levels, max_blur
        self.origin, self.clamp_gradient, self.smooth, self.layer = origin, clamp_gradient, smooth, layer
        self.limits = Limits(max_iterations, budget_s, self.schedule.tolerance or None, patience, rows_per_pass)
        self.history = History()

    def masks(
        self, images: Tensor, class_index: Tensor | int | list[int], *, init: Start = None, generator: torch.Generator | None = None
    ) -> ExtremalMasks:
        """The mask of each area.

        Args:
            images: ``[B,3,H,W]`` in [0,1].
            class_index: class per image, ``[B]`` or one int for all.
            init: overrides the constructor's ``init``.
            generator: source of ``perturbation='noise'``; None: seed 0.
        """
        if self.layer is not None:
            raise ConfigError("masks() makes pixel masks and layer= asks for channel masks: call channel_masks(), or leave layer= out.")
        check_images(images)
        index = check_class_index(class_index, images, self.num_classes)
        with untouched(self.explanandum):
            return self._search(images, torch.arange(len(images), device=images.device), index, init, generator)

    def channel_masks(self, images: Tensor, class_index: Tensor | int | list[int]) -> ChannelMasks:
        """Masks over the channels of ``layer`` (section 5), with their saliency maps."""
        if self.layer is None:
            raise ConfigError("channel_masks() needs a layer: pass layer= (a module path) to the constructor.")
        check_images(images)
        index = check_class_index(class_index, images, self.num_classes)
        with untouched(self.explanandum):
            rules: dict[str, Any] = {"game": self.game, "reward": self.reward, "iterations": self.iterations or 300, "limits": self.limits}
            found = channel_masks(self.explanandum, self.layer, images, index, self.areas, **rules)
        self.history = found.history
        return found

    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        if self.layer is not None:
            found = self.channel_masks(images, class_index)
            maps = self._choose(found.saliency, found.preserved, found.original, tuple(map(float, found.kept)))
            full = F.interpolate(maps.flatten(0, -3)[:, None], images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
            return self._smoothed(full).view(*maps.shape[:-2], *images.shape[-2:])
        return self._output(self._search(images, torch.arange(len(images), device=images.device), class_index, None, generator))

    def all_classes(
        self, images: Tensor, classes: list[int] | None = None, *, generator: torch.Generator | None = None, masks: Tensor | None = None
    ) -> Tensor:
        """Maps of several classes ``[B,len(classes),H,W]``: images, classes and areas form one batch."""
        if self.layer is not None:
            return super().all_classes(images, classes, generator=generator, masks=masks)
        check_images(images)
        chosen = list(range(self.num_classes)) if classes is None else classes
        index = check_class_index(torch.tensor(chosen).repeat(len(images)), images.repeat_interleave(len(chosen), 0), self.num_classes)
        image = torch.arange(len(images), device=images.device).repeat_interleave(len(chosen))
        with untouched(self.explanandum):
            found = self._search(images, image, index, None, generator)
        maps: Tensor = self._output(found).unflatten(0, (len(images), len(chosen)))
        return maps

    def _output(self, found: ExtremalMasks) -> Tensor:
        """One map ``[B,H,W]`` of the masks of all areas, or all of them."""
        chosen = self._choose(found.masks, found.preserved, found.original, self.areas)
        return chosen if self.output == "smallest" else self._smoothed(chosen)  # these masks were smoothed before they were judged

    def _choose(self, maps: Tensor, preserved: Tensor, original: Tensor, sizes: tuple[float, ...]) -> Tensor:
        """``[B,A,h,w]`` -> ``[B,h,w]`` as ``output`` says (``all``: as they are). ``sizes``: the areas in one unit."""
        if self.output == "all":
            return maps
        if self.output == "sum":
            return maps.sum(1)
        if self.output != "smallest":
            return maps[:, self.areas.index(float(self.output))]
        found, _ = smallest_sufficient(preserved, original, sizes, self.tau)
        return maps[torch.arange(len(found), device=found.device), found]

    def _smoothed(self, maps: Tensor) -> Tensor:
        if self.smooth == 0:
            return maps
        flat = maps.flatten(0, -3).unsqueeze(1)
        return imsmooth(flat, self.smooth * min(maps.shape[-2:]), padding_mode="constant").view_as(maps)

    def generator_for(self, images: Tensor) -> SmoothMask:
        """The mask family for these images."""
        height, width = images.shape[-2:]
        step = self.step or (max(1, round(min(height, width) / 32)) if self.schedule.scaled else 7)
        return SmoothMask(
            height,
            width,
            step,
            self.sigma or 3 * step,
            profile=self.schedule.profile,
            clamp_gradient=self.clamp_gradient,
            dtype=images.dtype,
            device=images.device,
        )

    def _levels(self, images: Tensor, generator: torch.Generator | None) -> Perturbation:
        scale = min(images.shape[-2:]) / 224 if self.schedule.scaled else 1.0
        origin = {"black": 0.0, "mean": self.explanandum.mean}[self.origin] if isinstance(self.origin, str) else self.origin
        blur = 20.0 * scale if self.max_blur is None else self.max_blur
        generator = generator or torch.Generator().manual_seed(0)
        return Perturbation(
            pyramid(
                images,
                self.perturbation,
                self.levels,
                max_blur=blur,
                origin=origin,
                renormalize=self.schedule.renormalize,
                generator=generator,
            )
        )

    def _search(self, images: Tensor, image: Tensor, class_index: Tensor, init: Start, generator: torch.Generator | None) -> ExtremalMasks:
        """P pairs of (image, class) times A areas, one row each."""
        pairs, number = len(image), len(self.areas)
        family, shown = self.generator_for(images), self._levels(images, generator)
        row_image, row_class = image.repeat_interleave(number), class_index.repeat_interleave(number)
        size = family.padded if self.schedule.area_on == "margin" else (family.height, family.width)
        zeros = excluded(size[0] * size[1], self.areas * pairs, images.device)

        def classify(mask: Tensor, rows: Tensor, flip: bool) -> Tensor:
            seen = shown.apply(mask, row_image[rows])
            logits: Tensor = self.explanandum(seen.flip(-1) if flip else seen)
            return logits

        def objective(parameters: Tensor, rows: Tensor, t: int) -> tuple[Tensor, dict[str, Tensor]]:
            full = family.padded_masks(parameters)
            mask = family.crop(full)
            flip = self.jitter and t % 2 == 0
            gain = game_reward(partial(classify, flip=flip), mask, rows, row_class[rows], game=self.game, reward=self.reward)
            covered = full if self.schedule.area_on == "margin" else mask
            penalty = area_penalty(covered, zeros[rows], self.area_reduction, self.schedule.ties(t))
            return gain - self.schedule.weight(t) * penalty, {"reward": gain, "area": penalty}

        init = self.init if init is None else init
        if init is None or (isinstance(init, str) and init == "informed"):
            start = self._informed_start(family, classify, row_class, pairs)
        else:
            start = self._start(images, image, class_index, init, family)
        found = maximize(start, objective, self.schedule.ascent, self.schedule.iterations, self.limits)
        self.history = found.history
        return self._judge(found, family, classify, images, image, class_index)

    @torch.no_grad()
    def _judge(
        self, found: Found, family: SmoothMask, classify: Callable[..., Tensor], images: Tensor, image: Tensor, class_index: Tensor
    ) -> ExtremalMasks:
        """Score the masks on the unflipped images."""
        number = len(self.areas)
        mask = family(found.parameters)
        if self.output == "smallest":
            mask = self._smoothed(mask)
        rows = torch.arange(len(mask), device=mask.device)
        chunks = rows.split(self.limits.rows_per_pass or len(rows))
        row_class = class_index.repeat_interleave(number)
        seen = torch.cat([classify(mask[r], r, False) for r in chunks])
        kept = gain = class_reward(seen, row_class, self.reward)
        if self.game != "preserve":
            dropped = torch.cat([class_reward(classify(1 - mask[r], r, False), row_class[r], self.reward) for r in chunks])
            gain = -dropped if self.game == "delete" else kept - dropped
        original = class_reward(self.explanandum(images)[image], class_index)
        shape = (len(image), number)
        return ExtremalMasks(
            mask.unflatten(0, shape),
            gain.view(shape),
            class_reward(seen, row_class).view(shape),
            original,
            self.areas,
            found.parameters.unflatten(0, shape),
            found.iterations.view(shape),
            found.history,
        )

    def _informed_start(self, family: SmoothMask, classify: Callable[..., Tensor], row_class: Tensor, pairs: int) -> Tensor:
        """All ones, a little less outside each area that the reward's gradient prefers (summed over uniform masks of several
        strengths and smoothed): ``[P*A,h,w]``.

        All areas share the passes: one row per pair and strength.
        """
        number = len(self.areas)
        rows = torch.arange(0, pairs * number, number, device=row_class.device)
        slope = torch.zeros(pairs, *family.grid, dtype=family.dtype, device=row_class.device)
        for strength in _STRENGTHS:
            for flip in (False, True) if self.jitter else (False,):
                for part in rows.split(self.limits.rows_per_pass or len(rows)):
                    level = torch.full((len(part), *family.grid), strength, dtype=family.dtype, device=part.device).requires_grad_()
                    with torch.enable_grad():
                        mask = family(level)
                        gain = game_reward(partial(classify, flip=flip), mask, part, row_class[part], game=self.game, reward=self.reward)
                        slope[part // number] += torch.autograd.grad(gain.sum(), level)[0]
        smooth = imsmooth(slope[:, None], _SMOOTH, renormalize=True)[:, 0].repeat_interleave(number, 0)
        with torch.no_grad():
            pointed = parameters_of_area(family, smooth, self.areas * pairs, on_margin=self.schedule.area_on == "margin")
            return 1 - _INFORMED * (1 - pointed)

    def _start(self, images: Tensor, image: Tensor, class_index: Tensor, init: Start, family: SmoothMask) -> Tensor:
        """Start parameters ``[P*A,h,w]``."""
        pairs, number = len(image), len(self.areas)
        if isinstance(init, str) or init is None:  # "ones"
            init = 1.0
        if callable(init) and not isinstance(init, Tensor):
            init = init(images[image], class_index)
        if not isinstance(init, Tensor):
            return images.new_full((pairs * number, *family.grid), float(init))
        given = init.detach().to(images)
        if given.ndim == 2:
            given = given[None]
        if given.ndim == 4 and tuple(given.shape[:2]) == (number, 1) and len(images) == 1:
            given = given.transpose(0, 1)  # one image, areas first: the public code's shape
        if given.ndim == 3:
            given = given[:, None]
        size = tuple(given.shape[-2:])
        known = {family.grid, (family.height, family.width)}
        if given.ndim != 4 or size not in known or given.shape[0] not in (1, len(images), pairs) or given.shape[1] not in (1, number):
            raise ShapeError(
                f"init must be [B,h,w] or [B,A,h,w] with B={len(images)}, A={number} and h,w = {family.grid} (parameters) or "
                f"{(family.height, family.width)} (masks), received {tuple(init.shape)}."
            )
        if given.shape[0] == len(images):
            given = given[image]
        given = given.expand(pairs, number, *size).flatten(0, 1)
        return given if size == family.grid else family.parameters_from(given)
