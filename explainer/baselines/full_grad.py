"""FullGrad (Srinivas, Fleuret 2019, "Full-Gradient Representation for Neural Network Visualization")."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from explainer.attribution.layouts import CHANNELS_FIRST, Layout, decide, record
from explainer.baselines.kernels.base import Baseline
from explainer.baselines.kernels.features import class_gradients, watch
from explainer.baselines.kernels.maps import CAM_EPSILON, resize_map
from explainer.errors import ConfigError, UnsupportedLayerError
from explainer.tensors import min_max

_CODE_EPSILON = 1e-6


def implicit_bias(layer: nn.Module) -> Tensor | None:
    """What the layer adds to a linear function of its input, per channel ``[C]``; None where it adds nothing.

    Convolution and linear layer: the bias. BatchNorm in eval mode: ``beta - mean * gamma / sqrt(var + eps)``. LayerNorm: ``beta`` (its
    rescaling is not linear, and the paper has no term for it).
    """
    if isinstance(layer, nn.BatchNorm2d):
        if layer.running_mean is None or layer.running_var is None:
            raise UnsupportedLayerError(
                "full_grad needs the running statistics of every BatchNorm2d: build it with track_running_stats=True."
            )
        scale = torch.rsqrt(layer.running_var + layer.eps) * (1 if layer.weight is None else layer.weight)
        return (0 if layer.bias is None else layer.bias) - layer.running_mean * scale
    return layer.bias if isinstance(layer, nn.Conv2d | nn.Linear | nn.LayerNorm) else None


def _placed(layer: nn.Module, bias: Tensor, layout: Layout) -> Tensor:
    """The bias along the axis of the layer's output that it belongs to. A linear layer's is the last one, also where it mixes tokens and
    has a bias for each place; a layer norm may have moved the channels back in front.
    """
    first = layout == CHANNELS_FIRST and not isinstance(layer, nn.Linear)
    return bias.view(1, -1, 1, 1) if first else bias


class FullGrad(Baseline):
    """``psi(x * G_x) + sum over biased layers and channels of psi(b_c * G_c)`` (eq. 5), ``G`` the logit's gradient at each output.

    Convolutions, batch norms, and the linear layers and layer norms of maps that are channels last or tokens count. Biases without a place
    in the image do not: those of vectors (the head), of prefix tokens and of attention windows.

    Completeness (:meth:`terms`): for piecewise-linear networks ``s_k = sum x*G_x + sum b*G`` over *all* biases, the linear layers' too.

    Args:
        convention: what ``psi`` makes of ``|.|``.

            - ``paper``: each channel, resized, is rescaled to [0,1], as the formula has one ``psi`` a channel. The sum is returned.
            - ``code`` (the authors' repository): all channels of a layer are rescaled together, ``(v - min) / (max - min + 1e-6)``, so
              that a channel's share of its layer's relevance counts; resized with aligned corners. The sum is returned.
            - ``pytorch_grad_cam`` (default): each channel is rescaled with ``1e-7 + max - min``, then resized; so is the sum.

    Where each channel is rescaled by itself, a channel that is worth nothing weighs as much as one that decides.
    """

    name = "full_grad"
    passes: ClassVar[str] = "1 forward + 1 backward"

    def __init__(self, explanandum: Any, convention: str = "pytorch_grad_cam") -> None:
        super().__init__(explanandum)
        if convention not in ("pytorch_grad_cam", "paper", "code"):
            raise ConfigError(f"full_grad: convention must be pytorch_grad_cam, paper or code, received {convention!r}.")
        self.convention = convention

    def terms(self, images: Tensor, class_index: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``x * G_x`` ``[B,C,H,W]`` and, per biased layer and call, ``b * G`` ``[B,c,h,w]``; ``x`` is the normalised image."""
        biases = {m: b for m in self.explanandum.classifier.modules() if (b := implicit_bias(m)) is not None}
        with torch.enable_grad():
            leaf = images.detach().clone().requires_grad_()
            with watch(list(biases)) as seen:
                logits = self.explanandum(leaf)
            places = self._layouts({m: seen[m] for m in biases}, images)
            outputs = [(_placed(m, biases[m], layout), layout, out) for m, layout in places.items() for out in seen[m]]
            first, *rest = class_gradients(logits, class_index, [leaf, *(out for *_, out in outputs)])
        centred = images - self.explanandum.mean.to(images).view(1, -1, 1, 1)
        return centred * first, [layout.spatial(b * g) for (b, layout, _), g in zip(outputs, rest, strict=True)]

    def _layouts(self, seen: dict[nn.Module, list[Tensor]], images: Tensor) -> dict[nn.Module, Layout]:
        """The layers whose outputs are maps, and how to read them."""
        found: dict[nn.Module, Layout] = {m: CHANNELS_FIRST for m in seen if isinstance(m, nn.Conv2d | nn.BatchNorm2d)}
        if not any(out.ndim > 2 for m, outputs in seen.items() if m not in found for out in outputs):
            return found
        recording, _ = record(self.explanandum, images[:1])
        for call in recording.calls:
            if call.module in seen and call.module not in found and all(o.shape[1:] == call.shape[1:] for o in seen[call.module]):
                options = recording.readings(call, self.explanandum.classifier)
                with contextlib.suppress(UnsupportedLayerError):
                    found[call.module] = decide(
                        self.explanandum, call.path, call.module, options=options, shape=call.shape, images=images, recording=recording
                    )
        return found

    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        at_input, at_biases = self.terms(images, class_index)
        total = torch.zeros_like(images[:, 0])
        for term in (at_input, *at_biases):
            total = total + self._postprocess(term.abs(), images.shape[-2:])
        return min_max(total, CAM_EPSILON) if self.convention == "pytorch_grad_cam" else total

    def _postprocess(self, term: Tensor, size: torch.Size) -> Tensor:
        """``[B,c,h,w]`` -> ``[B,H,W]``: rescaled and resized, then summed over channels."""
        if self.convention == "code":
            low, high = (bound(term, (1, 2, 3), keepdim=True) for bound in (torch.amin, torch.amax))
            scaled = (term - low) / (high - low + _CODE_EPSILON)
            return functional.interpolate(scaled.sum(1, keepdim=True), tuple(size), mode="bilinear", align_corners=True)[:, 0]
        resize: Callable[[Tensor], Tensor] = lambda t: resize_map(t.flatten(0, 1), size).view(*t.shape[:2], *size)  # noqa: E731
        resized = resize(min_max(term, CAM_EPSILON)) if self.convention == "pytorch_grad_cam" else min_max(resize(term), epsilon=1e-20)
        return resized.sum(1)
