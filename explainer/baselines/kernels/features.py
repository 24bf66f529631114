"""Gradients of class scores with respect to the input and to feature maps: the kernel of all gradient and CAM methods."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from explainer.errors import ConfigError, UnsupportedLayerError


@contextlib.contextmanager
def watch(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """Collect the modules' outputs as tensors that can be differentiated, in call order.

    The network goes on with a copy, so that a later in-place operation (``relu_``, a residual ``+=``) cannot change what was seen.
    Where nothing before the module requires gradients, the graph starts at its output: backward passes end there.
    """
    seen: dict[nn.Module, list[Tensor]] = {m: [] for m in modules}

    def record(module: nn.Module, _: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise UnsupportedLayerError(f"{type(module).__name__} returns {type(output).__name__}, not one tensor: name a layer inside it.")
        feature = output if output.requires_grad else output.detach().requires_grad_(torch.is_grad_enabled())
        seen[module].append(feature)
        return feature.clone()

    handles = [m.register_forward_hook(record) for m in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def class_gradients(logits: Tensor, class_index: Tensor, tensors: Sequence[Tensor], retain_graph: bool = False) -> list[Tensor]:
    """``d logits[b, class_index[b]] / d tensor[b]`` for each tensor (images of a batch do not interact)."""
    scores = logits.gather(1, class_index[:, None]).sum()
    if not scores.requires_grad:
        raise ConfigError("the class scores do not depend on the layer asked for: name one between the image and the logits.")
    gradients = torch.autograd.grad(scores, list(tensors), retain_graph=retain_graph, allow_unused=True)
    if any(g is None for g in gradients):
        raise ConfigError("the class scores do not depend on one of the layers asked for: name layers between the image and the logits.")
    return list(gradients)


def input_gradient(explanandum: Any, images: Tensor, class_index: Tensor) -> Tensor:
    """Gradient of each image's class score with respect to the image in [0,1], ``[B,C,H,W]``."""
    with torch.enable_grad():
        leaf = images.detach().clone().requires_grad_()
        return class_gradients(explanandum(leaf), class_index, [leaf])[0]


def one_feature_map(seen: Sequence[Tensor], path: str) -> Tensor:
    """The only output of a watched layer, ``[B,C,h,w]``; a layer without, or with several, is refused by name."""
    if len(seen) != 1:
        state = "is never called" if not seen else f"is called {len(seen)} times"
        raise UnsupportedLayerError(f"layer {path!r} {state} in one forward pass, so its feature map is not defined: name another layer.")
    if seen[0].ndim != 4:
        raise UnsupportedLayerError(
            f"layer {path!r} returns {tuple(seen[0].shape)}, expected a feature map (B,C,h,w): name a convolutional layer."
        )
    return seen[0]


def forward_features(explanandum: Any, layers: dict[str, nn.Module], images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """One forward pass -> logits ``[B,K]`` and the named layers' feature maps ``[B,C,h,w]``, both attached to the graph."""
    with watch(list(layers.values())) as seen:
        logits = explanandum(images)
    return logits, [one_feature_map(seen[module], path) for path, module in layers.items()]
