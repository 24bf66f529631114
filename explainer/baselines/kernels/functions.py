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

from explainer.attribution.watching import place_of, refuse_compiled
from explainer.baselines.kernels.operations import CLAMPS, RECTIFIERS, bounds, overwrites, plain_name
from explainer.errors import UnsupportedLayerError

ReluRule = Literal["guided", "guided_strict", "deconvnet"]


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


class _RuleRelu(torch.autograd.Function):
    """``min(max(x, 0), top)`` with a changed backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rule: ReluRule, top: float) -> Tensor:
        ctx.rule, ctx.top = rule, top
        ctx.save_for_backward(x)
        return x.clamp(0, top)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        positive = grads[0].clamp(min=0)
        if ctx.rule == "guided":
            positive = positive * ((x >= 0) & (x < ctx.top))
        elif ctx.rule == "guided_strict":
            positive = positive * ((x > 0) & (x < ctx.top))
        return positive, None, None


class _ReluMode(TorchFunctionMode):
    def __init__(self, rule: ReluRule, method: str, stack: list[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.rule, self.method, self.stack, self.count = rule, method, stack, 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        raw = getattr(func, "__name__", "")
        name, _ = plain_name(raw)
        cut = bounds(name, args, kwargs)
        if cut is not None and name not in CLAMPS:
            self.count += 1
            x = args[0] if args else kwargs["input"]
            if not overwrites(raw, kwargs):
                return _RuleRelu.apply(x, self.rule, cut[1])
            return x.copy_(_RuleRelu.apply(x.clone(), self.rule, cut[1]))  # in place: the caller may ignore what is returned
        # A clamp may be a ReLU or ReLU6 in disguise; to [0,1] it is a gate, or colours.
        if name in RECTIFIERS or (cut is not None and cut[1] > 1):
            path, module = self.stack[-1] if self.stack else ("", None)
            place = "the Explanandum" if module is None else place_of(path, module)
            raise UnsupportedLayerError(
                f"{self.method} has a backward rule for ReLU and ReLU6 only, but {place} calls {name}. Use gradient, smooth_grad, "
                "integrated_gradients or grad_cam for this classifier."
            )
        return func(*args, **kwargs)


@contextlib.contextmanager
def relu_rule(classifier: nn.Module, rule: ReluRule, method: str) -> Iterator[None]:
    """Every ReLU that runs inside (module, ``F.relu``, ``torch.relu``, ``x.relu_()``) gets another backward pass, and every ReLU6, through
    which guided rules let nothing pass at its upper bound.

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
