"""What torch's operations are called and what they do: the one table of every method that watches a classifier run.

A new activation is added here once and is then known to LRP and its kin, SRD, AGF, guided backpropagation and DeepLIFT-SHAP. All names are
plain: without the in-place mark and without dunders, as :func:`plain_name` gives them (``F.relu_``, ``Tensor.__iadd__`` -> relu, add).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

# ReLU and its bounded form: 0 below 0, the identity up to a bound.
BOUNDED = {"relu6": 6.0}
CLAMPS = frozenset({"clamp", "clip", "clamp_min"})
# The other functions that cut off or damp what is below 0.
RECTIFIERS = frozenset(
    {
        "leaky_relu",
        "rrelu",
        "prelu",
        "elu",
        "selu",
        "celu",
        "silu",
        "mish",
        "gelu",
        "hardtanh",
        "relu6",
        "hardswish",
        "softplus",
        "threshold",
    }
)
SQUASHING = frozenset({"tanh", "sigmoid", "hardsigmoid", "softsign", "logsigmoid"})
# One output per input, computed from it alone.
ACTIVATIONS = frozenset({"relu"}) | RECTIFIERS | SQUASHING
DROPOUTS = frozenset(
    {
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_dropout",
        "feature_alpha_dropout",
        "stochastic_depth",
    }
)
PRODUCTS = frozenset({"mul", "multiply", "rmul"})
QUOTIENTS = frozenset({"div", "divide", "true_divide", "truediv"})
# Maxima whose winners depend on the image.
MAXIMA = frozenset({"maximum", "max_pool1d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"})

# torch.nn.functional announces these under the names of what they call.
_ALIASES = {"_threshold": "threshold", "log_sigmoid": "logsigmoid"}
_REWRITTEN = ("add", "sub", "mul", "truediv", "div")
# One output per input: relevance passes (Bach et al. 2015). Dropout is off in eval mode.
POINTWISE = ACTIVATIONS | CLAMPS | DROPOUTS | {"neg", "negative"}
# Each output is a copy of one input: the true gradient routes relevance.
ROUTING = {
    "flatten",
    "reshape",
    "view",
    "view_as",
    "reshape_as",
    "permute",
    "transpose",
    "swapaxes",
    "movedim",
    "contiguous",
    "clone",
    "to",
    "type",
    "type_as",
    "float",
    "double",
    "half",
    "squeeze",
    "unsqueeze",
    "unflatten",
    "cat",
    "concat",
    "concatenate",
    "stack",
    "split",
    "chunk",
    "tensor_split",
    "unbind",
    "narrow",
    "select",
    "index_select",
    "getitem",
    "pad",
    "roll",
    "flip",
    "expand",
    "expand_as",
    "repeat",
    "pixel_shuffle",
    "pixel_unshuffle",
    "channel_shuffle",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "max_pool1d_with_indices",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "adaptive_max_pool2d_with_indices",
    "amax",
    "t",
}


def plain_name(raw: str) -> tuple[str, bool]:
    """Name without dunders and in-place mark, and whether the operation overwrites its first argument."""
    if raw.startswith("__") and raw.endswith("__"):
        core = raw[2:-2]
        return (core[1:], True) if core.startswith("i") and core[1:] in _REWRITTEN else (core, False)
    name, in_place = (raw[:-1], True) if raw.endswith("_") else (raw, False)
    return _ALIASES.get(name, name), in_place


def overwrites(raw: str, kwargs: dict[str, Any]) -> bool:
    """Whether a call changes its first argument: ``relu_``, ``relu(inplace=True)``, ``x += y``."""
    return plain_name(raw)[1] or bool(kwargs.get("inplace", False))


def bounds(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[float, float] | None:
    """``(0, top)`` of a call that cuts at 0 and at ``top`` (infinity for a ReLU); None for every other one.

    Args:
        name: plain.
        args, kwargs: arguments of the call.
    """
    if name == "relu":
        return 0.0, float("inf")
    if name in BOUNDED:
        return 0.0, BOUNDED[name]
    if name == "hardtanh":
        low = kwargs.get("min_val", args[1] if len(args) > 1 else -1.0)
        high = kwargs.get("max_val", args[2] if len(args) > 2 else 1.0)
    elif name in CLAMPS:
        low = kwargs.get("min", args[1] if len(args) > 1 else None)
        high = kwargs.get("max", args[2] if len(args) > 2 else None)
        high = float("inf") if high is None else high
    else:
        return None
    if isinstance(low, Tensor) or isinstance(high, Tensor) or low is None or float(low) != 0:
        return None
    return 0.0, float(high)


def signal_and_gate(name: str, operands: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
    """The feature map and the numbers it is multiplied by, of a product with one number per channel or pixel (squeeze-and-excitation).

    The gate is the smaller operand: it is broadcast over the feature map. None where the operands are of one size, or it is no product.
    """
    if name not in PRODUCTS or len(operands) != 2 or not all(isinstance(t, Tensor) and t.ndim == 4 for t in operands):
        return None
    signal, gate = sorted(operands, key=Tensor.numel, reverse=True)
    fits = all(g in (1, s) for g, s in zip(gate.shape, signal.shape, strict=True))
    return (signal, gate) if fits and gate.numel() < signal.numel() and gate.shape[0] == signal.shape[0] else None
