"""The last layer of a decoder on shared features: mask logits from embeddings, the classifier's head and its class activations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from explainer.attribution.shares import LEAST_LOG_PROBABILITY, class_shares, spread_over_similar
from explainer.errors import ConfigError
from explainer.models.class_layer import chosen_classes, per_image
from explainer.models.enlarging import resized
from explainer.models.guided import Guide, guided
from explainer.tensors import min_max

Start = Literal["activation", "competition", "foreground", "none"]

_APART: ContextVar[bool] = ContextVar("order_apart", default=False)


@contextmanager
def order_apart() -> Iterator[None]:
    """For training: inside, a :class:`ClassHead` with an order gives ``[B,2n,h,w]``, first s, as if there were no order, then the ordered
    logits, whose gradient reaches o alone.
    """
    token = _APART.set(True)
    try:
        yield
    finally:
        _APART.reset(token)


class ClassHead(nn.Module):
    """Embeddings -> mask logits, with filters that come from the classifier's head, and the class activation as a start.

    The logit of class k at a position is ``e . (U w_k + d_k) + b + gain * z_k + level * log p_k``: e the embedding, w_k the classifier's
    head weights of the class, U and d learned, z_k its class activation, spread over similar positions, with zero mean and unit variance in
    each image, after a guided filter with the image as its guide, p_k its probability. Other starts replace the class activation a_k by
    its share of the position, ``softmax_k(contrast * a_k / s + log p_k)`` with s the standard deviation of all activations of the image.
    Without a linear head only ``e . d_k + b + level * log p_k`` remains.

    With an ``order`` r > 0 the logit s decides where a mask ends, and a second one, ``o = c_k + f . (V w_k + q_k)``, which of the pixels
    inside or outside matter more: ``2 r tanh(s) + r tanh(o) tanh(s)^2``. Saturated pixels lie in (r, 3 r) or (-3 r, -r), and no pixel
    crosses 0.5. c_k is the class activation where it is positive (Grad-CAM of such a head), from -1 to 1 in each image; f are embeddings
    for the order alone; V and q begin at 0. s and o share no weights: trained with :func:`order_apart`, masks end where they would
    without an order.

    Args:
        num_classes: number of classes K.
        width: channels of the embeddings.
        weight: ``[K,C]`` head weights of the classifier, or None.
        start: ``activation``; ``competition``: the classes' shares, for images whose every pixel belongs to a class; ``foreground``: the
            shares times the mean of the position's features, scaled to [0,1] in each image, because what a network has learned to see
            activates more of them than a background does; ``none``. All but ``none`` need ``weight``, without it they are ``none``.
        level: what ``level`` begins with, at least 0. At 2 the mask of a class that the classifier gives 2 % is nearly empty from the
            start; the order of its pixels stays. It is trained like the rest.
        order: half the range of logits that pixels on one side of a mask's edge are ordered in, at least 0; 0: no order of its own.
    """

    def __init__(
        self,
        num_classes: int,
        width: int,
        weight: Tensor | None,
        *,
        start: Start = "activation",
        level: float = 0.5,
        order: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= order < math.inf:
            raise ConfigError(f"explainer.options.order must be a number of at least 0, received {order!r}.")
        if not 0 <= level < math.inf:
            raise ConfigError(f"explainer.options.level must be a number of at least 0, received {level!r}.")
        if start not in get_args(Start):
            raise ConfigError(f"explainer.options.start must be one of {', '.join(get_args(Start))}, received {start!r}.")
        self.start, self.order = start, float(order)
        self.own = nn.Parameter(torch.zeros(num_classes, width))
        self.bias = nn.Parameter(torch.tensor(-1.0))
        self.level = nn.Parameter(torch.tensor(float(level)))
        self.from_head = None if weight is None else nn.Linear(weight.shape[1], width, bias=False)
        self.gain = nn.Parameter(torch.tensor(2.0)) if start != "none" and weight is not None else None
        compete = self.gain is not None and start != "activation"
        self.contrast = nn.Parameter(torch.tensor(1.0)) if compete else None
        if self.from_head is not None and weight is not None:
            # unit-sized filters, whatever the size of the head's weights
            nn.init.normal_(self.from_head.weight, std=0.1 / float(weight.norm(dim=1).mean()))
        else:
            nn.init.normal_(self.own, std=0.1)
        if order > 0:
            self.rank_own = nn.Parameter(torch.zeros(num_classes, width))
            self.rank_from_head = None if weight is None else nn.Linear(weight.shape[1], width, bias=False)
            if self.rank_from_head is not None:
                nn.init.zeros_(self.rank_from_head.weight)

    def forward(
        self,
        embeddings: Tensor,
        deep: Tensor,
        log_p: Tensor,
        weight: Tensor | None,
        similar: Tensor,
        guide: Guide,
        for_order: Tensor | None = None,
    ) -> Tensor:
        """Mask logits at the embeddings' resolution.

        Args:
            embeddings: ``[B,width,h,w]``.
            deep: ``[B,C,h',w']``, the classifier's last feature map.
            log_p: ``[B,K]`` log-probabilities.
            weight: ``[K,C]`` head weights of the classifier, or None.
            similar: ``[B,P,h'',w'']``, see :func:`~explainer.attribution.shares.similarity`.
            guide: the images, for the guided filter.
            for_order: ``[B,width,u,v]``, the embeddings f; None without an order.

        Returns:
            ``[B,K,h,w]``, or ``[B,n,h,w]`` inside :func:`~explainer.models.class_layer.only_classes`; see :func:`order_apart`, too.
        """
        extent = self._extent(embeddings, deep, log_p, weight, similar, guide)
        if for_order is None:
            return extent
        rank = self._rank(for_order, deep, weight, extent.shape[-2:])
        if not _APART.get():
            return ordered(extent, rank, self.order)
        return torch.cat([extent, ordered(extent.detach(), rank, self.order)], dim=1)

    def _extent(self, embeddings: Tensor, deep: Tensor, log_p: Tensor, weight: Tensor | None, similar: Tensor, guide: Guide) -> Tensor:
        """The logit that decides where a mask ends."""
        chosen = chosen_classes()
        own: Tensor = self.own
        head, every_log_p = weight, log_p
        if chosen is not None:
            own, head = own[chosen], None if weight is None else weight[chosen]
            log_p = _columns(log_p, chosen)
        logits = _positions(embeddings, _filters(own, self.from_head, head), self.bias)
        level = self.level * log_p.clamp_min(LEAST_LOG_PROBABILITY)[..., None, None]
        if self.gain is None or head is None:
            return logits + level
        size = similar.shape[-2:]
        if self.contrast is None or weight is None:
            activation = _positions(deep, head)
        else:
            # Every class competes, also where the masks of few are asked for: one small convolution at the coarsest stage.
            activation = class_shares(_positions(deep, weight), every_log_p, self.contrast)
            activation = activation if chosen is None else _columns(activation, chosen)
            activation = activation * min_max(deep.mean(dim=1, keepdim=True)) if self.start == "foreground" else activation
        evidence = resized(_standard(spread_over_similar(resized(activation, size), similar)), guide.image.shape[-2:])
        # one map is enlarged, not two
        start = self.gain * guided(evidence, guide) + level
        return logits + resized(start, logits.shape[-2:])

    def _rank(self, for_order: Tensor, deep: Tensor, weight: Tensor | None, size: Sequence[int]) -> Tensor:
        """The logit that decides which pixels matter more."""
        chosen = chosen_classes()
        own: Tensor = self.rank_own if chosen is None else self.rank_own[chosen]
        head = weight if weight is None or chosen is None else weight[chosen]
        rank = resized(_positions(for_order, _filters(own, self.rank_from_head, head)), size)
        if head is None:
            return rank
        activation = _positions(deep, head).clamp_min(0)
        share = activation / activation.amax(dim=(2, 3), keepdim=True).clamp_min(1e-6)
        return rank + resized(2 * share - 1, size)


def ordered(extent: Tensor, rank: Tensor, order: float) -> Tensor:
    """``2 r tanh(s) + r tanh(o) tanh(s)^2``: the sign is that of s, and where s is saturated the order is that of o.

    Args:
        extent: s, of any shape.
        rank: o, of the same shape.
        order: r > 0.
    """
    side = extent.tanh()
    return order * side * (2 + rank.tanh() * side)


def _filters(own: Tensor, from_head: nn.Module | None, head: Tensor | None) -> Tensor:
    """Filters ``[n,width]`` or ``[B,n,width]``: the free part, and the projection of the classifier's head weights where there are some."""
    return own if from_head is None or head is None else own + from_head(head)


def _columns(values: Tensor, chosen: Tensor) -> Tensor:
    """``[B,K,...]`` of the chosen classes ``[n]``, or of each image's own ``[B,n]``."""
    if chosen.ndim == 1:
        return values[:, chosen]
    index = chosen.reshape(*chosen.shape, *[1] * (values.ndim - 2)).expand(*chosen.shape, *values.shape[2:])
    return values.gather(1, index)


def _standard(maps: Tensor) -> Tensor:
    """Zero mean and unit variance in each map ``[B,n,h,w]``; a flat map becomes 0."""
    rows = maps.flatten(2)
    standard: Tensor = F.layer_norm(rows, rows.shape[2:], eps=1e-6).unflatten(2, maps.shape[2:])
    return standard


def _positions(features: Tensor, filters: Tensor, bias: Tensor | None = None) -> Tensor:
    """1x1 convolution of ``[B,C,h,w]`` with ``[n,C]``, or with each image's own ``[B,n,C]``; one bias for all n."""
    each = None if bias is None else bias.expand(filters.shape[:-1])
    if filters.ndim == 2:
        return F.conv2d(features, filters[:, :, None, None], each)
    return per_image(features, filters[..., None, None], each)
