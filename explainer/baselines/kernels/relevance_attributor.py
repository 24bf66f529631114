"""What the relevance methods share beside the kernel: where relevance starts, where it is read, and how it becomes a map."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from explainer.attribution import check_class_index, check_images
from explainer.attribution.layouts import layout_of
from explainer.baselines.kernels.base import Baseline
from explainer.baselines.kernels.hooks import find_layer, untouched
from explainer.baselines.kernels.relevance import Trace, trace
from explainer.baselines.kernels.relevance_rules import FirstLayer, Layer, Rule, Rules, box_rule, square_rule
from explainer.errors import ConfigError

Start = Literal["logit", "one"]


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Autograd works inside, also under the caller's ``no_grad`` or ``inference_mode``."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def check_choice(option: str, value: object, known: tuple[object, ...]) -> None:
    """Raise :class:`ConfigError` unless ``value`` is one of ``known``."""
    if value not in known:
        raise ConfigError(f"{option} must be one of {', '.join(repr(k) for k in known)}, received {value!r}.")


def one_hot(class_index: Tensor, values: Tensor, logits: Tensor) -> Tensor:
    """``values`` ``[B]`` at each image's class, 0 elsewhere: ``[B,K]``."""
    return torch.zeros_like(logits).scatter_(1, class_index[:, None], values[:, None].to(logits))


class RelevanceBaseline(Baseline):
    """A method that sends relevance from the logits back through layer rules.

    Subclasses give the rules (:meth:`_rules`) and the relevance of the logits (:meth:`_start`), or all of :meth:`_relevance`.

    Args:
        explanandum: the classifier in its wrapper; see :class:`~explainer.baselines.kernels.base.Baseline`.
        layer: module path (relative to the classifier) whose output is read; None reads the classifier's input.
    """

    passes = "1 forward + 1 modified backward"
    classes_share_work = True

    def __init__(self, explanandum: Any, layer: str | None = None) -> None:
        super().__init__(explanandum)
        if layer is not None:
            find_layer(explanandum.classifier, layer)
        self.layer = layer

    def relevance(self, images: Tensor, class_index: Tensor | int | list[int], at: str | None = None) -> Tensor:
        """Relevance before channels are summed and resized.

        Args:
            images: ``[B,3,H,W]`` in [0,1].
            class_index: class per image, ``[B]`` or one int.
            at: ``"input"`` (the normalised image as the classifier received it), a module path (its output, last call), or None for the
                ``layer`` option.

        Returns:
            A tensor of that place's shape, ``[B,3,H,W]`` at the input, detached.
        """
        check_images(images)
        index = check_class_index(class_index, images, self.num_classes)
        at = at or self.layer or "input"
        if at != "input":
            find_layer(self.explanandum.classifier, at)
        with untouched(self.explanandum), differentiable():
            return self._relevance(self._trace(images, at), index.clone(), at).detach()

    def all_classes(self, images: Tensor, classes: list[int] | None = None, **_: Any) -> Tensor:
        """Maps of several classes from one forward pass, ``[B,len(classes),H,W]``."""
        check_images(images)
        chosen = range(self.num_classes) if classes is None else classes
        at = self.layer or "input"
        with untouched(self.explanandum), differentiable():
            record = self._trace(images, at)
            indices = [check_class_index(k, images, self.num_classes) for k in chosen]
            signals = [self._spatial(self._relevance(record, i, at), images) for i in indices]
            return torch.stack([self._map(s, images) for s in signals], dim=1).detach()

    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        at = self.layer or "input"
        with differentiable():
            signal = self._relevance(self._trace(images, at), class_index.clone(), at)
            return self._map(self._spatial(signal, images), images)

    def _trace(self, images: Tensor, at: str) -> Trace:
        return trace(self.explanandum, images.detach(), self._rules(images), self.name, self._watch(at))

    def _watch(self, at: str) -> dict[str, nn.Module]:
        return {} if at == "input" else {at: find_layer(self.explanandum.classifier, at)}

    @abc.abstractmethod
    def _rules(self, images: Tensor) -> Rules:
        """The rules, given the images (bounds of the first layer depend on their normalisation)."""

    def _start(self, logits: Tensor, class_index: Tensor) -> Tensor:
        """Relevance of the logits ``[B,K]``."""
        return one_hot(class_index, torch.ones_like(class_index), logits)

    def _relevance(self, record: Trace, class_index: Tensor, at: str) -> Tensor:
        return record.pull(self._start(record.logits.detach(), class_index), record.point(at))

    def _spatial(self, relevance: Tensor, images: Tensor) -> Tensor:
        """Relevance of the input or of ``layer`` as ``[B,C,h,w]``."""
        if self.layer is None:
            return relevance
        module = find_layer(self.explanandum.classifier, self.layer)
        return layout_of(self.explanandum, self.layer, module, shape=relevance.shape, images=images, known=self.known).spatial(relevance)

    def _map(self, relevance: Tensor, images: Tensor) -> Tensor:
        """Channel sum of ``[B,C,h,w]``, bilinear to the images' size where it differs: ``[B,H,W]``."""
        total = relevance.sum(dim=1, keepdim=True)
        if total.shape[-2:] != images.shape[-2:]:
            total = nn.functional.interpolate(total, images.shape[-2:], mode="bilinear", align_corners=False)
        return total.squeeze(1)

    def _first(self, kind: FirstLayer, otherwise: Rule, images: Tensor, epsilon: float) -> Rule:
        """The rule of the layer that reads pixels. ``z_box`` takes normalised black and white as the pixels' bounds."""
        if kind == "same":
            return otherwise
        if kind == "w_square":
            return partial(square_rule, epsilon=epsilon)
        corners = (self.explanandum.normalize(torch.full_like(images[:1, :, :1, :1], v)) for v in (0.0, 1.0))
        low, high = (c.detach().flatten() for c in corners)
        return partial(box_rule, low=low, high=high, epsilon=epsilon)

    def _by_position(self, kind: FirstLayer, rule: Rule, images: Tensor, epsilon: float) -> Any:
        """``rule`` everywhere but at the layer that reads pixels."""
        first = self._first(kind, rule, images, epsilon)

        def choose(layer: Layer) -> Rule:
            return first if layer.first else rule

        return choose
