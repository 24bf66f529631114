"""What an extremal mask is rewarded for, and how long and hard it is searched (Fong, Patrick and Vedaldi, ICCV 2019)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from explainer.baselines.kernels.mask_search import Ascent
from explainer.errors import ConfigError

Game = Literal["preserve", "delete", "hybrid"]
Reward = Literal["simple", "contrastive"]
ScheduleName = Literal["paper", "code", "fast"]


def class_reward(logits: Tensor, class_index: Tensor, reward: Reward = "simple") -> Tensor:
    """``simple``: the class's logit; ``contrastive``: the same minus the largest other logit.

    Args:
        logits: ``[n,K]``.
        class_index: ``[n]`` long.

    Returns:
        ``[n]``.
    """
    score = logits.gather(1, class_index[:, None])
    if reward == "simple":
        return score.squeeze(1)
    others = logits.scatter(1, class_index[:, None], -torch.inf)
    return (score - others.max(dim=1, keepdim=True).values).squeeze(1)


def game_reward(
    classify: Callable[[Tensor, Tensor], Tensor], mask: Tensor, rows: Tensor, class_index: Tensor, *, game: Game, reward: Reward
) -> Tensor:
    """Reward of each mask, ``[n]``, from one call of the classifier.

    ``preserve`` Phi(m x), ``delete`` -Phi((1-m) x), ``hybrid`` Phi(m x) - Phi((1-m) x).

    Args:
        classify: (masks ``[n,...]``, row of each ``[n]``) -> logits ``[n,K]``.
        mask: ``[n,...]`` in [0,1].
        rows: ``[n]``, handed on to ``classify``.
        class_index: ``[n]``, class of each mask.
    """
    if game == "preserve":
        return class_reward(classify(mask, rows), class_index, reward)
    if game == "delete":
        return -class_reward(classify(1 - mask, rows), class_index, reward)
    both = class_reward(classify(torch.cat([mask, 1 - mask]), rows.repeat(2)), class_index.repeat(2), reward)
    return both[: len(mask)] - both[len(mask) :]


@dataclass(frozen=True)
class Schedule:
    """Length, step rule and area weight of a search.

    Attributes:
        iterations: its length.
        ascent: the step rule.
        weight: weight of the area penalty at iteration t.
        tolerance: mean parameter change over a few iterations below which a mask has converged; None: masks stay to the end.
        profile, area_on, renormalize: the kernel profile, where the area is imposed, and whether blur is renormalised at the border,
            unless the caller chooses them.
        scaled: distances in pixels (step, sigma, blur) follow the image's size instead of the constants published for 224 pixels.
        ties: width within which values of a mask share the area term's step at iteration t (``width`` of
            :func:`~explainer.baselines.kernels.smooth_mask.area_penalty`); 0: the published step.
    """

    iterations: int
    ascent: Ascent
    weight: Callable[[int], float]
    tolerance: float | None = None
    profile: Literal["code", "paper"] = "code"
    area_on: Literal["margin", "image"] = "margin"
    renormalize: bool = False
    scaled: bool = False
    ties: Callable[[int], float] = lambda _: 0.0


def make_schedule(name: ScheduleName, iterations: int | None = None) -> Schedule:
    """The schedule called ``name``, stretched or cut to ``iterations``.

    - ``code``: 800 steps of SGD (rate 0.01, momentum and dampening 0.9), the weight growing from 300 by 1.0035 a step.
    - ``paper``: 1600 steps of SGD (rate 0.01, momentum 0.9), weight 300, doubled after each third; the paper's kernel profile, the area
      imposed on the image alone, blur renormalised at the border.
    - ``fast``: 80 steps of Adam with one scale a mask (``shared``), the rate falling from 0.05 along a half cosine, the weight growing
      geometrically from 300 to 1800, converged masks leaving the batch; the paper's kernel profile, the area imposed on the image alone,
      its step shared by values within 0.06, in the end 0.006, of each other: the order in which a sort puts ties has no say.

    ``area_on`` is what was published; :class:`~explainer.baselines.extremal_perturbation.ExtremalPerturbation` says when it applies.
    """
    if name not in get_args(ScheduleName):
        raise ConfigError(f"schedule must be one of {', '.join(get_args(ScheduleName))}, received {name!r}.")
    if iterations is not None and iterations < 1:
        raise ConfigError(f"iterations must be at least 1, received {iterations}.")
    if name == "code":
        return Schedule(iterations or 800, Ascent("sgd", lambda _: 0.01, 0.9, 0.9), lambda t: 300 * 1.0035**t)
    if name == "paper":
        length = iterations or 1600
        return Schedule(
            length,
            Ascent("sgd", lambda _: 0.01, 0.9),
            lambda t: 300.0 * 2 ** ((3 * t) // length),
            profile="paper",
            area_on="image",
            renormalize=True,
        )
    length = iterations or 80
    return Schedule(
        length,
        Ascent("adam", lambda t: 0.05 * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * t / length))), shared=True),
        lambda t: 300 * 6 ** (t / length),
        tolerance=2e-4,
        profile="paper",
        scaled=True,
        area_on="image",
        ties=lambda t: 0.06 * 0.1 ** (t / length),
    )
