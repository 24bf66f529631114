"""One map from a method's maps at several layers (Rebuffi, Fong, Ji, Vedaldi 2020, "There and Back Again"; Fong's thesis, appendix C.2)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from explainer import plugins
from explainer.attribution import Attributor, one_map
from explainer.baselines import build
from explainer.baselines.kernels.base import Baseline
from explainer.baselines.kernels.maps import shares
from explainer.baselines.layer_weights import layer_weights
from explainer.errors import ConfigError
from explainer.tensors import min_max


class LayerCombination(Baseline):
    """``prod_j M_j ** w_j`` or ``sum_j w_j M_j``: M_j is the method's map at layer j, brought to [0,1] per image, w_j its weight,
    together 1.

    Args:
        explanandum: the classifier.
        method: a baseline with the option ``layer``: the CAM family, gradients, excitation backpropagation, NormGrad.
        options: options of that method, without ``layer``.
        layers: module paths, from the image to the logits. None: the method's own layer alone.
        weights: one a layer, e.g. of :func:`~explainer.baselines.layer_weights.layer_weights`; ``uniform``; or ``linear``: in proportion to
            1, 2, ... in the order of ``layers``.
        combine: ``product`` or ``sum``.
    """

    name = "layer_combination"
    passes: ClassVar[str] = "those of the method inside (norm_grad), a layer"

    def __init__(
        self,
        explanandum: Any,
        method: str = "norm_grad",
        options: Mapping[str, Any] | None = None,
        *,
        layers: Sequence[str] | None = None,
        weights: Sequence[float] | Literal["uniform", "linear"] = "uniform",
        combine: Literal["product", "sum"] = "product",
    ) -> None:
        super().__init__(explanandum)
        inside = dict(options or {})
        accepted = inspect.signature(plugins.find("explainer.baselines", method)).parameters
        if method == self.name or "layer" not in accepted or "layer" in inside:
            raise ConfigError(
                "layer_combination: method must be a baseline with the option layer (`explainer methods` lists them), and layer itself "
                "is given "
                f"by layers; received {method!r} with {inside}."
            )
        if isinstance(layers, str) or (layers is not None and (not layers or len(set(layers)) != len(layers))):
            raise ConfigError(f"layer_combination: layers must be a list of different module paths, received {layers!r}.")
        if combine not in ("product", "sum"):
            raise ConfigError(f"layer_combination: combine must be product or sum, received {combine!r}.")
        chosen: list[str | None] = list(layers) if layers else [None]
        self.weights = _weights(explanandum, weights, [c or "" for c in chosen])
        self.combination = combine
        self.at_layers: list[Attributor] = [
            one_map(build(method, explanandum, **inside, **({} if at is None else {"layer": at}))) for at in chosen
        ]
        self.inner = self.at_layers[0]
        for fact in ("needs_gradients", "deterministic", "class_specific", "needs_masks", "reference"):
            setattr(self, fact, getattr(self.at_layers[0], fact))

    @classmethod
    def inner_method(cls, options: Mapping[str, Any]) -> tuple[str, type, Mapping[str, Any]]:
        """See :meth:`Attributor.inner_method`."""
        return options["method"], plugins.find("explainer.baselines", options["method"]), options["options"] or {}

    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        start = generator.get_state()
        maps = []
        for method in self.at_layers:
            generator.set_state(start)  # the same noise at every layer
            maps.append(min_max(method(images, class_index, generator=generator, masks=masks)))
        stacked = torch.stack(maps)
        weights = torch.tensor(self.weights, dtype=stacked.dtype, device=stacked.device).view(-1, 1, 1, 1)
        return (stacked**weights).prod(0) if self.combination == "product" else (stacked * weights).sum(0)


def _weights(explanandum: Any, given: Sequence[float] | str, layers: Sequence[str]) -> list[float]:
    if given in ("uniform", "linear"):
        return layer_weights(explanandum, layers, "linear" if given == "linear" else "uniform")
    return shares(given, len(layers), LayerCombination.name, "layers (or uniform, or linear)")
