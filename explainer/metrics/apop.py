"""APOP, activation-pattern-only prediction: does a network still classify when it sees only *which* units were active?

S. Han, Y. Kim, N. Kwak, "Respect the model" (SRD), ICLR 2024, section 4.1 and appendix D. A first pass on the image records, per ReLU call,
the mask ``m = [v > 0]`` and, per max-pool call, the winners. A second pass on a substitute image (zeros: the mean colour after
normalisation) replaces ReLU by ``v' * m`` (``apop``) or ``relu(v') * m`` (``apop_relu``) and pools at the recorded winners.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from explainer.attribution.rest import at_rest
from explainer.errors import ConfigError, ShapeError, UnsupportedLayerError
from explainer.metrics.facts import Facts

Mode = Literal["apop", "apop_relu"]
Substitute = Literal["zeros", "ones", "noise"]
_RELU = ("relu", "relu_")
_POOL = ("max_pool2d", "max_pool2d_with_indices")
_OTHERS = (
    "leaky_relu",
    "elu",
    "selu",
    "celu",
    "silu",
    "gelu",
    "tanh",
    "sigmoid",
    "relu6",
    "hardtanh",
    "hardswish",
    "hardsigmoid",
    "mish",
    "softplus",
    "softsign",
    "prelu",
    "rrelu",
    "logsigmoid",
    "log_sigmoid",
    "glu",
    "threshold",
    "_threshold",
    "clamp",
    "clip",
    "clamp_min",
    "adaptive_max_pool2d",
    "max_pool1d",
    "max_pool3d",
    "maximum",
    "minimum",
    # a maximum over positions is a pool, whose winners would be those of the substitute
    "amax",
    "amin",
    "aminmax",
    "max",
    "min",
    "topk",
    "kthvalue",
    "sort",
    "median",
)

#: What may be binarised; gates (sigmoid) are no activations of features.
_ACTIVATIONS = (
    "relu",
    "leaky_relu",
    "elu",
    "selu",
    "celu",
    "silu",
    "gelu",
    "tanh",
    "relu6",
    "hardtanh",
    "hardswish",
    "mish",
    "softplus",
    "prelu",
)


class _Patterns(TorchFunctionMode):
    """Records masks and winners call by call (pass 1), then imposes them in the same order (pass 2).

    Calls, not modules, are counted: torchvision's ResNet blocks call one ReLU several times. Functional calls are caught as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patterns: list[tuple[str, Tensor]] = []
        self.mode: Mode | None = None
        self.position = 0

    def replay(self, mode: Mode) -> _Patterns:
        """Switch to pass 2."""
        self.mode, self.position = mode, 0
        return self

    def _next(self, kind: str, shape: torch.Size) -> Tensor:
        recorded, pattern = self.patterns[self.position] if self.position < len(self.patterns) else ("nothing", torch.empty(0))
        if recorded != kind or pattern.shape != shape:
            raise UnsupportedLayerError(
                f"apop: call {self.position} of the second pass is a {kind} of shape {tuple(shape)}, which the first pass did not make: "
                "the classifier's control flow depends on the image, so its activation pattern cannot be imposed."
            )
        self.position += 1
        return pattern

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record or impose at ReLU and max pool; refuse other non-linearities; everything else runs as it is."""
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in _OTHERS or name.rstrip("_") in _OTHERS:
            raise UnsupportedLayerError(f"apop is defined for ReLU networks with max pooling only, but the classifier calls {name!r}.")
        if name in _RELU:
            return self._relu(name, *args, **kwargs)
        if name in _POOL:
            return self._pool(*args, **kwargs)
        return func(*args, **kwargs)

    def _relu(self, name: str, input: Tensor, inplace: bool = False) -> Tensor:
        if self.mode is None:
            self.patterns.append(("ReLU", input > 0))
            out = input.relu()
        else:
            kept = input if self.mode == "apop" else input.relu()
            out = kept * self._next("ReLU", input.shape)
        return input.copy_(out) if inplace or name == "relu_" else out

    def _pool(
        self,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        out, indices = F.max_pool2d_with_indices(input, kernel_size, stride, padding, dilation, ceil_mode)
        if self.mode is None:
            self.patterns.append(("max pool", indices))
        else:
            indices = self._next("max pool", indices.shape)
            out = input.flatten(-2).gather(-1, indices.flatten(-2)).view(indices.shape)
        return (out, indices) if return_indices else out


def _eval_mode(classifier: Callable[[Tensor], Tensor]) -> None:
    if isinstance(classifier, nn.Module) and any(m.training for m in classifier.modules()):
        raise ConfigError(
            "apop needs the classifier in eval mode (dropout off, BatchNorm fixed): call classifier.eval() or pass an Explanandum's."
        )


def make_substitute(images: Tensor, kind: Substitute | Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The image of pass 2: ``zeros`` (the mean colour), ``ones``, ``noise`` (N(0,1), CPU generator, seed 0 if None) or a given tensor."""
    if isinstance(kind, Tensor):
        if kind.shape != images.shape:
            raise ShapeError(f"the substitute must have the images' shape {tuple(images.shape)}, received {tuple(kind.shape)}.")
        return kind.to(images)
    if kind == "noise":
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        return torch.randn(images.shape, generator=generator, dtype=images.dtype).to(images.device)
    if kind not in ("zeros", "ones"):
        raise ConfigError(f"substitute must be 'zeros', 'ones', 'noise' or a tensor, received {kind!r}.")
    return torch.full_like(images, float(kind == "ones"))


@torch.no_grad()
def apop_logits(
    classifier: Callable[[Tensor], Tensor],
    images: Tensor,
    substitute: Substitute | Tensor = "zeros",
    mode: Mode = "apop",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits of the image and of the substitute seen through the image's activation pattern.

    Args:
        classifier: ReLU network in eval mode, *normalised* images ``[B,C,H,W]`` -> logits ``[B,K]`` (an Explanandum's ``classifier``).
        images: normalised images (``explanandum.normalize(images)``).
        substitute: the image of pass 2, in normalised units; see :func:`make_substitute`.
        mode: ``apop`` keeps negative values under an open mask, ``apop_relu`` clips them.

    Returns:
        ``(original, apop)`` logits, ``[B,K]`` each. With ``substitute=images`` the two are equal.

    Raises:
        UnsupportedLayerError: an activation other than ReLU, or control flow that depends on the image.
    """
    if mode not in ("apop", "apop_relu"):
        raise ConfigError(f"mode must be 'apop' or 'apop_relu', received {mode!r}.")
    _eval_mode(classifier)
    other = make_substitute(images, substitute, generator)
    recorder = _Patterns()
    with recorder:
        original = classifier(images)
    with recorder.replay(mode):
        imposed = classifier(other)
    return original, imposed


@torch.no_grad()
def binarized_logits(classifier: nn.Module, images: Tensor, layer: str) -> Tensor:
    """Logits when one activation layer passes ``[a > 0]`` instead of a, on the same image (SRD, Fig. 6).

    Args:
        layer: module path; every call of the module is replaced.
    """
    try:
        module = classifier.get_submodule(layer)
    except AttributeError:
        known = ", ".join(path for path, _ in classifier.named_modules() if path)
        raise ConfigError(f"layer {layer!r} is not a module of {type(classifier).__name__}. Its modules: {known}.") from None
    _eval_mode(classifier)
    handle = module.register_forward_hook(lambda _, __, out: (out > 0).to(out.dtype))
    try:
        logits: Tensor = classifier(images)
        return logits
    finally:
        handle.remove()


class _Binarized(TorchFunctionMode):
    """Lets one activation call pass ``[a > 0]``; the calls are counted in the order of the forward pass."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.call = call
        self.seen: int = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count activations and replace the one asked for, in place where the call was."""
        out = func(*args, **dict(kwargs or {}))
        if getattr(func, "__name__", "").removesuffix("_") not in _ACTIVATIONS:
            return out
        self.seen += 1
        if self.seen != self.call + 1:
            return out
        pattern = (out > 0).to(out.dtype)
        given = args[0] if args else dict(kwargs or {}).get("input")
        return given.copy_(pattern) if isinstance(given, Tensor) and out is given else pattern


@torch.no_grad()
def activation_calls(classifier: Callable[[Tensor], Tensor], images: Tensor) -> int:
    """How many activation calls a forward pass of normalised images ``[B,C,H,W]`` makes; see :func:`binarized_call_logits`."""
    mode = _Binarized(-1)
    with mode:
        classifier(images)
    return mode.seen


@torch.no_grad()
def binarized_call_logits(classifier: Callable[[Tensor], Tensor], images: Tensor, call: int) -> Tensor:
    """Logits when one activation call passes ``[a > 0]`` instead of a, on the same image (SRD, Fig. 6).

    Args:
        classifier: a classifier in eval mode; it maps *normalised* images ``[B,C,H,W]`` -> logits ``[B,K]``.
        images: normalised images.
        call: number of the call, from 0, in the order of the forward pass; calls of a shared module and functional ones count one by one.

    Raises:
        ConfigError: the classifier makes fewer calls.
    """
    _eval_mode(classifier)
    with _Binarized(call) as mode:
        logits = classifier(images)
    if not 0 <= call < mode.seen:
        known = f"numbered 0 to {mode.seen - 1}" if mode.seen else "of which there is none"
        raise ConfigError(f"call must be one of the classifier's {mode.seen} activation calls, {known}; received {call}.")
    return logits


def top_k_hits(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Per image, whether fewer than k classes score at least as high as the label: ``[B]`` bool. A tie counts against the label, so
    constant logits hit nothing (unless k >= K). Logits ``[B,K]``, labels ``[B]``.
    """
    own = logits.gather(1, labels[:, None])
    rivals = (logits >= own).sum(1) - 1
    finite = logits.isfinite().all(1)
    return (rivals < k) & finite


#: What :func:`apop` tells of an image.
COLUMNS = ("original_top1", "original_top5", "apop_top1", "apop_top5")


@Facts("apop", higher_is_better=True, bounds=(0.0, 1.0), optimum=1.0, columns=COLUMNS)
def apop(
    images: Tensor, class_index: Tensor, explanandum: Any, *, substitute: Substitute = "zeros", mode: Mode = "apop", seed: int = 0
) -> Tensor:
    """Top-1 and top-5 hits of the original and of the activation-pattern-only prediction.

    Args:
        images: ``[B,3,H,W]`` in [0,1].
        class_index: labels ``[B]``.
        explanandum: its ``normalize`` and ``classifier`` are used.
        substitute: the image of pass 2; see :func:`apop_logits`.
        mode: what of pass 1 is kept; see :func:`apop_logits`.
        seed: random seed of the substitute ``noise``, which is the same for every batch of one size.

    Returns:
        ``[B,4]`` in {0,1}, in the order of :data:`COLUMNS`.
    """
    size = getattr(explanandum, "input_size", None)
    if size is not None and images.shape[-2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    generator = torch.Generator().manual_seed(seed)
    with at_rest(explanandum):
        logits = apop_logits(explanandum.classifier, explanandum.normalize(images), substitute, mode, generator)
    labels = class_index.to(images.device)
    return torch.stack([top_k_hits(y, labels, k) for y in logits for k in (1, 5)], 1).double()
