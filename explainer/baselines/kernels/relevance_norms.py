"""Norms over the features of one image (layer, group, RMS and L2 norm) as relevance passes through them.

Their ``1/std`` is taken as a constant (Ali et al., XAI for Transformers: Better Explanations through Conservative Propagation, ICML 2022;
Achtibat et al., AttnLRP, ICML 2024): what remains, ``y_j = w_j (x_j - mean x) / std + b_j``, is a linear map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from explainer.baselines.kernels.relevance_rules import stabilize


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Layer norm whose ``1/std`` is a constant."""
    axes = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(axes, keepdim=True)
    y = centred * (centred.detach().square().mean(axes, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """RMS norm whose ``1/rms`` is a constant."""
    axes = tuple(range(-len(normalized_shape), 0))
    floor = torch.finfo(input.dtype).eps if eps is None else eps
    y = input * (input.detach().square().mean(axes, keepdim=True) + floor).rsqrt()
    return y if weight is None else y * weight


def _group_norm(input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Group norm whose ``1/std`` is a constant."""
    groups = input.flatten(1).unflatten(1, (num_groups, -1))
    y = _layer_norm(groups, groups.shape[-1:], eps=eps).view_as(input)
    tail = (-1, *(1,) * (input.ndim - 2))
    y = y if weight is None else y * weight.view(tail)
    return y if bias is None else y + bias.view(tail)


def _normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Tensor:
    """Division by a norm that is a constant."""
    normalized: Tensor = input / torch.linalg.vector_norm(input.detach(), p, dim=dim, keepdim=True).clamp(min=eps)
    return normalized


NORMS: dict[str, Callable[..., Tensor]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "normalize": _normalize,
}


def share_norm(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], relevance: Tensor, epsilon: float) -> Tensor:
    """Relevance of a norm's input under the epsilon rule of its linear map, ``R_i = x_i sum_j dy_j/dx_i R_j / y_j``; the bias absorbs.

    Args:
        name: the norm's name, a key of :data:`NORMS`.
        args, kwargs: arguments of the call.
        relevance: relevance of its output.
        epsilon: stabiliser.
    """
    kwargs = dict(kwargs)
    x = (args[0] if args else kwargs.pop("input")).detach()
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        y = NORMS[name](leaf, *args[1:], **kwargs)
        (gradient,) = torch.autograd.grad(y, leaf, relevance / stabilize(y.detach(), epsilon))
    shared: Tensor = x * gradient
    return shared
