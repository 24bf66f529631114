"""The layer graph that SRD walks, read off one forward pass.

A classifier is watched while it runs (:class:`torch.overrides.TorchFunctionMode`), so modules, functional calls, shared modules,
residual sums and Python control flow are all seen as they happened, with their values; nothing is rewritten. Every operation on a tensor
that stems from the classifier's input becomes a :class:`Node`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from explainer.attribution.watching import out_of_place, refuse_compiled
from explainer.baselines.kernels.operations import plain_name, signal_and_gate
from explainer.baselines.kernels.srd_operations import RULES, max_pool
from explainer.baselines.kernels.srd_rules import Add, AvgPool, Cat, Conv, Gate, Norm, Opaque, Pad, Pass, Rule, Source
from explainer.errors import ConfigError, UnsupportedLayerError

ALTERNATIVES = "Use a method without layer rules: extremal_perturbation, rise, igos_pp, gradient, integrated_gradients."
_SHOWN = 12  # nodes that a message lists


@dataclass
class Node:
    """One operation: ``inputs`` are indices of earlier nodes, ``out`` its value ``[B,C,H,W]`` (or the logits)."""

    op: str
    rule: Rule
    inputs: tuple[int, ...]
    out: Tensor
    place: str
    names: list[str] = field(default_factory=list)


_NUM_INPUTS: dict[type[Rule], int] = {Add: 2}


class _Recorder(TorchFunctionMode):
    """Turns every operation on a tracked tensor into a node while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.index: dict[int, int] = {}
        self.keep: list[Tensor] = []  # tracked tensors stay alive, so that their id() stays theirs
        self.stack: list[str] = []

    def track(self, tensor: Tensor, node: Node) -> None:
        """Append the node and remember which tensor carries its value."""
        self.nodes.append(node)
        self.index[id(tensor)] = len(self.nodes) - 1
        self.keep.append(tensor)

    def sources_of(self, args: Any) -> list[int]:
        """Nodes of the tensors among the arguments, one level into lists, in order."""
        flat = [a for arg in args for a in (arg if isinstance(arg, list | tuple) else (arg,))]
        return [self.index[id(a)] for a in flat if isinstance(a, Tensor) and id(a) in self.index]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and record it when it touches a tracked tensor."""
        kwargs = dict(kwargs or {})
        inputs = self.sources_of((*args, *kwargs.values()))
        name = getattr(func, "__name__", str(func))
        if not inputs:
            return func(*args, **kwargs)
        in_place = bool(kwargs.get("inplace")) or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        name = name if name.endswith("__") else plain_name(name)[0]
        gated = signal_and_gate(name, [a for a in args if isinstance(a, Tensor) and id(a) in self.index])
        gate = gated[1].clone() if gated is not None and not in_place else None
        target = args[0] if args and in_place else None
        if target is not None and id(target) in self.index:  # the value before the write is what the earlier node returned
            self.nodes[self.index[id(target)]].out = target.clone()
        rule: Rule
        if gated is not None and gate is not None:
            rule, inputs = Gate(gate), [self.index[id(gated[0])]]
            out = func(*args, **kwargs)
        elif name == "max_pool2d" and not in_place:
            out, rule = max_pool(args, kwargs)
        else:
            rule = self._rule(name, args, kwargs, inputs)
            out = func(*args, **kwargs)
        for tensor in out if isinstance(out, list | tuple) else (target if name == "__setitem__" else out,):
            if isinstance(tensor, Tensor) and (in_place or id(tensor) not in self.index):
                self.track(tensor, Node(name, rule, tuple(inputs), tensor, self.stack[-1] if self.stack else ""))
        return out

    @staticmethod
    def _rule(name: str, args: Any, kwargs: dict[str, Any], inputs: list[int]) -> Rule:
        if name not in RULES:
            return Opaque("no rule for this operation")
        try:
            rule = RULES[name](*args, **kwargs)
        except TypeError as error:
            return Opaque(f"unusual arguments ({error})")
        expected = len(args[0] if args else kwargs["tensors"]) if isinstance(rule, Cat) else _NUM_INPUTS.get(type(rule), 1)
        return rule if len(inputs) == expected else Opaque("a feature map is combined with a constant or with its own parameters")


@contextlib.contextmanager
def _watched(classifier: nn.Module, recorder: _Recorder, keep_graph: bool) -> Iterator[None]:
    """Hooks that name the nodes by module path and catch the classifier's input."""

    def enter(module: nn.Module, args: tuple[Any, ...], path: str) -> Any:
        recorder.stack.append(path)
        if path:
            return None
        if recorder.nodes:
            raise UnsupportedLayerError(f"srd explains one pass, but {type(module).__name__} was called twice. {ALTERNATIVES}")
        image = args[0] if keep_graph and args[0].requires_grad else args[0].detach().requires_grad_()
        recorder.track(image, Node("input", Source(), (), image, "", ["input"]))
        return (image, *args[1:])

    def leave(_: nn.Module, __: Any, out: Any, path: str) -> None:
        recorder.stack.pop()
        if path and isinstance(out, Tensor) and id(out) in recorder.index:
            recorder.nodes[recorder.index[id(out)]].names.append(path)

    handles = []
    for path, module in classifier.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, a, path=path: enter(m, a, path)))
        handles.append(module.register_forward_hook(lambda m, a, o, path=path: leave(m, a, o, path)))
    try:
        with out_of_place(classifier), recorder:
            yield
    finally:
        for handle in handles:
            handle.remove()


class Graph:
    """The recorded forward pass. ``logits`` ``[B,K]`` and the nodes' values hang on autograd until :meth:`release`."""

    def __init__(self, nodes: list[Node], logits: Tensor, output: int) -> None:
        self.nodes, self.logits, self.output = nodes, logits, output
        self.names: dict[str, list[int]] = {}
        for i, node in enumerate(nodes):
            if not node.names:
                node.names = [f"{node.place}:{node.op}" if node.place else node.op]
            for name in node.names:
                self.names.setdefault(name, []).append(i)
        consumers: dict[int, list[int]] = {}
        for i, node in enumerate(nodes):
            for j in node.inputs:
                consumers.setdefault(j, []).append(i)
        # Folding is decided by adjacency: a convolution whose one and only consumer is the BatchNorm.
        self.folds = {
            users[0]: conv
            for conv, users in consumers.items()
            if isinstance(nodes[conv].rule, Conv) and len(users) == 1 and isinstance(nodes[users[0]].rule, Norm)
        }

    def release(self) -> None:
        """Forget autograd's graph; values in half precision become float32, in which the sweep runs."""
        for node in self.nodes:
            out = node.out.detach()
            node.out = out.float() if out.dtype in (torch.float16, torch.bfloat16) else out
        self.logits = self.logits.detach()

    def ancestors(self, end: int) -> set[int]:
        """``end`` and every node that it depends on."""
        found = {end}
        for i in range(end, -1, -1):
            if i in found:
                found.update(self.nodes[i].inputs)
        return found

    def between(self, starts: list[int], end: int) -> list[int]:
        """Nodes on the paths from any of ``starts`` to ``end``, ends included, in call order."""
        above = self.ancestors(end)
        reached = {s for s in starts if s in above}
        for i in sorted(above):
            if reached.intersection(self.nodes[i].inputs):
                reached.add(i)
        return sorted(reached)

    def cuts(self, end: int) -> list[int]:
        """Nodes that every path from the input to ``end`` crosses, in call order: no edge jumps over them."""
        inside = self.between([0], end)
        members, far, found = set(inside), 0, []
        last = {i: i for i in inside}
        for i in inside:
            for j in self.nodes[i].inputs:
                if j in members:
                    last[j] = i
        for i in inside:
            if far <= i:
                found.append(i)
            far = max(far, last[i])
        return found

    def find(self, name: str, fold: bool = True) -> int:
        """Node of a module path (the last call; ``path#0`` is the first call). A folded convolution is named by its BatchNorm."""
        path, _, call = name.partition("#")
        calls = self.names.get(path, [])
        if not calls or (call and not (call.isdigit() and int(call) < len(calls))):
            raise ConfigError(
                f"no node {name!r} was met in the forward pass: name another, {self._candidates(maps=False)} "
                "(path#0, path#1 for repeated calls)."
            )
        index = calls[int(call)] if call else calls[-1]
        if self.nodes[index].out.ndim != 4:
            shape = tuple(self.nodes[index].out.shape)
            raise ConfigError(f"node {name!r} has shape {shape}, but relevance lives on maps [B,C,H,W]: name a layer of the encoder.")
        folded = {conv: norm for norm, conv in self.folds.items()}
        return folded.get(index, index) if fold else index

    def _candidates(self, maps: bool) -> str:
        """Names of nodes for a message, last ones first; of a transformer there are hundreds.

        Args:
            maps: only those that are maps with more than one position.
        """
        fit = [
            n
            for n, calls in self.names.items()
            if not maps or (self.nodes[calls[-1]].out.ndim == 4 and self.nodes[calls[-1]].out[0, 0].numel() > 1)
        ]
        more = f", and {len(fit) - _SHOWN} more" if len(fit) > _SHOWN else ""
        return f"for example {', '.join(fit[::-1][:_SHOWN])}{more}" if fit else "but none of its operations gives one"

    def name(self, index: int) -> str:
        """The innermost path, with ``#call`` where the module was called several times."""
        name = self.nodes[index].names[0]
        calls = self.names[name]
        return name if len(calls) == 1 else f"{name}#{calls.index(index)}"

    def is_source(self, index: int) -> bool:
        """The input or a pointwise activation."""
        return isinstance(self.nodes[index].rule, Source)

    def sources_of(self, index: int) -> list[int]:
        """The activations (or the input) from which the vectors of node ``index`` come without crossing another, in call order."""
        waiting, found, seen = list(self.nodes[index].inputs), set(), set()
        while waiting:
            i = waiting.pop()
            if i in seen:
                continue
            seen.add(i)
            if self.is_source(i):
                found.add(i)
            else:
                waiting += self.nodes[i].inputs
        return sorted(found)

    def encoder_output(self) -> int:
        """The tensor that enters the head: the last feature map that all evidence crosses and that no trailing average pool, dropout
        or flatten has touched yet.
        """
        crossed = [
            i
            for i in self.cuts(self.output)
            if self.nodes[i].out.ndim == 4 and i > 0 and not isinstance(self.nodes[i].rule, AvgPool | Pass | Pad | Opaque)
        ]
        spatial = [i for i in crossed if self.nodes[i].out[0, 0].numel() > 1] or crossed
        if not spatial:
            raise ConfigError(
                "srd found no feature map that all evidence crosses: name the encoder's last layer with encoder_output=, "
                f"{self._candidates(maps=True)}. {ALTERNATIVES}"
            )
        return spatial[-1]

    def last_weighted(self) -> Tensor | None:
        """The input of the linear layer or convolution that ran last, ``[B,...]``."""
        for node in reversed(self.nodes):
            if node.op in ("linear", "conv2d") and node.inputs:
                return self.nodes[node.inputs[0]].out
        return None

    def require_rules(self, live: list[int], stops: list[int]) -> None:
        """Raise :class:`UnsupportedLayerError` if a sweep over ``live`` has to cross an operation without a rule."""
        members = set(live)
        for i in live:
            node = self.nodes[i]
            if isinstance(node.rule, Opaque) and members.intersection(node.inputs):
                where = self.nodes[i].place or "the classifier's own forward"
                raise UnsupportedLayerError(
                    f"srd cannot share relevance through {node.op!r} (node {self.name(i)!r}, operation {i} of {len(self.nodes)}, called in "
                    f"{where!r}): {node.rule.reason}. Stop above it with resolution='low' or a later layer. {ALTERNATIVES}"
                )


def record(explanandum: Any, images: Tensor, keep_graph: bool = False) -> Graph:
    """Run the classifier once and record it.

    Args:
        explanandum: maps images in [0,1] to logits ``[B,K]``; node 0 is what its ``classifier`` receives (the normalised image).
        images: ``[B,3,H,W]``.
        keep_graph: leave everything attached to ``images``, for gradients of the relevance itself.
    """
    if any(isinstance(m, torch.jit.ScriptModule) for m in explanandum.classifier.modules()):
        refuse_compiled(explanandum.classifier, "srd")
    recorder = _Recorder()
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        images = images.clone() if images.is_inference() else images
        with _watched(explanandum.classifier, recorder, keep_graph):
            logits = explanandum(images)
    output = recorder.index.get(id(logits))
    if output is None:
        raise UnsupportedLayerError(
            f"srd cannot look inside {type(explanandum.classifier).__name__}: its logits did not come out of operations it could watch "
            f"(a scripted, compiled or detached model?). Pass the plain nn.Module. {ALTERNATIVES}"
        )
    return Graph(recorder.nodes, logits, output)
