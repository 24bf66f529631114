"""Gradients of class scores with respect to the input and to feature maps: the kernel of all gradient and CAM methods."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from explainer.attribution.layouts import Known, Layout, layout_of
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


@dataclass(frozen=True)
class FeatureMap:
    """What one layer returned in a forward pass.

    Attributes:
        output: the layer's output, attached to the graph.
        layout: how it is read.
        path: of the layer.
    """

    output: Tensor
    layout: Layout
    path: str

    @property
    def values(self) -> Tensor:
        """``[B,C,h,w]``, without prefix tokens, detached."""
        return self.layout.spatial(self.output.detach())


def single_output(seen: Sequence[Tensor], path: str) -> Tensor:
    """The only output of a watched layer; a layer without, or with several, is refused by name."""
    if len(seen) != 1:
        state = "is never called" if not seen else f"is called {len(seen)} times"
        raise UnsupportedLayerError(f"layer {path!r} {state} in one forward pass, so its feature map is not defined: name another layer.")
    return seen[0]


def forward_features(
    explanandum: Any, layers: dict[str, nn.Module], images: Tensor, known: Known | None = None
) -> tuple[Tensor, list[FeatureMap]]:
    """One forward pass -> logits ``[B,K]`` and the named layers' feature maps of any layout, both attached to the graph.

    Args:
        explanandum: the classifier.
        layers: modules by path.
        images: ``[B,C,H,W]``.
        known: layouts that earlier calls have found out, see :func:`~explainer.attribution.layouts.layout_of`.

    Raises:
        UnsupportedLayerError: a layer is not called exactly once, or returns no feature map
            (:func:`~explainer.attribution.layouts.layout_of`).
    """
    with watch(list(layers.values())) as seen:
        logits = explanandum(images)
    outputs = {path: single_output(seen[module], path) for path, module in layers.items()}
    return logits, [
        FeatureMap(out, layout_of(explanandum, path, layers[path], shape=out.shape, images=images, known=known), path)
        for path, out in outputs.items()
    ]


def feature_gradients(logits: Tensor, class_index: Tensor, features: Sequence[FeatureMap], retain_graph: bool = False) -> list[Tensor]:
    """:func:`class_gradients` at feature maps, ``[B,C,h,w]`` each. Raises :class:`UnsupportedLayerError`: see :func:`refuse_silent`."""
    gradients = class_gradients(logits, class_index, [f.output for f in features], retain_graph)
    maps = [f.layout.spatial(g) for f, g in zip(features, gradients, strict=True)]
    for feature, whole, patches in zip(features, gradients, maps, strict=True):
        if bool(whole.any()):  # else nothing of the layer has a say: a loss that is 0
            refuse_silent(feature, patches, 0.0)
    return maps


def refuse_silent(feature: FeatureMap, effect: Tensor, rounding: float) -> None:
    """Refuse a layer with prefix tokens whose patches have no say: behind the last attention of a ViT the class token alone is read.

    Args:
        feature: the layer's.
        effect: of its patches on the scores.
        rounding: largest effect that is none.

    Raises:
        UnsupportedLayerError: there is none; a map would be empty, or rounding noise.
    """
    if feature.layout.prefix and not bool((effect.abs() > rounding).any()):
        raise UnsupportedLayerError(
            f"the class scores do not depend on the patch tokens of layer {feature.path!r}, behind which only its first tokens are read: "
            "name an earlier layer, in front of an attention (blocks.11.norm1), or none, for the last one whose patches count."
        )
