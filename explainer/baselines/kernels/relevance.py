"""The kernel of the relevance methods (LRP family, RAP, excitation backprop): one forward pass that knows its backward rules.

While the classifier runs, every torch operation that touches the image's features is intercepted. Its value is left as it is;
its backward is replaced by the method's rule. Autograd then carries relevance instead of gradients: it follows residual
connections, adds up what a tensor receives from several readers and reaches any layer that is asked for. Because operations and
not modules are intercepted, shared or in-place ReLUs, functional calls, ``nn.Flatten`` and additions need no special care, and
nothing of the classifier is changed.

A batch norm is folded into the convolution whose output it reads: the pair is one linear layer, ``w' = g w``,
``b' = g (b - mean) + beta`` with ``g = gamma / sqrt(var + eps)``. A gate, one number per channel that multiplies a feature map
(squeeze-and-excitation), is taken as a constant: the feature map receives all relevance (signal takes all; Arras et al. 2017), the gate
none. Where the method's rules say so, layer and group norms are linear with their standard deviation as a constant
(:mod:`~explainer.baselines.kernels.relevance_norms`). An operation without a rule raises
:class:`~explainer.errors.UnsupportedLayerError` rather than letting a plain gradient through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from explainer.baselines.kernels.relevance_recorder import ALTERNATIVES, Recorder
from explainer.baselines.kernels.relevance_rules import Layer, Rules
from explainer.errors import ConfigError, UnsupportedLayerError


@dataclass
class Trace:
    """One recorded forward pass.

    Attributes:
        input: what the classifier received (normalised images), ``[B,3,h,w]``.
        logits: ``[B,K]``.
        layers: the weighted layers in the order they ran.
        captured: output of each watched module (its last call).
    """

    input: Tensor
    logits: Tensor
    layers: list[Layer] = field(default_factory=list)
    captured: dict[str, Tensor] = field(default_factory=dict)

    def point(self, at: str) -> Tensor:
        """The tensor called ``input`` or a watched module path."""
        return self.input if at == "input" else self.captured[at]

    def pull(self, start: Tensor, at: Tensor, source: Tensor | None = None) -> Tensor:
        """Relevance at the tensor ``at`` when ``source`` (the logits) carries ``start``. Can be called repeatedly."""
        (relevance,) = torch.autograd.grad(self.logits if source is None else source, at, start, retain_graph=True, allow_unused=True)
        if relevance is None:
            raise ConfigError("the layer asked for does not lie between the image and the output explained; name another with layer=.")
        return relevance


def _check_visible(classifier: nn.Module, method: str) -> None:
    for path, module in classifier.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
            raise UnsupportedLayerError(
                f"{method} cannot see inside layer {path!r} ({type(module).__name__}), which is compiled. Pass the original module, "
                f"or use a method without layer rules ({ALTERNATIVES})."
            )


@contextlib.contextmanager
def _watched(recorder: Recorder, classifier: nn.Module, watch: dict[str, nn.Module], captured: dict[str, Tensor]) -> Iterator[list[Tensor]]:
    """Hooks that keep the recorder's place, swap in the graph's first leaf (returned in a list) and capture watched outputs."""
    leaves: list[Tensor] = []
    names = {module: path for path, module in watch.items()}

    def enter(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        recorder.place.append((path, module))

    def leave(module: nn.Module, out: Any) -> None:
        recorder.place.pop()
        if module in names and isinstance(out, Tensor):
            captured[names[module]] = recorder.current(out)

    def start(args: tuple[Any, ...]) -> tuple[Any, ...]:
        leaves[:] = [recorder.begin(args[0])]
        return (leaves[0], *args[1:])

    handles = [classifier.register_forward_pre_hook(lambda _, args: start(args))]
    for path, module in classifier.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, args, path=path: enter(path, m, args)))
        handles.append(module.register_forward_hook(lambda m, _, out: leave(m, out)))
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()


def trace(explanandum: Any, images: Tensor, rules: Rules, method: str, watch: dict[str, nn.Module] | None = None) -> Trace:
    """Run ``explanandum(images)`` once with ``rules`` attached. Call it inside :func:`~explainer.baselines.kernels.hooks.untouched`.

    Args:
        explanandum: the classifier in its wrapper; the rules begin at ``explanandum.classifier``'s input.
        images: ``[B,3,H,W]`` in [0,1].
        rules: the method's rules.
        method: its name, for messages.
        watch: modules whose outputs are to be kept, by path.
    """
    classifier = explanandum.classifier
    _check_visible(classifier, method)
    explanandum.requires_grad_(False)
    recorder = Recorder(rules, method)
    captured: dict[str, Tensor] = {}
    with torch.inference_mode(False), torch.enable_grad(), _watched(recorder, classifier, watch or {}, captured) as leaves, recorder:
        try:
            logits = explanandum(images.detach().clone())
        except TypeError as error:
            # Python's operators turn a TypeError, which an UnsupportedLayerError is, into their own vaguer one.
            raise (recorder.error or error) from None
    if logits not in recorder.origins:
        recorder.place = [("", classifier)]
        raise recorder.unsupported("the output", "it does not depend on the image through operations that can be watched")
    return Trace(leaves[0], logits, recorder.layers, captured)
