"""What the attention methods share: one forward pass with its attention matrices, the row that is read, the
map at the image's size.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from explainer.attribution import check_class_index, check_images
from explainer.attribution.attention import TokenWatch
from explainer.attribution.watching import out_of_place, refuse_compiled
from explainer.baselines.kernels.base import Baseline
from explainer.baselines.kernels.hooks import untouched
from explainer.baselines.kernels.maps import resize_map
from explainer.errors import ConfigError, UnsupportedLayerError

Row = Literal["auto", "class", "patches", "all"]


@contextlib.contextmanager
def frozen_graph(explanandum: Any) -> Iterator[None]:
    """Autograd works inside, also under the caller's ``no_grad``, and sees features only: parameters are
    constants, nothing is in place.

    Call it inside :func:`~explainer.baselines.kernels.hooks.untouched`, which gives parameters their
    ``requires_grad`` back.
    """
    explanandum.requires_grad_(False)
    with torch.inference_mode(False), torch.enable_grad(), out_of_place(explanandum):
        yield


class AttentionWatch(TokenWatch):
    """Keeps the attention matrices as tensors that can be differentiated; without a graph before it, the
    first one starts the graph.
    """

    def seen(self, attention: Tensor) -> Tensor:
        """The same matrix, on the graph wherever gradients are enabled."""
        if not attention.requires_grad and torch.is_grad_enabled():
            attention.requires_grad_()
        return attention


@dataclass
class AttentionPass:
    """One forward pass.

    Attributes:
        logits: ``[B,K]``, on the graph.
        attentions: ``A_l`` ``[B,heads,N,N]`` after the softmax, in forward order; rows are queries.
        grid: rows and columns of patches.
        prefix: tokens in front of the patches.
        padded: height and width that the patches cover.
        watch: the mode that recorded it.
    """

    logits: Tensor
    attentions: list[Tensor]
    grid: tuple[int, int]
    prefix: int
    padded: tuple[int, int]
    watch: TokenWatch

    def gradients(self, class_index: Tensor, method: str) -> list[Tensor]:
        """``G_l = d logit[b, class_index[b]] / d A_l``, each ``[B,heads,N,N]``. Can be called repeatedly."""
        scores = self.logits.gather(1, class_index[:, None]).sum()
        if not scores.requires_grad:
            raise ConfigError(
                f"{method} needs gradients from the logits to the attention, but the classifier computes its logits without them "
                "(no_grad, inference_mode or detach). Use attention_rollout, or let gradients through."
            )
        gradients = torch.autograd.grad(scores, self.attentions, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(a) if g is None else g for g, a in zip(gradients, self.attentions, strict=True)]

    def reads_class_token(self) -> bool:
        """Whether the head reads token 0: asked of autograd at the last attention. Without a graph: whether
        there are prefix tokens.
        """
        if self.prefix == 0:
            return False
        if not self.logits.requires_grad:
            return True
        weights = torch.arange(1, self.logits.shape[1] + 1, dtype=self.logits.dtype, device=self.logits.device)
        (gradient,) = torch.autograd.grad((self.logits * weights).sum(), self.attentions[-1], retain_graph=True, allow_unused=True)
        read = torch.zeros(()) if gradient is None else gradient.detach().abs().sum((0, 1, 3)).cpu()
        return bool(read[0] > 0) if bool((read > 0).any()) else True


def attention_pass(explanandum: Any, images: Tensor, watch: TokenWatch) -> AttentionPass:
    """Run ``explanandum(images)`` once under ``watch``. Call it inside :func:`frozen_graph` (or ``no_grad``,
    for values alone).

    Raises:
        UnsupportedLayerError: compiled parts, no attention, or attention that is not over all tokens of an
        image.
    """
    refuse_compiled(explanandum.classifier, watch.method)
    with watch.watching():
        logits = explanandum(images.detach().clone())
    side = getattr(explanandum, "input_size", None)
    prefix = watch.prefix(len(images), (images.shape[-2], images.shape[-1]) if side is None else (side, side))
    assert watch.grid is not None and watch.padded is not None
    return AttentionPass(logits, [a for _, a in watch.attentions], watch.grid, prefix, watch.padded, watch)


def chain(layers: list[Tensor], start: int = 0) -> Tensor:
    """``M_L ... M_{start+1}``, each ``[B,N,N]``; layers before ``start`` are left out."""
    product = layers[start]
    for layer in layers[start + 1 :]:
        product = layer @ product
    return product


class TokenBaseline(Baseline):
    """A method whose result has one number per patch.

    Args:
        explanandum: the classifier, see :class:`~explainer.baselines.kernels.base.Baseline`.
        row: which queries are read in the end. ``class``: the class token's row (token 0). ``patches``: the
            mean of the patches' rows.
            ``all``: the mean of all rows, prefix tokens included. ``auto``: ``class`` where the head reads
            token 0 and it is no patch, else ``patches``. Columns of prefix tokens are always dropped.
        start_layer: first layer that takes part, counted from 0.
    """

    needs_attention = True
    classes_share_work = True
    passes: ClassVar[str] = "1 forward + 1 backward to the first attention"

    def __init__(self, explanandum: Any, row: Row = "auto", start_layer: int = 0) -> None:
        super().__init__(explanandum)
        if row not in get_args(Row):
            raise ConfigError(f"{self.name}: row must be one of {', '.join(get_args(Row))}, received {row!r}.")
        if start_layer < 0:
            raise ConfigError(f"{self.name}: start_layer counts from 0, received {start_layer}.")
        self.row: Row = row
        self.start_layer = start_layer

    def tokens(self, images: Tensor, class_index: Tensor | int | list[int]) -> Tensor:
        """The values of the patches ``[B,grid rows,grid columns]`` before they are resized; arguments as in
        the call.
        """
        check_images(images)
        index = check_class_index(class_index, images, self.num_classes)
        with untouched(self.explanandum), self._graph():
            return self._tokens(self._pass(images), index).detach()

    def all_classes(self, images: Tensor, classes: list[int] | None = None, **_: Any) -> Tensor:
        """Maps of several classes from one forward pass, ``[B,len(classes),H,W]``."""
        check_images(images)
        indices = [check_class_index(k, images, self.num_classes) for k in (range(self.num_classes) if classes is None else classes)]
        if not indices:
            return images.new_zeros(images.shape[0], 0, *images.shape[-2:])
        with untouched(self.explanandum), self._graph():
            run = self._pass(images)
            return torch.stack([self._finish(run, i, images) for i in indices], dim=1).detach().to(images.dtype)

    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        with self._graph():
            return self._finish(self._pass(images), class_index.clone(), images).detach().to(images.dtype)

    def _graph(self) -> contextlib.AbstractContextManager[None]:
        return frozen_graph(self.explanandum)

    def _pass(self, images: Tensor) -> AttentionPass:
        """One forward pass, recorded and checked."""
        return self._recorded(images, AttentionWatch(self.explanandum.classifier, self.name))

    def _recorded(self, images: Tensor, watch: TokenWatch) -> AttentionPass:
        run = attention_pass(self.explanandum, images, watch)
        if self.start_layer >= len(run.attentions):
            raise ConfigError(
                f"{self.name}: start_layer {self.start_layer} is not below the number of attention layers, {len(run.attentions)}."
            )
        if self.row == "class" and run.prefix == 0:
            raise UnsupportedLayerError(
                f"{self.name}: row='class' needs a class token, but {type(self.explanandum.classifier).__name__} has patches only. "
                "Use row='patches'."
            )
        return run

    @abc.abstractmethod
    def _tokens(self, run: AttentionPass, class_index: Tensor) -> Tensor:
        """The method itself: ``[B,grid rows,grid columns]``."""

    def _finish(self, run: AttentionPass, class_index: Tensor, images: Tensor) -> Tensor:
        return self.resized(self._tokens(run, class_index), run, images)

    def read(self, run: AttentionPass, matrix: Tensor) -> Tensor:
        """The row that is read, without the prefix tokens' columns: ``[...,N,N]`` -> ``[...,patches]``."""
        row = self.row
        if row == "auto":
            row = "class" if run.reads_class_token() else "patches"
        if row == "class":
            return matrix[..., 0, run.prefix :]
        return matrix[..., run.prefix if row == "patches" else 0 :, run.prefix :].mean(-2)

    def resized(self, tokens: Tensor, run: AttentionPass, images: Tensor) -> Tensor:
        """Bilinear (pixel centres) to what the patches cover, padding cut off: ``[B,h,w]`` -> ``[B,H,W]``."""
        side = getattr(self.explanandum, "input_size", None)
        height, width = images.shape[-2:] if side is None else (side, side)
        if run.padded[0] >= height and run.padded[1] >= width:
            tokens = resize_map(tokens, run.padded)[:, :height, :width]
        return resize_map(tokens, images.shape[-2:])
