"""One operation of a classifier's forward pass as data, and which kind of layer it is: what AGF's graph is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from explainer.baselines.kernels.operations import ACTIVATIONS, DROPOUTS, plain_name, signal_and_gate
from explainer.errors import UnsupportedLayerError

_ACTIVATION_MODULES = (
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.SiLU,
    nn.GELU,
    nn.Mish,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
)
MODULE_KINDS: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.Conv2d,), "conv"),
    ((nn.Linear,), "linear"),
    ((nn.BatchNorm1d, nn.BatchNorm2d), "batch_norm"),
    ((nn.ReLU,), "relu"),
    (_ACTIVATION_MODULES, "activation"),
    ((nn.MaxPool2d, nn.AdaptiveMaxPool2d), "max_pool"),
    ((nn.AvgPool2d, nn.AdaptiveAvgPool2d), "average"),
    ((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.Identity), "identity"),
    ((nn.Flatten, nn.Unflatten), "reshape"),
    ((nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d), "pad"),
)
_FUNCTION_KINDS = {
    "conv": ("conv2d",),
    "linear": ("linear",),
    "batch_norm": ("batch_norm",),
    "relu": ("relu",),
    "activation": tuple(ACTIVATIONS - {"relu"}),
    "max_pool": ("max_pool2d", "adaptive_max_pool2d"),
    "average": ("avg_pool2d", "adaptive_avg_pool2d", "mean"),
    "identity": (*DROPOUTS, "contiguous"),
    "reshape": ("flatten", "reshape", "view", "squeeze", "unsqueeze"),
    "add": ("add",),
    "cat": ("cat", "concat", "concatenate"),
    "pad": ("pad",),
}
_KIND_OF_FUNCTION = {name: kind for kind, names in _FUNCTION_KINDS.items() for name in names}
_ARITHMETIC = ("add", "sub", "mul", "truediv", "div")
AFFINE_MODULES = ("FrozenBatchNorm2d", "Normalize")  # torchvision's; their forward inspects its input, which a symbolic trace cannot do


@dataclass
class Call:
    """One operation of one forward pass.

    Attributes:
        kind: ``input conv linear batch_norm relu activation max_pool average identity reshape add cat affine gate pad`` or ``unknown``.
            ``gate``: the product of a feature map and one number per channel or pixel; its only source is the feature map.
            ``affine``: arithmetic with one data-dependent operand (``(x - mean) / std``); ``average`` includes ``mean``.
        place: module path, and the function where it is not a module: ``layer1.0 (add)``. A repeated call of a module ends in ``#2``.
        module: the module called, None for functions.
        sources: indices of the calls whose outputs came in, in the order of ``inputs``.
        inputs: aliases of those outputs, attached to the graph.
        output: what came out, attached to the graph.
        arguments: all arguments as executed, by position and by keyword (tensors from other calls included).
        targets: indices of the calls that read the output (twice if one reads it twice).
    """

    index: int
    kind: str
    place: str
    what: str
    module: nn.Module | None
    sources: tuple[int, ...]
    inputs: tuple[Tensor, ...]
    output: Tensor
    arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    targets: list[int] = field(default_factory=list)


@dataclass
class Run:
    """All calls of one forward pass in the order of execution; ``calls[0]`` is the input, ``calls[last]`` the result."""

    calls: list[Call]
    last: int
    cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def input(self) -> Tensor:
        """What the network was given (a leaf that requires a gradient)."""
        return self.calls[0].output

    @property
    def output(self) -> Tensor:
        """What the network returned."""
        return self.calls[self.last].output

    def backwards(self) -> Iterable[Call]:
        """The calls from the result to the input (calls behind the result are left out)."""
        return reversed(self.calls[: self.last + 1])

    def behind(self, index: int, kinds: tuple[str, ...] = ("identity",)) -> Call:
        """The call that made the ``index``-th output, looking through calls of these kinds."""
        call = self.calls[index]
        while call.kind in kinds:
            call = self.calls[call.sources[0]]
        return call


def module_kind(module: nn.Module) -> str:
    """The kind of a call of this module, see :class:`Call`."""
    for types, kind in MODULE_KINDS:
        if isinstance(module, types):
            return kind
    return "batch_norm" if type(module).__name__ in AFFINE_MODULES else "unknown"


def function_kind(name: str, operands: int) -> str:
    """The kind of a function by its plain name and its number of operands that depend on the input, see :class:`Call`."""
    name, _ = plain_name(name)
    if name in _ARITHMETIC and operands == 1:
        return "affine"
    return _KIND_OF_FUNCTION.get(name, "unknown")


def gated(kind: str, name: str, inputs: Sequence[Tensor]) -> tuple[str, list[int]]:
    """The kind ``gate`` and the feature map's position among the operands, for a product with a gate; else the kind and every position."""
    pair = signal_and_gate(name, inputs) if kind == "unknown" else None
    if pair is None:
        return kind, list(range(len(inputs)))
    return "gate", [k for k, t in enumerate(inputs) if t is pair[0]]


def unsupported(call: Call, method: str, supported: str, reason: str = "") -> UnsupportedLayerError:
    """The error to raise when ``method`` has no rule for ``call``: names the layer, its place, the method and the alternatives."""
    layer = f"{call.what} at {call.place!r}"
    return UnsupportedLayerError(
        f"{method} has no rule for {layer}{f' ({reason})' if reason else ''}. It handles {supported}. Use another classifier, replace the "
        "layer, or use a method that only needs gradients (gradient, integrated_gradients, smooth_grad) or one layer (grad_cam, layer_cam)."
    )
