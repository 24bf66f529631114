"""Which sharing rule an operation has, by its name and arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from explainer.baselines.kernels.operations import ACTIVATIONS, DROPOUTS
from explainer.baselines.kernels.srd_rules import Add, AvgPool, Cat, Conv, MaxPool, Norm, Opaque, Pad, Pass, Rule, Source, aten


def pair(value: Any) -> tuple[int, int]:
    """An int or a sequence of one or two ints as (height, width)."""
    values = (value, value) if isinstance(value, int) else tuple(int(v) for v in value)
    return (values[0], values[-1])


def _conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Rule:
    stride, dilation = pair(stride), pair(dilation)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[-2:], strict=True)]
        if any(t % 2 for t in total):
            return Opaque("a convolution padded 'same' with an even kernel pads unevenly")
        padding = [t // 2 for t in total]
    return Conv(weight, bias, stride, pair(padding), dilation, groups)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Rule:
    if training or running_mean is None or running_var is None:
        return Opaque("normalisation by batch statistics is no fixed affine map")
    scale = (running_var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -scale * running_mean
    return Norm(scale, shift if bias is None else shift + bias)


def _avg_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Rule:
    kernel = pair(kernel_size)
    options = (kernel, pair(stride) if stride else kernel, pair(padding), ceil_mode, count_include_pad, divisor_override)
    return AvgPool(lambda u: F.avg_pool2d(u, *options), lambda g, u: aten.avg_pool2d_backward(g, u, *options))


def _adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Rule:
    return AvgPool(lambda u: F.adaptive_avg_pool2d(u, output_size), aten._adaptive_avg_pool2d_backward)


def _add(*tensors: Any, alpha: float = 1, input: Tensor | None = None, other: Any = None) -> Rule:
    addends = [t for t in (*tensors, input, other) if t is not None]
    if alpha != 1 or not all(isinstance(t, Tensor) for t in addends) or addends[0].shape != addends[-1].shape:
        return Opaque("only sums of two feature maps of equal shape can be shared")
    return Add()


def _cat(tensors: Any, dim: int = 0) -> Rule:
    return Cat() if dim == 1 else Opaque("only concatenation over channels can be shared")


def _pad(input: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Rule:
    return Opaque(f"padding mode {mode!r} with value {value}") if mode != "constant" or value else Pad(tuple(pad))


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, train: bool = False) -> Rule:
    return Opaque("dropout is active") if (training or train) and p > 0 else Pass()


RULES: dict[str, Callable[..., Rule]] = {
    "conv2d": _conv2d,
    "batch_norm": _batch_norm,
    "avg_pool2d": _avg_pool2d,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "add": _add,
    "cat": _cat,
    "concat": _cat,
    "pad": _pad,
    "contiguous": lambda *a, **k: Pass(),
    "clone": lambda *a, **k: Pass(),
    **dict.fromkeys(DROPOUTS, _dropout),
    **dict.fromkeys(ACTIVATIONS, lambda *a, **k: Source()),
}


def _max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Any, Rule]:
    kernel = pair(kernel_size)
    settings = (kernel, pair(stride) if stride else kernel, pair(padding), pair(dilation), ceil_mode)
    out, indices = F.max_pool2d_with_indices(input, *settings)
    return (out, indices) if return_indices else out, MaxPool(settings, indices)


def max_pool(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Rule]:
    """``F.max_pool2d(*args, **kwargs)``, run so that it says which inputs won, and its rule."""
    return _max_pool2d(*args, **kwargs)
