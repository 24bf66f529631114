"""What a network really calls: torch functions are watched while it runs, whether they come from modules or from ``forward``.

Module hooks miss ``F.relu``, ``x.relu_()`` and reused modules, and a method that misses them is silently wrong. A
:class:`torch.overrides.TorchFunctionMode` sees every call and changes nothing on the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from explainer.errors import UnsupportedLayerError

ReluRule = Literal["guided", "guided_strict", "deconvnet"]

RELU = {"relu", "relu_"}
RECTIFIERS = {
    "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "selu_", "celu", "celu_", "gelu", "silu", "mish", "relu6", "hardtanh", "hardtanh_",
    "hardswish", "prelu", "rrelu", "rrelu_", "softplus", "threshold", "threshold_",
}  # fmt: skip
CLAMPS = {"clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_"}


@contextlib.contextmanager
def module_stack(classifier: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """Inside, the list holds the chain of modules that are running, outermost first: where a function was called from."""
    stack: list[tuple[str, nn.Module]] = []
    handles = []
    for path, module in classifier.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, _, path=path: stack.append((path, m))))
        handles.append(module.register_forward_hook(lambda m, _, out: stack.pop() and None))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def refuse_compiled(classifier: nn.Module, method: str) -> None:
    """Raise :class:`UnsupportedLayerError` for scripted or compiled parts, whose functions cannot be seen."""
    for path, module in classifier.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or type(module).__name__ == "OptimizedModule":
            raise UnsupportedLayerError(
                f"{method} must see every activation, but {place_of(path, module)} is scripted or compiled: pass the original module."
            )


def place_of(path: str, module: nn.Module) -> str:
    """How a message names a module."""
    return f"{type(module).__name__} at {path!r}" if path else type(module).__name__


def in_place(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a call of an elementwise function changes its argument."""
    return name.endswith("_") or bool(kwargs.get("inplace", False))


def _cuts_at_zero(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a clamp is a ReLU in disguise: lower bound 0 and no upper bound."""
    low = kwargs.get("min", args[1] if len(args) > 1 else None)
    high = kwargs.get("max", args[2] if len(args) > 2 else None)
    return name in CLAMPS and high is None and not isinstance(low, Tensor) and low == 0


class _RuleRelu(torch.autograd.Function):
    """``max(x, 0)`` with a changed backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: ReluRule) -> Tensor:
        ctx.rule = rule
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        positive = grads[0].clamp(min=0)
        if ctx.rule == "guided":
            return positive * (x >= 0), None
        if ctx.rule == "guided_strict":
            return positive * (x > 0), None
        return positive, None


class _ReluMode(TorchFunctionMode):
    def __init__(self, rule: ReluRule, method: str, stack: list[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.rule, self.method, self.stack, self.count = rule, method, stack, 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in RELU:
            self.count += 1
            x = args[0] if args else kwargs["input"]
            if not in_place(name, kwargs):
                return _RuleRelu.apply(x, self.rule)
            return x.copy_(_RuleRelu.apply(x.clone(), self.rule))  # in place: the caller may ignore what is returned
        if name in RECTIFIERS or _cuts_at_zero(name, args, kwargs):
            path, module = self.stack[-1] if self.stack else ("", None)
            place = "the Explanandum" if module is None else place_of(path, module)
            raise UnsupportedLayerError(
                f"{self.method} has a backward rule for ReLU only, but {place} calls {name}. Use gradient, smooth_grad, "
                "integrated_gradients or grad_cam for this classifier."
            )
        return func(*args, **kwargs)


@contextlib.contextmanager
def relu_rule(classifier: nn.Module, rule: ReluRule, method: str) -> Iterator[None]:
    """Every ReLU that runs inside (module, ``F.relu``, ``torch.relu``, ``x.relu_()``) gets another backward pass.

    ``guided``: positive gradients where the input is >= 0 (TorchRay); ``guided_strict``: where it is > 0 (captum);
    ``deconvnet``: positive gradients everywhere.

    Raises:
        UnsupportedLayerError: another rectifying activation runs, parts are scripted or compiled, or there is no ReLU at all.
    """
    refuse_compiled(classifier, method)
    with module_stack(classifier) as stack, _ReluMode(rule, method, stack) as mode:
        yield
    if mode.count == 0:
        raise UnsupportedLayerError(f"{method} changes the backward pass of ReLU, but {type(classifier).__name__} has none: use gradient.")
