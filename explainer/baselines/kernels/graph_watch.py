"""A forward pass listed call by call while it runs, for networks whose control flow symbolic tracing cannot follow (timm's)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from explainer.baselines.kernels.functions import module_stack
from explainer.baselines.kernels.graph_calls import Call, Run, function_kind, gated, unsupported
from explainer.baselines.kernels.operations import plain_name
from explainer.errors import UnsupportedLayerError


class _Watcher(TorchFunctionMode):
    """Executes every function on what depends on the input out of place, on aliases, and lists it as a :class:`Call`."""

    def __init__(self, x: Tensor, method: str, stack: list[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.method, self.stack = method, stack
        self.calls = [Call(0, "input", "input", "input", None, (), (), x)]
        self.index = {id(x): 0}
        self.alive: list[Tensor] = [x]  # a tensor that is kept keeps its id()
        self.seen: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Execute and list one function."""
        raw, kwargs = getattr(func, "__name__", str(func)), dict(kwargs or {})
        if raw in ("__get__", "__set__"):
            return func(*args, **kwargs)
        name, in_place = plain_name(raw)
        in_place = bool(kwargs.pop("inplace", False)) or in_place
        sources: list[int] = []
        inputs: list[Tensor] = []

        def enter(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(enter(v) for v in value) if type(value) in (list, tuple) else value
            if isinstance(value, Tensor) and id(value) in self.index:
                sources.append(self.index[id(value)])
                inputs.append(self.calls[sources[-1]].output.view_as(value))
                return inputs[-1]
            return value

        entered, named = tuple(enter(a) for a in args), {key: enter(value) for key, value in kwargs.items()}
        function = func if raw == name or not in_place else getattr(torch, name, None) or getattr(Tensor, name)
        output = function(*entered, **named)
        if not inputs or not (isinstance(output, Tensor) and output.is_floating_point()):
            return self._other(name, output, inputs)
        kind, kept = gated(function_kind(name, len(inputs)), name, inputs)
        self._list(kind, name, [sources[k] for k in kept], [inputs[k] for k in kept], output, (entered, named))
        if in_place:  # whoever reads the overwritten tensor later reads the new value
            self.index[id(args[0])] = len(self.calls) - 1
            self.alive.append(args[0])
        return output

    def _other(self, name: str, output: Any, inputs: list[Tensor]) -> Any:
        if inputs and isinstance(output, (tuple, list)) and any(isinstance(o, Tensor) for o in output):
            split = Call(0, "unknown", self._place(name), name, None, (), (), inputs[0])
            raise unsupported(split, self.method, "operations that return one tensor")
        return output

    def _place(self, name: str) -> str:
        path, module = self.stack[-1] if self.stack else ("", None)
        leaf = module is not None and not any(True for _ in module.children())
        place = path if leaf and path else f"{path} ({name})" if path else f"forward ({name})"
        self.seen[place] = self.seen.get(place, 0) + 1
        return place if self.seen[place] == 1 else f"{place}#{self.seen[place]}"

    def _list(self, kind: str, name: str, sources: list[int], inputs: list[Tensor], output: Tensor, arguments: Any) -> None:
        self.calls.append(Call(len(self.calls), kind, self._place(name), name, None, tuple(sources), tuple(inputs), output, arguments))
        self.index[id(output)] = len(self.calls) - 1
        self.alive.append(output)


def watch_run(network: nn.Module, x: Tensor, method: str) -> Run:
    """One pass of ``network`` over ``x``, every function listed as it ran: control flow is followed as it went, not as it might go.

    Raises:
        UnsupportedLayerError: the result did not come out of functions that can be watched.
    """
    with module_stack(network) as stack, _Watcher(x, method, stack) as watcher:
        last = network(x)
    if not isinstance(last, Tensor) or id(last) not in watcher.index:
        raise UnsupportedLayerError(
            f"{method} cannot follow the forward pass of {type(network).__name__}: it returned {type(last).__name__} that no watched "
            "operation made (several outputs, a scripted or compiled part?). Wrap it so that only the logits are returned, or use a method "
            "that only needs gradients (gradient, integrated_gradients) or a layer (grad_cam)."
        )
    for call in watcher.calls:
        for source in call.sources:
            watcher.calls[source].targets.append(call.index)
    return Run(watcher.calls, watcher.index[id(last)])
