"""SRD, Sharing Ratio Decomposition: how much each pixel's feature vector shares in the vectors it feeds, from the logits to any layer.

S. Han, Y. Kim, N. Kwak, "Respect the model: Fine-grained and robust explanation with sharing ratio decomposition", ICLR 2024.
``R_i^l = sum_k sum_j mu_{i->j} R_j^k`` with ``mu_{i->j} = <vh_{i->j}, v_j> / ||v_j||^2`` (eqs. 6-8), computed as one backward sweep.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from explainer.attribution import check_class_index, check_images
from explainer.baselines.kernels.base import Baseline
from explainer.baselines.kernels.hooks import find_layer, untouched
from explainer.baselines.kernels.srd_graph import Graph, record
from explainer.baselines.kernels.srd_sweep import Start, Unit, initial_relevance, mean_class_map, mu_sums, neuron_relevance, sweep
from explainer.errors import ConfigError


@dataclass(frozen=True)
class Account:
    """Where relevance went. ``sum(input map) + sum of all leaks = sum(encoder map)`` for each image.

    Attributes:
        relevance: node name -> ``[B,h,w]`` for the input, every activation and the encoder output.
        mu_sum: target node -> ``[B,h,w]``, the sum of all sharing ratios into a pixel; 1 unless a bias or zero vector had no owner.
        leak: target node -> ``[B]``, relevance that found no owner.
    """

    relevance: dict[str, Tensor]
    mu_sum: dict[str, Tensor]
    leak: dict[str, Tensor]


class SRD(Baseline):
    """Sharing Ratio Decomposition.

    Works on any CNN made of convolution, BatchNorm, max / average pooling, zero padding, residual sums, channel concatenation, dropout and
    pointwise activations, as modules or functional calls; an operation without a rule raises
    :class:`~explainer.errors.UnsupportedLayerError` when relevance has to cross it. Cost: one forward, one backward to the input, a few
    one-channel convolutions. The sweep runs in float32 or better, also under autocast.

    Args:
        explanandum: the classifier. The result depends on its normalisation (pixel norms share out the first layer's bias).
        resolution: ``input`` (every pixel), ``high`` (the deepest activation of stride 8 or finer that all relevance crosses: 28x28 for
            224 px), ``low`` (the encoder output, no sweep), or a module path.
        encoder_output: module path of the tensor that enters the head; None finds it (VGG: last pool, ResNet: layer4).
        start: initial relevance: ``paper`` (eq. 4), ``code`` (the published code's), ``constant`` (1 everywhere; class-free).
        normalize: divide each map by its maximum (left as it is if that is not positive).
        by_max_abs: divide by the largest magnitude instead (Quantus' convention).
        unit, vector: the paper's ablations (appendix F), rows of a figure and no methods of their own. ``unit="scalar"``: every neuron
            shares by itself (LRP-0 with shared biases); noisy, and only with ``start="paper"``. ``vector="post"``: ratios along the vectors
            behind the activations; too sparse. Receptive fields and trees of vectors are always those of SRD itself.
    """

    name = "srd"
    passes = "1 forward + 1 modified backward"
    classes_share_work = True
    signed = True

    def __init__(
        self,
        explanandum: Any,
        *,
        resolution: str = "input",
        encoder_output: str | None = None,
        start: Start = "paper",
        normalize: bool = True,
        by_max_abs: bool = False,
        unit: Unit = "vector",
        vector: Literal["pre", "post"] = "pre",
    ) -> None:
        super().__init__(explanandum)
        if unit not in get_args(Unit) or vector not in ("pre", "post"):
            raise ConfigError(f"srd: unit must be vector or scalar and vector pre or post, received {unit!r} and {vector!r}.")
        if unit == "scalar" and (start != "paper" or vector == "post"):
            raise ConfigError(
                f"srd: unit='scalar' starts at the paper's relevance of neurons: leave start and vector out ({start!r}, {vector!r})."
            )
        self.unit, self.post = unit, vector == "post"
        if start not in get_args(Start):
            raise ConfigError(f"start must be one of {', '.join(get_args(Start))}, received {start!r}.")
        for path in [encoder_output] if resolution in ("low", "high", "input") else [encoder_output, resolution.partition("#")[0]]:
            if path is not None and ":" not in path:
                find_layer(explanandum.classifier, path)
        self.resolution, self.encoder_output, self.start = resolution, encoder_output, start
        self.normalize, self.by_max_abs = normalize, by_max_abs

    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        graph, encoder = self._record(images)
        relevance = self._initial(graph, encoder, class_index)
        graph.release()
        return self._finish(self._sweep_to_resolution(graph, encoder, relevance.detach(), consume=True), images)

    def all_classes(
        self, images: Tensor, classes: list[int] | None = None, *, generator: torch.Generator | None = None, masks: Tensor | None = None
    ) -> Tensor:
        """Maps of several classes ``[B,len(classes),H,W]`` (all K when None) from one forward pass: one head pass and sweep per class."""
        check_images(images)
        chosen = list(range(self.num_classes)) if classes is None else classes
        indices = [check_class_index(k, images, self.num_classes) for k in chosen]
        with untouched(self.explanandum):
            graph, encoder = self._record(images)
            mean = mean_class_map(graph, encoder) if self.start == "paper" else None
            starts = [self._initial(graph, encoder, index, mean=mean).detach() for index in indices]
            graph.release()
            maps = [self._finish(self._sweep_to_resolution(graph, encoder, r), images) for r in starts]
        return torch.stack(maps, 1).detach()

    def relevance(
        self,
        images: Tensor,
        class_index: Tensor | int | list[int],
        layers: Sequence[str] | None = None,
        *,
        initial: Tensor | None = None,
        create_graph: bool = False,
    ) -> dict[str, Tensor]:
        """Native maps, not normalised, at several nodes from one sweep.

        Args:
            images: ``[B,3,H,W]`` in [0,1].
            class_index: class per image.
            layers: module paths (``relu#0`` is the first call of a shared module), ``input`` the normalised image. None: the input,
                every activation and the encoder output.
            initial: ``R^L`` ``[B,h,w]`` to start from instead of the class's.
            create_graph: keep the maps attached to ``images``, for gradients of the explanation.

        Returns:
            ``{layer: [B,h,w]}``, signed, on the scale of the logits.
        """
        check_images(images)
        index = check_class_index(class_index, images, self.num_classes)
        with untouched(self.explanandum):
            graph, encoder = self._record(images, create_graph)
            r = self._initial(graph, encoder, index, create_graph) if initial is None else initial
            if not create_graph:
                graph.release()
                r = r.detach()
            names = [graph.name(i) for i in self._landmarks(graph, encoder)] if layers is None else list(layers)
            stops = [graph.find(name) for name in names]
            with self._precise(images, create_graph):
                maps = sweep(graph, encoder, r, stops, post=self.post)
        return {name: maps[stop] for name, stop in zip(names, stops, strict=True)}

    def differentiable_map(self, images: Tensor, class_index: Tensor | int | list[int] = 0) -> Tensor:
        """The raw map at this resolution, upsampled, ``[B,H,W]``, with a graph to ``images``: what an attack optimises."""
        check_images(images)
        index = check_class_index(class_index, images, self.num_classes)
        with untouched(self.explanandum):
            graph, encoder = self._record(images, keep_graph=True)
            relevance = self._initial(graph, encoder, index, create_graph=True)
            with self._precise(images, True):
                maps = sweep(graph, encoder, relevance, [self._stop(graph, encoder)], post=self.post)
        return _upsample(next(iter(maps.values())), images)

    def erf(self, images: Tensor, layer: str, position: tuple[int, int] | Tensor) -> Tensor:
        """Effective receptive field of the feature vector at one pixel: its shares over the input, summing to 1 (eq. 2).

        Args:
            images: ``[B,3,H,W]``.
            layer: module path.
            position: (row, column) in that layer's map, or ``[B,2]``.

        Returns:
            ``[B,h_0,w_0]`` at the size that the classifier receives.
        """
        check_images(images)
        with untouched(self.explanandum):
            graph, node, one_hot = self._one_vector(images, layer, position)
            with self._precise(images, False):
                return sweep(graph, node, one_hot, [0])[0]

    def shares(self, images: Tensor, layer: str, position: tuple[int, int] | Tensor) -> dict[str, Tensor]:
        """Sharing ratios into the feature vector at one pixel, from the vectors that it is made of (eq. 6).

        Args:
            images: ``[B,3,H,W]``.
            layer: module path.
            position: (row, column) in that layer's map, or ``[B,2]``.

        Returns:
            ``{source: [B,h,w]}``, mu of every pixel of each activation (or ``input``) that feeds the layer without another activation
            between; signed, together 1 (less where a bias or a zero vector had no owner).
        """
        check_images(images)
        with untouched(self.explanandum):
            graph, node, one_hot = self._one_vector(images, layer, position)
            with self._precise(images, False):
                found = sweep(graph, node, one_hot, graph.sources_of(node), one_step=True)
        return {graph.name(i): mu for i, mu in found.items()}

    def vectors(self, images: Tensor, layer: str) -> Tensor:
        """Pointwise feature vectors ``v_j`` of a layer, ``[B,C,h,w]``: what an activation is given, any other layer's own output."""
        check_images(images)
        with untouched(self.explanandum):
            graph = record(self.explanandum, images)
            graph.release()
            node = graph.nodes[graph.find(layer)]
            return graph.nodes[node.inputs[0]].out if graph.is_source(graph.find(layer)) and node.inputs else node.out

    def _one_vector(self, images: Tensor, layer: str, position: tuple[int, int] | Tensor) -> tuple[Graph, int, Tensor]:
        """The recorded pass, the layer's node, and a map ``[B,h,w]`` that is 1 at the position."""
        graph = record(self.explanandum, images)
        graph.release()
        node = graph.find(layer)
        height, width = graph.nodes[node].out.shape[-2:]
        where = torch.as_tensor(position, device=images.device).reshape(-1, 2).expand(len(images), 2)
        if bool((where < 0).any()) or bool((where >= where.new_tensor([height, width])).any()):
            raise ConfigError(f"position must lie inside layer {layer!r} of {height}x{width} pixels, received {where.tolist()}.")
        one_hot = graph.nodes[node].out.new_zeros(len(images), height, width)
        one_hot[torch.arange(len(images), device=images.device), where[:, 0], where[:, 1]] = 1
        return graph, node, one_hot

    def account(self, images: Tensor, class_index: Tensor | int | list[int]) -> Account:
        """All relevance and where it leaked (zero pixels under a bias, zero vectors)."""
        check_images(images)
        index = check_class_index(class_index, images, self.num_classes)
        with untouched(self.explanandum):
            graph, encoder = self._record(images)
            r = initial_relevance(graph, encoder, index, self.start).detach()
            graph.release()
            with self._precise(images, False):
                maps = sweep(graph, encoder, r, self._landmarks(graph, encoder))
                sums = mu_sums(graph, encoder)
        leak = {graph.name(i): ((1 - s) * maps[i]).sum((1, 2)) for i, s in sums.items()}
        return Account({graph.name(i): m for i, m in maps.items()}, {graph.name(i): s for i, s in sums.items()}, leak)

    def nodes(self, images: Tensor) -> dict[str, tuple[int, int]]:
        """Nodes that can be named, with their size in pixels, in call order."""
        with untouched(self.explanandum):
            graph, encoder = self._record(images)
            return {graph.name(i): _size(graph.nodes[i].out) for i in graph.between([0], encoder)}

    def _record(self, images: Tensor, keep_graph: bool = False) -> tuple[Graph, int]:
        graph = record(self.explanandum, images, keep_graph)
        encoder = graph.encoder_output() if self.encoder_output is None else graph.find(self.encoder_output, fold=False)
        return graph, encoder

    def _initial(self, graph: Graph, encoder: int, class_index: Tensor, create_graph: bool = False, mean: Tensor | None = None) -> Tensor:
        """``R^L`` of pixels ``[B,h,w]``, or of neurons ``[B,C,h,w]``."""
        relevance = initial_relevance(graph, encoder, class_index, self.start, create_graph=create_graph, mean=mean)
        return relevance if self.unit == "vector" else neuron_relevance(graph, encoder, class_index, relevance, create_graph)

    @staticmethod
    @contextlib.contextmanager
    def _precise(images: Tensor, create_graph: bool) -> Iterator[None]:
        """The sweep's surroundings: no autocast, gradients only on request."""
        with torch.inference_mode(False), torch.autocast(images.device.type, enabled=False), torch.set_grad_enabled(create_graph):
            yield

    def _sweep_to_resolution(self, graph: Graph, encoder: int, relevance: Tensor, consume: bool = False) -> Tensor:
        with self._precise(relevance, False):
            return next(iter(sweep(graph, encoder, relevance, [self._stop(graph, encoder)], consume=consume, post=self.post).values()))

    @staticmethod
    def _landmarks(graph: Graph, encoder: int) -> list[int]:
        return [i for i in graph.between([0], encoder) if graph.is_source(i) or i == encoder]

    def _stop(self, graph: Graph, encoder: int) -> int:
        if self.resolution == "low":
            return encoder
        if self.resolution == "input":
            return 0
        if self.resolution != "high":
            return graph.find(self.resolution)
        # A branch inside a residual block holds part of the relevance only, so only nodes that all of it crosses qualify.
        height, width = (math.ceil(s / 8) for s in graph.nodes[0].out.shape[-2:])
        fine = [i for i in graph.cuts(encoder) if graph.is_source(i) and _covers(graph.nodes[i].out, height, width)]
        return fine[-1]

    def _finish(self, maps: Tensor, images: Tensor) -> Tensor:
        """Divide by the maximum, then bring to the images' size and dtype."""
        if self.normalize:
            top = (maps.abs() if self.by_max_abs else maps).amax((1, 2), keepdim=True)
            maps = maps / torch.where(top > 0, top, torch.ones_like(top))
        return _upsample(maps, images).to(images.dtype)


def _size(values: Tensor) -> tuple[int, int]:
    return values.shape[-2], values.shape[-1]


def _covers(values: Tensor, height: int, width: int) -> bool:
    return values.shape[-2] >= height and values.shape[-1] >= width


def _upsample(maps: Tensor, images: Tensor) -> Tensor:
    """``[B,h,w]`` -> ``[B,H,W]``, bilinear (align_corners=False)."""
    if maps.shape[-2:] == images.shape[-2:]:
        return maps
    return torch.nn.functional.interpolate(maps.unsqueeze(1), images.shape[-2:], mode="bilinear", align_corners=False).squeeze(1)
