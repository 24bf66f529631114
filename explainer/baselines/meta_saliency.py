"""Meta-saliency around any method (Rebuffi, Fong, Ji, Vedaldi 2020, "There and Back Again")."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from explainer import plugins
from explainer.attribution import Attributor, one_map
from explainer.baselines import build
from explainer.baselines.kernels.base import Baseline
from explainer.baselines.kernels.meta import stepped_parameters
from explainer.errors import ConfigError


class MetaSaliency(Baseline):
    """The method inside at ``theta' = theta - 2 eps d loss(theta, x) / d theta``: one step of descent on this image and class.

    The step makes the classifier surer of the class, and with it the method more sensitive to the class. ``eps`` towards 0 is the method
    itself; a negative one shows what the classifier would lose. BatchNorm statistics stay. The weights are moved only while the method
    inside runs, image by image, and are put back whatever happens.

    Args:
        explanandum: the classifier.
        method: a baseline that reads the classifier: gradient and CAM methods, excitation backpropagation, relevance propagation, NormGrad.
        options: keyword options of that method.
        eps: half the rate of the step.
    """

    name = "meta_saliency"
    passes: ClassVar[str] = "those of the method inside (gradient), and 1 forward + 1 backward, image by image"

    def __init__(self, explanandum: Any, method: str = "gradient", options: Mapping[str, Any] | None = None, eps: float = 0.001) -> None:
        super().__init__(explanandum)
        if method == self.name:
            raise ConfigError("meta_saliency: method must be another method, received 'meta_saliency'.")
        self.eps = eps
        self.inner: Attributor = one_map(build(method, explanandum, **dict(options or {})))
        if not self.inner.needs_gradients and not self.inner.class_specific:
            raise ConfigError(f"meta_saliency: {method} does not read the classifier, so that a step of its weights changes nothing.")
        for fact in ("deterministic", "signed", "needs_masks"):
            setattr(self, fact, getattr(self.inner, fact))

    @classmethod
    def inner_method(cls, options: Mapping[str, Any]) -> tuple[str, type, Mapping[str, Any]]:
        """See :meth:`Attributor.inner_method`."""
        return options["method"], plugins.find("explainer.baselines", options["method"]), options["options"] or {}

    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        maps = []
        for b in range(len(images)):
            one = slice(b, b + 1)
            after = stepped_parameters(self.explanandum, images[one], class_index[one], 2 * self.eps)
            with _moved(self.explanandum, after):
                maps.append(self.inner(images[one], class_index[one], generator=generator, masks=None if masks is None else masks[one]))
        return torch.cat(maps)


@contextlib.contextmanager
def _moved(explanandum: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """The classifier at other weights inside. (A copy would not do: a forward override of the user's still reads the first model.)"""
    before = {name: p.data for name, p in explanandum.named_parameters() if name in parameters}
    try:
        for name, p in explanandum.named_parameters():
            if name in before:
                p.data = parameters[name]
        yield
    finally:
        for name, p in explanandum.named_parameters():
            if name in before:
                p.data = before[name]
