"""A classifier as the list of its operations, one entry per *call*, with the tensors that went in and came out.

``trace`` follows the forward pass symbolically with :mod:`torch.fx`, so modules and functions (``torch.flatten``, ``+``,
``F.relu``) are treated alike and a module that is called twice gives two entries. ``Graph.run`` executes the operations out of
place, whatever ``inplace`` says, and hands every operation its own alias of its inputs: a gradient with respect to an alias is
the gradient through that one operation, also where a tensor feeds several.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from explainer.attribution.watching import out_of_place, refuse_compiled
from explainer.baselines.kernels.graph_calls import AFFINE_MODULES, MODULE_KINDS, Call, Run, function_kind, gated, module_kind, unsupported
from explainer.baselines.kernels.graph_watch import watch_run
from explainer.errors import UnsupportedLayerError

_IN_PLACE_OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, tuple(t for types, _ in MODULE_KINDS for t in types)) and type(m).forward in _standard_forwards()
        return known or type(m).__name__ in AFFINE_MODULES or super().is_leaf_module(m, module_qualified_name)


def _standard_forwards() -> set[Callable[..., Any]]:
    """The forwards of the known layer types: a subclass that keeps its parent's forward is that layer."""
    return {t.forward for types, _ in MODULE_KINDS for t in types}


class Graph:
    """The operations of ``network``, found by symbolic tracing; modules are looked up when run, so weights may change.

    A network with control flow that symbolic tracing cannot follow (timm's) is watched afresh in each run, see :func:`watch_run`.

    Args:
        network: one tensor in, one tensor out.
        method: name of the method that needs the graph, for the message.

    Raises:
        UnsupportedLayerError: the network has several inputs.
    """

    def __init__(self, network: nn.Module, method: str) -> None:
        self.network = network
        self.method = method
        self.graph: fx.Graph | None = None
        with contextlib.suppress(Exception):  # what cannot be traced is watched while it runs
            self.graph = _Tracer().trace(network)
        if self.graph is not None and sum(node.op == "placeholder" and not node.args for node in self.graph.nodes) != 1:
            raise UnsupportedLayerError(f"{method} needs a network with exactly one input; {type(network).__name__} has another signature.")
        self._checked = False

    def run(self, x: Tensor) -> Run:
        """Execute on ``x``; every tensor stays attached to one autograd graph that starts at the run's input.

        The first run is compared with the network's own forward pass on one image.
        """
        refuse_compiled(self.network, self.method)
        x = x.detach().clone().requires_grad_()
        in_place = {path for path, m in self.network.named_modules(remove_duplicate=False) if getattr(m, "inplace", False)}
        with torch.enable_grad(), out_of_place(self.network):
            run = watch_run(self.network, x, self.method) if self.graph is None else _Execution(self, x, in_place).run()
        if not self._checked:
            self._check(x[:1], run.output[:1])
        return run

    def _check(self, x: Tensor, output: Tensor) -> None:
        with torch.no_grad():
            expected = self.network(x.detach().clone())
        scale = float(expected.abs().max()) if isinstance(expected, Tensor) and expected.numel() else 0.0
        if not isinstance(expected, Tensor) or not torch.allclose(expected, output, rtol=1e-3, atol=1e-3 * scale):
            raise UnsupportedLayerError(
                f"{self.method}: the traced operations of {type(self.network).__name__} do not reproduce its output. "
                "In-place operations on views and hooks that change outputs are not supported; write them out of place."
            )
        self._checked = True


class _Execution:
    """One pass over the fx nodes; ``env`` holds a call's index for what depends on the input and the plain value otherwise."""

    def __init__(self, graph: Graph, x: Tensor, in_place: set[str]) -> None:
        self.graph, self.x, self.in_place = graph, x, in_place
        self.modules = dict(graph.network.named_modules(remove_duplicate=False))
        self.calls: list[Call] = []
        self.env: dict[fx.Node, Any] = {}
        self.seen: dict[str, int] = {}

    def run(self) -> Run:
        last: Any = None
        assert self.graph.graph is not None
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = node.args[0] if node.args else self._add(node, "input", "input", "input", None, (), (), self.x)
            elif node.op == "get_attr":
                self.env[node] = operator.attrgetter(node.target)(self.graph.network)
            elif node.op == "output":
                last = self._value(node.args[0])
            else:
                self.env[node] = self._execute(node)
        if not isinstance(last, _Index):
            raise UnsupportedLayerError(
                f"{self.graph.method} needs a network that returns one tensor; {type(self.graph.network).__name__} returned "
                f"{type(last).__name__}. Wrap it so that only the logits are returned."
            )
        for call in self.calls:
            for source in call.sources:
                self.calls[source].targets.append(call.index)
        return Run(self.calls, last.index)

    def _value(self, argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda node: self.env[node])

    def _execute(self, node: fx.Node) -> Any:
        sources: list[int] = []
        inputs: list[Tensor] = []

        def enter(value: Any) -> Any:
            if isinstance(value, _Index):
                alias = self.calls[value.index].output
                alias = alias.view_as(alias)
                sources.append(value.index)
                inputs.append(alias)
                return alias
            return value

        args = fx.node.map_aggregate(fx.node.map_arg(node.args, lambda n: self.env[n]), enter)
        kwargs = dict(fx.node.map_aggregate(fx.node.map_arg(node.kwargs, lambda n: self.env[n]), enter))
        function, what, module, in_place = self._callee(node, kwargs)
        output = function(*args, **kwargs)
        if not isinstance(output, Tensor) or not inputs:
            if inputs and isinstance(output, (tuple, list)) and any(isinstance(o, Tensor) for o in output):
                split = Call(0, "unknown", self._place(node, what), what, module, (), (), inputs[0])
                raise unsupported(split, self.graph.method, "operations that return one tensor")
            return output
        kind = module_kind(module) if module is not None else function_kind(what, len(inputs))
        kind, kept = gated(kind, what, inputs)
        sources, inputs = [sources[k] for k in kept], [inputs[k] for k in kept]
        made = self._add(node, kind, self._place(node, what), what, module, tuple(sources), tuple(inputs), output, (tuple(args), kwargs))
        if in_place:  # whoever reads the overwritten tensor later reads the new value
            stale = sources[0]
            for key, value in self.env.items():
                if isinstance(value, _Index) and value.index == stale:
                    self.env[key] = made
        return made

    def _callee(self, node: fx.Node, kwargs: dict[str, Any]) -> tuple[Callable[..., Any], str, nn.Module | None, bool]:
        """What to execute for a node: function, its name, the module, and whether the original writes into its first input."""
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            return module, type(module).__name__, module, str(node.target) in self.in_place
        in_place = bool(kwargs.pop("inplace", False))
        if node.op == "call_method":
            name = str(node.target)
            if name.endswith("_") and not name.endswith("__"):
                name, in_place = name[:-1], True
            return lambda tensor, *a, **k: getattr(tensor, name)(*a, **k), name, None, in_place
        function: Callable[..., Any] = node.target  # type: ignore[assignment]
        if function in _IN_PLACE_OPERATORS:
            return _IN_PLACE_OPERATORS[function], _IN_PLACE_OPERATORS[function].__name__, None, True
        name = getattr(function, "__name__", str(function))
        if name.endswith("_") and not name.endswith("__") and hasattr(torch, name[:-1]):
            return getattr(torch, name[:-1]), name[:-1], None, True
        return function, name, None, in_place

    def _place(self, node: fx.Node, what: str) -> str:
        if node.op == "call_module":
            place = str(node.target)
        else:
            stack = list(node.meta.get("nn_module_stack", {}).values())
            entry = stack[-1][0] if stack else ""
            place = f"{entry} ({what})" if entry else f"forward ({what})"
        self.seen[place] = self.seen.get(place, 0) + 1
        return place if self.seen[place] == 1 else f"{place}#{self.seen[place]}"

    def _add(
        self,
        node: fx.Node,
        kind: str,
        place: str,
        what: str,
        module: nn.Module | None,
        sources: tuple[int, ...],
        inputs: tuple[Tensor, ...],
        output: Tensor,
        arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {}),
    ) -> _Index:
        self.calls.append(Call(len(self.calls), kind, place, what, module, sources, inputs, output, arguments))
        return _Index(len(self.calls) - 1)


@dataclass(frozen=True)
class _Index:
    index: int
