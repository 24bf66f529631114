"""What a network really calls: torch functions are watched while it runs, whether they come from modules or from ``forward``.

Module hooks miss ``F.relu``, ``x.relu_()`` and reused modules, and a method that misses them is silently wrong. A
:class:`torch.overrides.TorchFunctionMode` sees every call and changes nothing on the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from explainer.errors import UnsupportedLayerError

ReluRule = Literal["guided", "guided_strict", "deconvnet"]

_RELU = {"relu", "relu_"}
_BENT = {
    "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "selu_", "celu", "celu_", "gelu", "silu", "mish", "relu6", "hardtanh", "hardtanh_",
    "hardswish", "prelu", "rrelu", "rrelu_", "softplus", "threshold", "threshold_",
}  # fmt: skip
_CLAMP = {"clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_"}
_OTHER = {
    "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "layer_norm",
    "group_norm", "instance_norm", "softmax", "log_softmax", "sigmoid", "sigmoid_", "tanh", "tanh_", "hardsigmoid", "logsigmoid", "exp",
    "log", "sqrt", "rsqrt", "abs", "pow", "square", "norm", "vector_norm", "normalize", "maximum", "minimum", "max", "amax", "min", "amin",
    "scaled_dot_product_attention", "multi_head_attention_forward",
}  # fmt: skip
_PRODUCTS = {"mul", "mul_", "multiply", "div", "div_", "true_divide", "matmul", "bmm", "mm", "einsum", "addcmul"}


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
                f"{method} must see every activation, but {_place(path, module)} is scripted or compiled: pass the original module."
            )


def _place(path: str, module: nn.Module) -> str:
    return f"{type(module).__name__} at {path!r}" if path else type(module).__name__


def _cuts_at_zero(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a clamp is a ReLU in disguise: lower bound 0 and no upper bound."""
    low = kwargs.get("min", args[1] if len(args) > 1 else None)
    high = kwargs.get("max", args[2] if len(args) > 2 else None)
    return name in _CLAMP and high is None and not isinstance(low, Tensor) and low == 0


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
        if name in _RELU:
            self.count += 1
            x = args[0] if args else kwargs["input"]
            if name == "relu" and not kwargs.get("inplace", False):
                return _RuleRelu.apply(x, self.rule)
            return x.copy_(_RuleRelu.apply(x.clone(), self.rule))  # in place: the caller may ignore what is returned
        if name in _BENT or _cuts_at_zero(name, args, kwargs):
            path, module = self.stack[-1] if self.stack else ("", None)
            place = "the Explanandum" if module is None else _place(path, module)
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


class _CheckMode(TorchFunctionMode):
    def __init__(self, supported: tuple[type[nn.Module], ...], method: str, stack: list[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.supported, self.method, self.stack = supported, method, stack
        self.calls: dict[nn.Module, int] = {}

    def _refuse(self, what: str, remedy: str) -> NoReturn:
        raise UnsupportedLayerError(f"{self.method}: {what}. {remedy} Or use gradient_shap or integrated_gradients.")

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        path, module = self.stack[-1] if self.stack else ("", None)
        place = "the Explanandum" if module is None else _place(path, module)
        operands = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        if operands and (name in _RELU | _BENT | _OTHER or _cuts_at_zero(name, args, kwargs)):
            if module is None or not isinstance(module, self.supported):
                self._refuse(f"{place} calls {name}, which has no rule there", "Write it as an nn module that is used once.")
            self.calls[module] = self.calls.get(module, 0) + 1
            if self.calls[module] > 1:
                self._refuse(f"{place} is used more than once in a forward pass", "Give each place its own module.")
        if name in _PRODUCTS and len(operands) > 1:
            self._refuse(f"{place} multiplies two activations ({name}), which has no rule", "")
        return func(*args, **kwargs)


def require_modules(explanandum: Any, images: Tensor, supported: tuple[type[nn.Module], ...], method: str) -> None:
    """One forward pass that raises :class:`UnsupportedLayerError` unless each nonlinearity is a supported module, used once."""
    refuse_compiled(explanandum.classifier, method)
    with module_stack(explanandum.classifier) as stack, torch.enable_grad(), _CheckMode(supported, method, stack):
        explanandum(images[:1].detach().clone().requires_grad_())
