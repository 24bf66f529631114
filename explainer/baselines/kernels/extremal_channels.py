"""Channel attribution: extremal masks over the channels of an intermediate activation (Fong, Patrick and Vedaldi 2019, section 5).

The same objective as over pixels, with m in [0,1]^C multiplying the activation; saliency of a mask: sum_k m_k Phi_l^k(x).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from explainer.attribution.layouts import layout_of
from explainer.attribution.watching import out_of_place
from explainer.baselines.kernels.extremal_game import Game, Reward, class_reward, game_reward
from explainer.baselines.kernels.hooks import find_layer
from explainer.baselines.kernels.mask_search import Ascent, History, Limits, maximize
from explainer.baselines.kernels.smooth_mask import area_penalty
from explainer.errors import ConfigError

_TIE_BREAK = 0.01  # how far below 1 the mask of the least useful channel starts


@dataclass(frozen=True)
class ChannelMasks:
    """Channel masks of several areas.

    Attributes:
        masks: ``[B,A,C]`` in [0,1].
        saliency: ``[B,A,h,w]`` at the layer's resolution.
        rewards, preserved: ``[B,A]`` as in :class:`~explainer.baselines.kernels.extremal_masks.ExtremalMasks`; ``original``: ``[B]``.
        kept: A numbers of channels that the masks keep.
        iterations: ``[B,A]``.
        history: ``reward`` and ``area`` per iteration, ``[T,B*A]``.
    """

    masks: Tensor
    saliency: Tensor
    rewards: Tensor
    preserved: Tensor
    original: Tensor
    kept: tuple[int, ...]
    iterations: Tensor
    history: History


@contextlib.contextmanager
def _masked_output(module: nn.Module, path: str, mask: Tensor, channels: int = 1) -> Iterator[list[Tensor]]:
    """Multiply the module's output, axis ``channels``, by ``mask`` ``[n,C]``; yields the list of outputs seen, before masking."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, __: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ConfigError(f"layer {path!r} returns {type(output).__name__}; expected a feature map [B,C,H,W]: name another layer.")
        if seen:
            raise ConfigError(
                f"layer {path!r} runs more than once in a forward pass: name a layer that runs once, e.g. the block around it."
            )
        seen.append(output)
        shape = [-1 if axis == channels else 1 for axis in range(1, output.ndim)]
        return output * mask.view(len(mask), *shape) if mask.numel() else output

    handle = module.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def channel_masks(
    explanandum: Any,
    layer: str,
    images: Tensor,
    class_index: Tensor,
    areas: Sequence[float],
    *,
    game: Game = "preserve",
    reward: Reward = "simple",
    iterations: int = 300,
    limits: Limits | None = None,
) -> ChannelMasks:
    """Search the channel masks of all images and areas in one batch.

    SGD with rate 0.01 and momentum 0.9 from all ones (less up to 0.01, the least where the reward's gradient is largest). The area's
    weight grows from 0 to 1500 over the first half of the iterations (the first 150 of 300).

    Args:
        layer: module path relative to the user's classifier; it must return a feature map (of any layout) once per forward pass. A channel
            is masked everywhere, prefix tokens included.
        images: ``[B,3,H,W]``.
        class_index: ``[B]``.
        areas: fractions of the channels in (0,1), or numbers of channels >= 1.

    Raises:
        ConfigError: the layer does not exist, returns no feature map, runs several times, or has fewer channels than asked for.
    """
    module = find_layer(explanandum.classifier, layer)
    with torch.no_grad(), _masked_output(module, layer, images.new_empty(0)) as seen:
        original = class_reward(explanandum(images), class_index)
    if not seen:
        raise ConfigError(f"layer {layer!r} does not run in the classifier's forward pass: name one that does.")
    layout = layout_of(explanandum, layer, module, shape=seen[0].shape, images=images)
    activation = layout.spatial(seen[0].detach().clone())
    channels = activation.shape[1]
    kept = tuple(int(a) if a >= 1 else max(1, round(a * channels)) for a in areas)
    if max(kept) > channels:
        raise ConfigError(f"areas ask for {max(kept)} channels and layer {layer!r} has {channels}: ask for fewer.")
    number = len(areas)
    row_image = torch.arange(len(images), device=images.device).repeat_interleave(number)
    row_class = class_index.repeat_interleave(number)
    zeros = torch.tensor([channels - k for k in kept], device=images.device).repeat(len(images))
    half = max(1, iterations // 2)

    def classify(mask: Tensor, rows: Tensor) -> Tensor:
        with _masked_output(module, layer, mask, layout.channels):
            logits: Tensor = explanandum(images[row_image[rows]])
            return logits

    def objective(mask: Tensor, rows: Tensor, t: int) -> tuple[Tensor, dict[str, Tensor]]:
        gain = game_reward(classify, mask, rows, row_class[rows], game=game, reward=reward)
        penalty = area_penalty(mask, zeros[rows])
        return gain - 1500 * min(1.0, t / half) * penalty, {"reward": gain, "area": penalty}

    def start() -> Tensor:
        """All ones, but with the ties broken that would let the area term drop channels in an arbitrary order."""
        ones = images.new_ones(len(row_image), channels).requires_grad_()
        rows = torch.arange(len(row_image), device=images.device)
        with torch.enable_grad():
            gain = game_reward(classify, ones, rows, row_class, game=game, reward=reward)
            (slope,) = torch.autograd.grad(gain.sum(), ones)
        least_first = slope.argsort(dim=1, stable=True).argsort(dim=1).to(ones)
        return 1 - _TIE_BREAK * (1 - least_first / channels)

    with out_of_place(explanandum.classifier):
        found = maximize(start(), objective, Ascent("sgd", lambda _: 0.01), iterations, limits)
        with torch.no_grad():
            rows = torch.arange(len(row_image), device=images.device)
            logits = classify(found.parameters, rows)
            preserved, rewards = class_reward(logits, row_class), class_reward(logits, row_class, reward)
            if game != "preserve":
                rewards = game_reward(classify, found.parameters, rows, row_class, game=game, reward=reward)
    shape = (len(images), number)
    masks = found.parameters.unflatten(0, shape)
    saliency = torch.einsum("bac,bchw->bahw", masks, activation)
    return ChannelMasks(
        masks, saliency, rewards.view(shape), preserved.view(shape), original, kept, found.iterations.view(shape), found.history
    )
