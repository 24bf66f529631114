"""Buying quality per image: the Explainer's mask starts an iterative method, or takes over the image's own borders."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from explainer import baselines
from explainer.attribution import check_class_index, check_images
from explainer.baselines.extremal_perturbation import ExtremalPerturbation
from explainer.baselines.kernels.maps import guided_filter
from explainer.baselines.kernels.smooth_mask import parameters_of_area
from explainer.errors import ConfigError, ShapeError
from explainer.fills import FillKind, blend, make_fill
from explainer.vocabulary import SEARCHES, RefineMethod

_AREAS = (0.025, 0.05, 0.1, 0.2, 0.4, 0.6)


@dataclass(frozen=True)
class Quality:
    """What a mask does to the classifier, from one pass of two images per mask.

    Attributes:
        kept: ``[N]`` probability of the class when only the mask is shown.
        left: ``[N]`` probability of the class when the mask is removed.
    """

    kept: Tensor
    left: Tensor

    @property
    def score(self) -> Tensor:
        """``kept - left``, ``[N]`` in [-1,1]; 1 is a mask that holds all the evidence and leaves none."""
        return self.kept - self.left


@torch.no_grad()
def quality(
    explanandum: Any, images: Tensor, masks: Tensor, class_index: Tensor, *, fill: FillKind = "mean", batch_size: int = 64
) -> Quality:
    """Quality of one mask per image.

    Args:
        explanandum: the classifier; scores are enough.
        images: ``[N,3,H,W]``.
        masks: ``[N,H,W]`` in [0,1].
        class_index: ``[N]``.
        fill: what replaces removed pixels; the one the Explainer was trained with.
        batch_size: most pictures in one pass; each image is two of them, behind its mask and behind the inverse.
    """
    kept, left = [], []
    for part in torch.arange(len(images), device=images.device).split(max(1, batch_size // 2)):
        x, m = images[part], masks[part].to(images)
        hidden = make_fill(x, fill, mean=explanandum.mean, generator=torch.Generator().manual_seed(0))
        both = explanandum(torch.cat([blend(x, m, hidden), blend(x, 1 - m, hidden)]))
        p = explanandum.probabilities(both).gather(1, class_index[part].repeat(2)[:, None]).squeeze(1)
        kept.append(p[: len(part)])
        left.append(p[len(part) :])
    return Quality(torch.cat(kept), torch.cat(left))


@dataclass(frozen=True)
class Refined:
    """Masks before and after.

    Attributes:
        masks: ``[B,H,W]`` in [0,1]; the start where the new mask was worse by more than the tolerance.
        start: ``[B,H,W]`` the Explainer's.
        before, after: quality of ``start`` and ``masks``.
        improved: ``[B]`` bool, the new mask was kept.
        seconds: duration of the whole refinement.
    """

    masks: Tensor
    start: Tensor
    before: Quality
    after: Quality
    improved: Tensor
    seconds: float


def refine(
    net: Any,
    explanandum: Any,
    images: Tensor,
    classes: Tensor | int | list[int],
    method: RefineMethod = "extremal_perturbation",
    *,
    iterations: int = 24,
    budget_s: float | None = None,
    start: Tensor | None = None,
    keep_better: bool = True,
    fill: FillKind = "mean",
    tolerance: float | None = None,
    **options: Any,
) -> Refined:
    """Improve the Explainer's masks of one class per image.

    ``extremal_perturbation`` searches the mask of (about) the start's own area that keeps the most; images whose areas round to the same
    of 0.025 ... 0.6 are searched together. ``igos_pp`` deletes and inserts. Both need gradients through the classifier. ``guided_filter``
    searches nothing: the mask, through :func:`~explainer.baselines.kernels.maps.guided_filter` with radius 0.125 and eps
    1e-4, is cut at one half.
    It needs scores only, and 4 ms a mask at 64 pixels or 0.1 s at 224 on one thread, besides the passes that judge it.

    Args:
        net: Explainer, images -> class masks ``[B,K,H,W]``; unused if ``start`` is given.
        explanandum: the classifier.
        images: ``[B,3,H,W]`` in [0,1].
        classes: one per image, or one for all.
        method: what refines.
        iterations: its iterations (of a search).
        budget_s: seconds in all, or None, of a search. At least one iteration per group of images is made.
        start: masks ``[B,H,W]`` in [0,1] to begin with instead of the net's.
        keep_better: keep the start where :func:`quality` says that it was better, by more than ``tolerance``.
        fill: fill by which that is judged.
        tolerance: how much of that score the new mask may lose and still be kept. None: 0 for a search, whose aim is the score; 0.05 for
            the filter, whose aim is borders.
        options: keyword options of the method (``areas=[a]`` fixes the area of extremal perturbations; ``radius``, ``eps`` of the guided
            filter).

    Raises:
        ConfigError: an unknown method or option of the filter, a negative tolerance; a search without gradients.
    """
    if method not in get_args(RefineMethod):
        raise ConfigError(f"refine method must be one of {', '.join(get_args(RefineMethod))}, received {method!r}.")
    check_method(method, explanandum)
    if tolerance is None:
        tolerance = 0.0 if method in SEARCHES else 0.05
    if tolerance < 0:
        raise ConfigError(f"tolerance must be at least 0 (of the score, which lies in [-1,1]), received {tolerance}.")
    if method == "guided_filter" and (unknown := set(options) - {"radius", "eps"}):
        raise ConfigError(f"refine: guided_filter has the options radius and eps, received {', '.join(sorted(unknown))}.")
    check_images(images)
    index = check_class_index(classes, images, explanandum.num_classes)
    began = time.monotonic()
    first = starting_masks(net, images, index) if start is None else start.to(images)
    if first.shape != (len(images), *images.shape[-2:]):
        raise ShapeError(f"start must be [B,H,W] = {(len(images), *images.shape[-2:])}, received {tuple(first.shape)}.")
    first = first.clamp(0, 1)
    if method == "igos_pp":
        attributor = baselines.build(method, explanandum, iterations=iterations, init=first, budget_s=budget_s, **options)
        found = attributor(images, index)
    elif method == "guided_filter":
        found = (guided_filter(first, images, **{"radius": 0.125, "eps": 1e-4, **options}) >= 0.5).to(first)
    else:
        found = _extremal(explanandum, images, index, first, iterations, budget_s, options)
    found = found.clamp(0, 1)
    before, after = (quality(explanandum, images, m, index, fill=fill) for m in (first, found))
    improved = after.score >= before.score - tolerance if keep_better else torch.ones(len(images), dtype=torch.bool, device=images.device)
    chosen = Quality(torch.where(improved, after.kept, before.kept), torch.where(improved, after.left, before.left))
    masks = torch.where(improved[:, None, None], found, first)
    return Refined(masks, first, before, chosen, improved, time.monotonic() - began)


def check_method(method: str, explanandum: Any) -> None:
    """A search needs gradients through the classifier; :class:`ConfigError` where there are none."""
    if method in SEARCHES and not explanandum.differentiable:
        raise ConfigError(
            f"{method} needs gradients, and this classifier gives scores only. Refine with guided_filter (explain --refine, calibrate "
            "--method), or not at all (calibrate --fallback abstain)."
        )


def starting_masks(net: Any, images: Tensor, class_index: Tensor) -> Tensor:
    """The Explainer's mask of each image's class, ``[B,H,W]``."""
    with torch.no_grad():
        masks: Tensor = net(images)[torch.arange(len(images), device=images.device), class_index].to(images)
        return masks


def _extremal(
    explanandum: Any, images: Tensor, index: Tensor, start: Tensor, iterations: int, budget_s: float | None, options: dict[str, Any]
) -> Tensor:
    """Extremal masks ``[B,H,W]`` from the start, area group by area group."""
    chosen: dict[str, Any] = {"schedule": "fast", **options}
    areas = chosen.pop("areas", None)
    groups = _groups(start, _AREAS if areas is None else areas)
    found = start.clone()
    began = time.monotonic()
    for number, (area, rows) in enumerate(groups):
        # What is left of the budget is shared evenly between the groups that are left.
        rest = None if budget_s is None else max(0.0, budget_s - (time.monotonic() - began)) / (len(groups) - number)
        search: Any = baselines.build("extremal_perturbation", explanandum, areas=[area], iterations=iterations, budget_s=rest, **chosen)
        begin = extremal_start(search, images[rows], start[rows])
        found[rows] = search.masks(images[rows], index[rows], init=begin).masks[:, 0]
    return found


@torch.no_grad()
def extremal_start(search: ExtremalPerturbation, images: Tensor, masks: Tensor) -> Tensor:
    """Parameters ``[B,A,h,w]`` from which the search starts: the masks' order of pixels, with exactly the areas that are searched.

    The mask family widens what it is given, and the penalty on a wrong area outweighs the classifier's reward: from the masks as they
    are, the first iterations would only correct the area. The edges are steep, as the Explainer's are and as the penalty wants them: from
    a soft start a third of a search goes by before its objective is level with one from scratch (tests/benchmarks/bench_refinement.py).
    """
    family, areas = search.generator_for(images), search.areas
    inside = family.parameters_from(masks)
    wide = 2 * (max(inside.shape[-2:]) // 4) + 1
    score = (
        inside + 0.5 * F.avg_pool2d(inside[:, None], wide, 1, wide // 2, count_include_pad=False)[:, 0]
    )  # a flat mask shrinks from its rim
    score = score.repeat_interleave(len(areas), 0)
    found = parameters_of_area(family, score, areas * len(masks), on_margin=search.schedule.area_on == "margin", gain=4.0)
    start: Tensor = found.unflatten(0, (len(masks), len(areas)))
    return start


def _groups(masks: Tensor, areas: Sequence[float]) -> list[tuple[float, Tensor]]:
    """Rows by the candidate area that is nearest (by ratio) to their mask's."""
    candidates = masks.new_tensor(list(areas))
    own = masks.flatten(1).mean(dim=1).clamp(1e-4, 1)
    nearest = (own.log()[:, None] - candidates.log()).abs().argmin(dim=1)
    return [(float(areas[int(k)]), (nearest == k).nonzero()[:, 0]) for k in nearest.unique()]
